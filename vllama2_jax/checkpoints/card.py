"""The model card: everything about a saved model but its arrays, as plain JSON."""

import dataclasses
import json
from pathlib import Path

from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import PRESETS, MediaPreset
from vllama2_jax.media.sound import SoundSpec
from vllama2_jax.models.config import VLlama2Config, config_from_dict, config_to_dict

FORMAT = "vllama2_jax"
VERSION = 1
FILE_NAME = "model_card.json"


class CheckpointError(ValueError):
    """A saved model that cannot be trusted: names what is wrong with it and what to do."""


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json asks for where the caller says nothing.

    Temperature and top-p are not among them: the original always passes its own (0, greedy, and
    0.9). `repetition_penalty` holds even in greedy decoding and counts generated tokens only.
    """

    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What makes an array tree a model.

    Attributes:
      config: the network's shapes.
      image: geometry and normalisation of a frame.
      preset: the numeric quirks of reading media that the model was trained with.
      generation: decoding defaults.
      template: a chat template of `text/chat.py`, or "" for the tokenizer's own or its family's.
      tokenizer: sha256 over the tokenizer's files; "" for a model saved without one.
    """

    config: VLlama2Config
    image: ImageSpec
    preset: MediaPreset
    generation: GenerationDefaults
    template: str = ""
    tokenizer: str = ""

    def __post_init__(self):
        """Refuse rules that hear more of a video than the audio tower takes."""
        joint = self.preset.sound.joint_seconds
        if self.sound and joint > self.sound.seconds:
            raise ValueError(
                f"preset {self.preset.name!r} hears {joint:g} s of a video, the model takes "
                f"{self.sound.seconds:g}; use preset 'paper'"
            )

    @property
    def sound(self) -> SoundSpec | None:
        """How much of a sound is heard; None for a model that does not hear."""
        return SoundSpec(self.config.audio.seconds) if self.config.audio else None

    def with_preset(self, preset: str | MediaPreset | None) -> "ModelCard":
        """The same card under another media preset, by name or value; None changes nothing."""
        if preset is None:
            return self
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
            preset = PRESETS[preset]
        return dataclasses.replace(self, preset=preset)


def write_card(folder: Path, card: ModelCard) -> None:
    """Write `folder/model_card.json`."""
    data = {"format": FORMAT, "version": VERSION, **config_to_dict(card)}
    (folder / FILE_NAME).write_text(json.dumps(data, indent=2) + "\n")


def read_card(folder: Path) -> ModelCard:
    """Read `folder/model_card.json` strictly.

    Raises:
      CheckpointError: for a missing or broken card, another format or version, or fields that are
        unknown, missing or of another type.
    """
    path = folder / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {FILE_NAME}; not a saved model of {FORMAT}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); save the model again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not a model card of {FORMAT}")
    version = data.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this package reads {VERSION}; "
            "use the package version that wrote it, or convert again"
        )
    try:
        return config_from_dict(ModelCard, data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; convert or save the model again") from None
