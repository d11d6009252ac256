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
SILENCE = np.log(_FLOOR)  # of every band; float32
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


def num_begun(samples: int) -> int:
    """Windows that begin inside so many samples; those behind them hold none."""
    return -(-samples // _HOP)


def filter_bank(samples: np.ndarray, frames: int | None = None) -> np.ndarray:
    """Log energies of 128 mel bands, one row every 10 ms.

    The transform is computed in float64, whatever the samples are: bands beside a pure tone hold a
    millionth of its energy, of which float32 leaves little.

    Args:
      samples: float32 or float64 [n], mono, at 16 kHz, within [-1, 1].
      frames: rows to give, with silence behind the samples; by default `num_frames(n)`.

    Returns:
      float32 [frames, 128]; digital silence is `SILENCE` throughout.

    Raises:
      ValueError: for samples of another form.
    """
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.float64):
        raise ValueError(f"samples are {samples.dtype} {samples.shape}, not float32 [n]")
    frames = num_frames(len(samples)) if frames is None else frames
    out = np.empty((frames, NUM_BINS), np.float32)
    block = _Block(min(_BLOCK, frames))
    with np.errstate():  # which ends the setting below
        # NumPy would copy windows into a buffer of its own until that is full, which takes longer
        # than the sums; into one as short as this it copies none.
        np.setbufsize(_FFT)
        # Block by block from the samples on: whole signals would go through memory at every step.
        for begin in range(0, frames, _BLOCK):
            bank = out[begin : begin + _BLOCK]
            part = samples[begin * _HOP : begin * _HOP + num_samples(len(bank))]
            if part.any():
                block.fill(bank, part)
            else:  # as what short sound is filled with
                bank[:] = SILENCE
    return out


class _Block:
    """The memory of a block of windows, used for one after the other."""

    def __init__(self, rows: int):
        """For so many windows at most."""
        self._signal = np.empty(num_samples(rows))
        self._padded = np.zeros((rows, _FFT))
        self._spectrum = np.empty((rows, _FFT // 2 + 1), np.complex128)
        self._squares = np.empty((rows, _FFT + 2), np.float32)

    def fill(self, bank: np.ndarray, samples: np.ndarray):
        """Compute the rows of a bank.

        Args:
          bank: float32 [rows, 128], written.
          samples: float32 or float64, `num_samples(rows)` or fewer, with silence behind them.
        """
        rows = len(bank)
        padded, spectrum, squares = self._padded[:rows], self._spectrum[:rows], self._squares[:rows]
        inside, signal = padded[:, :_WINDOW], self._signal[: num_samples(rows)]
        signal[: len(samples)], signal[len(samples) :] = samples, 0
        # Each window's first sample is weighed with zero, so that what stands in front of it, by
        # which pre-emphasis could differ from window to window, is of no account.
        sharp = _PREEMPHASIS * signal
        np.subtract(signal[1:], sharp[:-1], out=sharp[1:])
        # Kaldi takes the mean away first; pre-emphasis leaves this much of it.
        mean = (1 - _PREEMPHASIS) * _windows(signal).mean(axis=1, keepdims=True)
        np.subtract(_windows(sharp), mean, out=inside)
        np.multiply(inside, _window(), out=inside)
        np.fft.rfft(padded, out=spectrum)
        squares[:] = spectrum.view(np.float64)
        np.square(squares, out=squares)
        power = squares[:, 0::2] + squares[:, 1::2]
        for bins, bands, weights in _mel_bank():
            np.matmul(power[:, bins], weights, out=bank[:, bands])
        np.maximum(bank, _FLOOR, out=bank)
        np.log(bank, out=bank)


def _windows(signal: np.ndarray) -> np.ndarray:
    """A view of a contiguous signal's windows, [count, 400]."""
    # NumPy's own views take longer to be made than their sums.
    shape, step = (num_frames(len(signal)), _WINDOW), signal.itemsize
    return np.ndarray(shape, signal.dtype, signal, strides=(_HOP * step, step))


@functools.cache
def _window() -> np.ndarray:
    """Povey's window, which is Hann's, a little flatter; of samples as Kaldi reads them."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))
    return _INT16 * hann**0.85


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
