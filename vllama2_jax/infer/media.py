"""Media on their way to the decoder: read, and run through towers and connectors."""

import dataclasses
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.infer.generate import Generator
from vllama2_jax.media import (
    Clip,
    Limits,
    MediaError,
    Sound,
    load_clip,
    load_sound,
    media_kind,
)

MODALITIES = ("auto", "video", "image", "audio", "av", "text")
# What a prompt calls them: pictures with sound have the place of a video.
_PLACEHOLDERS = {"video": "video", "image": "image", "audio": "audio", "av": "video"}


@dataclasses.dataclass(frozen=True)
class ReadMedia:
    """Media that were read before, as the pipeline of a training run reads them.

    Attributes:
      clip: pictures, or None.
      bank: the filter bank of a sound, float32 [frames, 128], or None.
    """

    clip: Clip | None = None
    bank: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class EncodedMedia:
    """Media that went through towers and connectors.

    Attributes:
      modality: "video", "image", "audio", "av" (pictures and sound) or "text" (no media).
      tokens: [media_tokens, width], what the decoder sees, pictures before sound; None for text.
      clip: the frames that the tower looked at; None where there are none.
      sound: what the tower heard; None where nothing was to be heard.
    """

    modality: str
    tokens: jax.Array | None = None
    clip: Clip | None = None
    sound: Sound | None = None

    @property
    def placeholder(self) -> str:
        """The media's kind in a prompt: "video", "image", "audio" or "text"."""
        return _PLACEHOLDERS.get(self.modality, "text")


def encode_media(
    generator: Generator,
    card: ModelCard,
    limits: Limits,
    media,
    modality: str = "auto",
    start: float | None = None,
    end: float | None = None,
    num_frames: int | None = None,
    seed: int = 0,
) -> EncodedMedia:
    """Decode media and run towers and connectors.

    Args:
      generator: the network and its parameters.
      card: how media are read.
      limits: bounds of the read.
      media, modality, start, end, num_frames: as in `Model.ask`.
      seed: of a stretch of sound at random, where the card's preset hears one.

    Raises:
      MediaError: if the media cannot be read as asked.
      ValueError: for a modality that is unknown, or that the model or the media do not have.
    """
    if modality not in MODALITIES:
        raise ValueError(f"unknown modality {modality!r}; known: {', '.join(MODALITIES)}")
    if modality in ("audio", "av") and card.sound is None:
        raise ValueError(
            f"modality {modality!r}: the model {card.config.name} does not hear; "
            "use one with sound, such as 2.1-7B-AV"
        )
    if isinstance(media, ReadMedia):
        return _encode(generator, card, media.clip, media.bank)
    if media is None or modality == "text":
        if media is None and modality not in ("auto", "text"):
            raise ValueError(f"modality {modality!r} needs media; none was given")
        return EncodedMedia("text")
    if modality in ("auto", "av", "audio"):
        modality = _choose(card, media, modality, limits)
    clip = sound = None
    if modality != "audio":
        clip = load_clip(
            media,
            spec=card.image,
            num_frames=card.config.num_frames if num_frames is None else num_frames,
            preset=card.preset,
            start=start,
            end=end,
            limits=limits,
        )
        found = "image" if clip.is_image else "video"
        if modality in ("video", "image") and modality != found:
            raise ValueError(f"{clip.source} holds {found}, not {modality}; use modality '{found}'")
    if modality in ("audio", "av"):
        sound = load_sound(
            media,
            spec=card.sound,
            preset=card.preset,
            joint=modality == "av",
            start=start,
            end=end,
            seed=seed,
            silence=modality == "av",
            limits=limits,
        )
        _tell(sound)
    encoded = _encode(generator, card, clip, None if sound is None else sound.bank)
    return dataclasses.replace(encoded, sound=sound)


def _encode(generator: Generator, card: ModelCard, clip, bank) -> EncodedMedia:
    """Tokens of pictures, of sound behind them, or of neither."""
    modality, tokens = "text", []
    if clip is not None:
        modality, steps = "image" if clip.is_image else "video", len(clip.frame_index)
        card.config.num_media_tokens(steps)  # refuses too few frames, in words
        frames = _static_frames(clip, steps)
        tokens.append(generator.programs.encode(generator.params, *frames)[0])
    if bank is not None:
        modality = "audio" if clip is None else "av"
        audio = jnp.asarray(bank[None, None])
        tokens.append(generator.programs.hear(generator.params, audio)[0])
    return EncodedMedia(modality, jnp.concatenate(tokens) if tokens else None, clip)


def _choose(card: ModelCard, media, modality: str, limits: Limits) -> str:
    """What "auto" means for these media; "av" and "audio" are checked against them.

    A model that hears takes a video with its sound, as the original's does, if it has a track. What
    is in memory, a GIF or a folder has none.
    """
    if card.sound is None:
        return "auto"
    kind = media_kind(media, limits) if isinstance(media, str | os.PathLike) else None
    if modality == "auto":
        return kind if kind in ("audio", "av") else "auto"
    if kind not in ("audio", "av", "video"):
        what = os.fspath(media) if kind else "in memory"
        raise MediaError(
            what, "has no sound track to hear", "give the path of a video or sound file"
        )
    if modality == "av" and kind == "audio":
        raise MediaError(os.fspath(media), "holds sound but no video", "use modality 'audio'")
    return modality


def _tell(sound: Sound) -> None:
    """Say where what is heard is not what the file holds."""
    if not sound.heard:
        warnings.warn(f"{sound.source}: has no sound track; silence is heard", stacklevel=2)
    elif len(sound.heard) == 1:
        ((first, last),) = sound.heard
        whole = last - first
        if whole < sound.seconds - 0.01:
            warnings.warn(
                f"{sound.source}: of {sound.seconds:.1f} s of sound, {whole:.1f} s from "
                f"{first:.1f} s are heard",
                stacklevel=2,
            )


def _static_frames(clip: Clip, steps: int):
    """uint8 [1, F, S, S, 3] and int32 [1, 1, T]; F is 1 for images and T otherwise."""
    frames = clip.frames
    if 1 < len(frames) < steps:
        # A short video repeats frames; its own count would be one more program to compile.
        frames = np.concatenate([frames, np.repeat(frames[-1:], steps - len(frames), axis=0)])
    return jnp.asarray(frames[None]), jnp.asarray(clip.frame_index[None, None], jnp.int32)
