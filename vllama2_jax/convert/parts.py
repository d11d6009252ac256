"""Read a tower or a language model from a repository of its own: what pre-training begins with."""

import dataclasses
from pathlib import Path

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.convert.beats import beats_config, open_beats
from vllama2_jax.convert.hf_config import (
    decoder_from_json,
    generation_defaults,
    image_spec,
    read_json,
    vision_from_json,
)
from vllama2_jax.convert.huggingface import open_tower, read_params, resolve
from vllama2_jax.convert.tensors import open_weights
from vllama2_jax.media.preset import REFERENCE
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.text import load_tokenizer


def read_vision(name: str, config: VLlama2Config, dtype, progress=None, layout=None) -> dict:
    """The tower's parameters.

    Args:
      name: a directory or hub id of a tower alone, or of a whole CLIP or SigLIP.
      config: of the network that the tower is for.
      dtype: of the parameters.
      progress: called with (tensors read, tensors in all).
      layout: how they are split over devices.

    Raises:
      CheckpointError: if the tower cannot be found, or is not that network's.
    """
    folder = resolve(name)
    data = read_json(folder / "config.json")
    sizes = {"mm_vision_tower": name, "vision_config": data.get("vision_config", data)}
    # Which of its layers is read is not the tower's to say.
    found = dataclasses.replace(vision_from_json(sizes), select_layer=config.vision.select_layer)
    _check_same(name, "tower", found, config.vision)
    params = read_params(
        open_tower(folder),
        config,
        name,
        dtype,
        scan_layers=True,
        part="vision",
        progress=progress,
        layout=layout,
    )
    return params["vision"]


def read_audio(path: str, config: VLlama2Config, dtype, progress=None, layout=None) -> dict:
    """The audio tower's parameters.

    Args:
      path: BEATs' own `.pt` file, or an `audio_tower.bin` of the original's training.
      config: of the network that the tower is for.
      dtype: of the parameters.
      progress: called with (tensors read, tensors in all).
      layout: how they are split over devices.

    Raises:
      CheckpointError: if the file cannot be read, or is not that network's tower.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; name BEATs' .pt file, or audio_tower.bin")
    source, settings = open_beats(Path(path))
    if settings is not None:
        # How much is heard is not the tower's to say.
        found = dataclasses.replace(beats_config(settings, path), seconds=config.audio.seconds)
        _check_same(path, "audio tower", found, config.audio)
    params = read_params(
        source,
        config,
        path,
        dtype,
        scan_layers=True,
        part="audio",
        progress=progress,
        layout=layout,
    )
    return params["audio"]


def read_decoder(name: str, config: VLlama2Config, dtype, progress=None, layout=None) -> dict:
    """A language model's parameters.

    Args:
      name: a directory or hub id of a language model.
      config: of the network that the language model is for.
      dtype: of the parameters.
      progress: called with (tensors read, tensors in all).
      layout: how they are split over devices.

    Raises:
      CheckpointError: if the language model cannot be found, or is not that network's.
    """
    folder = resolve(name)
    data = read_json(folder / "config.json")
    _check_same(name, "language model", decoder_from_json(data), config.decoder)
    params = read_params(
        open_weights(folder),
        config,
        name,
        dtype,
        scan_layers=True,
        part="decoder",
        progress=progress,
        layout=layout,
    )
    return params["decoder"]


def describe_decoder(name: str, config: VLlama2Config) -> tuple[ModelCard, Path]:
    """The card of a network around a language model, and the directory of its tokenizer.

    Args:
      name: a directory or hub id of a language model.
      config: of the network.

    Raises:
      CheckpointError: if the language model cannot be found.
    """
    folder = resolve(name)
    tokenizer = load_tokenizer(folder)
    data = read_json(folder / "config.json")
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=REFERENCE,
        generation=generation_defaults(folder, data, tokenizer.eos_id),
        tokenizer=tokenizer.fingerprint(),
    )
    return card, folder


def _check_same(name: str, what: str, found, wanted):
    """Refuse a part of other sizes; names and shapes of tensors alone do not show a rotary base."""
    differing = [
        f"{field} {getattr(found, field)} (wanted {getattr(wanted, field)})"
        for field in type(wanted).__dataclass_fields__
        if getattr(found, field) != getattr(wanted, field)
    ]
    if differing:
        raise CheckpointError(
            f"{name}: is not the {what} of this model: {', '.join(differing)}; name another, or "
            "start from another model"
        )
