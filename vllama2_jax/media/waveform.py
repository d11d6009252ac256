"""Samples -> the stretch of sound that an audio tower hears. Plain NumPy, no files."""

import fractions
import math

import numpy as np

from vllama2_jax.media.preset import PIECE_SECONDS


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample by cutting or filling the spectrum, as librosa's type "fft" does.

    Args:
      samples: float [n].
      rate: samples per second.
      new_rate: wanted.

    Returns:
      float64 [ceil(n * new_rate / rate)].
    """
    samples = np.asarray(samples, np.float64)
    if rate == new_rate or not len(samples):
        return samples
    from scipy import signal  # takes half a second to import

    return signal.resample(samples, math.ceil(len(samples) * new_rate / rate))


def fit(samples: np.ndarray, count: int) -> np.ndarray:
    """The first `count` samples, with silence behind them where there are fewer."""
    fitted = np.zeros(count, samples.dtype)
    fitted[: len(samples)] = samples[:count]
    return fitted


def piece_bounds(count: int, rate: int, pieces: int) -> list[tuple[int, int]]:
    """Where pieces of two seconds lie that cover a track evenly from its start to its end.

    In exact fractions, cut to whole samples, like the original's (pytorchvideo's
    `ConstantClipsPerVideoSampler`). A track of two seconds or less is each of its pieces.

    Args:
      count: samples of the track.
      rate: samples per second.
      pieces: how many.

    Returns:
      `pieces` pairs (first sample, one behind the last).
    """
    seconds = fractions.Fraction(count, rate)
    step = max(seconds - PIECE_SECONDS, 0) / max(pieces - 1, 1)
    starts = [step * i for i in range(pieces)]
    return [
        (int(start * rate), min(int((start + PIECE_SECONDS) * rate), count)) for start in starts
    ]
