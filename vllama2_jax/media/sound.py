"""The sound of a file as the filter bank that a tower hears: `load_sound`."""

import dataclasses
import os

import numpy as np

from vllama2_jax.media.errors import Limits
from vllama2_jax.media.fbank import NUM_BINS, SAMPLE_RATE, SILENCE, num_frames
from vllama2_jax.media.guard import DECODER
from vllama2_jax.media.preset import REFERENCE, MediaPreset
from vllama2_jax.media.times import seconds_of


@dataclasses.dataclass(frozen=True)
class SoundSpec:
    """What an audio tower takes.

    Attributes:
      seconds: of sound; shorter sound is filled with silence, longer cut.
    """

    seconds: float = 30.0

    @property
    def num_frames(self) -> int:
        """Frames of the filter bank (2,998 for 30 s)."""
        return num_frames(round(self.seconds * SAMPLE_RATE))


@dataclasses.dataclass(frozen=True)
class Sound:
    """What a tower hears.

    Attributes:
      bank: float32 [frames, 128], log energies of mel bands (`fbank.filter_bank`).
      heard: stretches of the track (start, end) in seconds, one after the other in `bank`; none for
        the silence that stands for a missing track.
      seconds: length of the track; 0 where it is missing.
      source: the path.
    """

    bank: np.ndarray
    heard: tuple[tuple[float, float], ...]
    seconds: float
    source: str


def load_sound(
    path,
    *,
    spec: SoundSpec,
    preset: MediaPreset = REFERENCE,
    joint: bool = False,
    start: float | None = None,
    end: float | None = None,
    seed: int = 0,
    silence: bool = False,
    limits: Limits | None = None,
) -> Sound:
    """Read the sound of a file and prepare it for a tower.

    Args:
      path: of a sound file, or of a video.
      spec: the tower's input.
      preset: the numeric quirks (its `sound`).
      joint: whether it is heard beside the file's pictures.
      start, end: seconds of the part to hear.
      seed: of a crop at random, where the preset says so.
      silence: whether a file without sound is heard as silence; else that is an error.
      limits: bounds of the read.

    Raises:
      MediaError: naming the file, what is wrong and what to do.
    """
    path = os.fspath(path)
    result, heard = DECODER.ask(
        "sound",
        [path],
        limits or Limits(),
        seconds=spec.seconds,
        rules=dataclasses.asdict(preset.sound),
        joint=joint,
        start=seconds_of("start", start, path),
        end=seconds_of("end", end, path),
        seed=seed,
        silence=silence,
    )
    kind, frames = np.dtype(np.float32), 0
    if preset.sound.bfloat16:
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    bank = np.empty((spec.num_frames, NUM_BINS), np.float32)
    if heard is not None:
        frames = len(heard)
        bank[:frames] = heard.view(kind)
    bank[frames:] = SILENCE.astype(kind)
    return Sound(bank, tuple(map(tuple, result["heard"])), result["seconds"], path)
