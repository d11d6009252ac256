"""Kaldi's log mel filter bank, which audio towers read instead of samples.

Formula: `compute-fbank-feats` of Kaldi at 16 kHz with windows of 25 ms every 10 ms and Povey's
window, without dither and energy, as torchaudio's `compliance.kaldi.fbank` computes it.
"""

import functools

import numpy as np

SAMPLE_RATE = 16_000
NUM_BINS = 128
_WINDOW, _HOP, _FFT = 400, 160, 512
FRAME_SECONDS = _HOP / SAMPLE_RATE
_LOWEST, _HIGHEST = 20.0, SAMPLE_RATE / 2
_PREEMPHASIS = 0.97
_FLOOR = np.finfo(np.float32).eps
_INT16 = 1 << 15  # Kaldi reads samples as 16-bit integers
# So many windows at a time stay in a core's cache between the passes over them, and OpenBLAS gives
# products as small to one thread: two of them, beside a step of training, wait for each other.
_BLOCK = 64


def num_frames(samples: int) -> int:
    """Windows that lie wholly inside so many samples."""
    return max(0, 1 + (samples - _WINDOW) // _HOP)


def num_samples(frames: int) -> int:
    """The fewest samples that hold so many windows."""
    return _WINDOW + (frames - 1) * _HOP


def filter_bank(samples: np.ndarray) -> np.ndarray:
    """Log energies of 128 mel bands, one row every 10 ms.

    The transform is computed in float64, whatever the samples are: bands beside a pure tone hold a
    millionth of its energy, of which float32 leaves little.

    Args:
      samples: float32 or float64 [n], mono, at 16 kHz, within [-1, 1].

    Returns:
      float32 [num_frames(n), 128]; digital silence is log(1.19e-7) = -15.94 throughout.

    Raises:
      ValueError: for samples of another form.
    """
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.float64):
        raise ValueError(f"samples are {samples.dtype} {samples.shape}, not float32 [n]")
    from scipy import fft  # late, since a pack is written where there is no SciPy (docs/tfio.md)

    count = num_frames(len(samples))
    out = np.empty((count, NUM_BINS), np.float32)
    padded = np.zeros((min(_BLOCK, count), _FFT))
    inside = padded[:, :_WINDOW]
    # Block by block from the samples on: whole signals would go through memory at every step.
    for begin in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - begin)
        part = samples[begin * _HOP : begin * _HOP + num_samples(rows)]
        if not part.any():  # as what short sound is filled with
            out[begin : begin + rows] = 0
            continue
        scaled = np.multiply(part, _INT16, dtype=np.float64)
        # Each window's first sample is weighed with zero, so that what stands in front of it, by
        # which pre-emphasis could differ from window to window, is of no account.
        sharp = scaled.copy()
        sharp[1:] -= _PREEMPHASIS * scaled[:-1]
        # Kaldi takes the mean away first; pre-emphasis leaves this much of it.
        mean = (1 - _PREEMPHASIS) * _windows(scaled).mean(axis=1, keepdims=True)
        np.subtract(_windows(sharp), mean, out=inside[:rows])
        inside[:rows] *= _window()
        parts = fft.rfft(padded[:rows]).view(np.float64).astype(np.float32)
        np.square(parts, out=parts)
        power = parts[:, 0::2] + parts[:, 1::2]
        for bins, bands, weights in _mel_bank():
            np.matmul(power[:, bins], weights, out=out[begin : begin + rows, bands])
    np.maximum(out, _FLOOR, out=out)
    return np.log(out, out=out)


def _windows(signal: np.ndarray) -> np.ndarray:
    """A view of a contiguous signal's windows, [count, 400]."""
    # NumPy's own views take longer to be made than their sums.
    shape, step = (num_frames(len(signal)), _WINDOW), signal.itemsize
    return np.ndarray(shape, signal.dtype, signal, strides=(_HOP * step, step))


@functools.cache
def _window() -> np.ndarray:
    """Povey's window: Hann's, a little flatter."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))) ** 0.85


@functools.cache
def _mel_bank() -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Triangles equally wide in mel: (bins of the spectrum, bands, float32 weights [bins, bands]).

    In parts, since most bins do not touch most bands. Built in float32, as torchaudio does.
    """

    def mel(frequency):
        return 1127 * np.log(1 + frequency / 700)

    lowest, highest = mel(_LOWEST), mel(_HIGHEST)
    step = (highest - lowest) / (NUM_BINS + 1)
    edges = np.float32(lowest) + np.arange(NUM_BINS + 2, dtype=np.float32) * np.float32(step)
    at = mel((SAMPLE_RATE / _FFT * np.arange(_FFT // 2)).astype(np.float32))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    slopes = np.minimum((at - left) / (centre - left), (right - at) / (right - centre))
    weights = np.maximum(slopes, 0)
    parts = []
    for bands in (slice(0, 48), slice(48, 88), slice(88, NUM_BINS)):
        used = np.flatnonzero(weights[:, bands].any(axis=1))
        bins = slice(int(used[0]), int(used[-1]) + 1)
        parts.append((bins, bands, np.ascontiguousarray(weights[bins, bands])))
    return tuple(parts)
