"""Sounds decoded and resampled by tensorflow-io; only its environment can import this."""

import functools
import math
import struct
import tempfile

import numpy as np
import tensorflow as tf
import tensorflow_io as tfio

from vllama2_jax.data.tfio_records import RATE

# What 1.0 is in samples of each type; unsigned ones have their zero at 128.
_FULL_SCALE = {"uint8": 128.0, "int16": 32768.0, "int32": 2147483648.0, "float32": 1.0}
_LOWEST, _HIGHEST = 1_000, 768_000  # hertz; outside, a header is damaged rather than special
_TAPS = 64  # of the filter of tfio's resampler (Speex's, quality 4) where the rate does not fall


def decode(content: bytes) -> tuple[np.ndarray, int]:
    """Decode a wav (8, 16, 24, 32 bits), flac, mp3 or Ogg Vorbis file.

    Returns:
      float32 [samples, channels] in [-1, 1], and the rate in hertz.

    Raises:
      ValueError: for any other kind of file, or a damaged one.
    """
    with tempfile.NamedTemporaryFile() as file:  # tfio tells the rate of files only
        file.write(content)
        file.flush()
        try:
            sound = tfio.audio.AudioIOTensor(file.name)
            samples, rate = sound.to_tensor().numpy(), int(sound.rate)
        except tf.errors.OpError as error:
            reason = error.message.replace(file.name, "the file").partition(" [Op:")[0]
            reason = reason.rpartition("}} ")[2]  # in front of it stands the graph's node
            raise ValueError(
                f"the sound cannot be decoded ({reason}); wav, flac, mp3 and Ogg Vorbis can"
            ) from None
    if _is_whole_32(content):  # tfio takes all 32 bits for floats
        samples = samples.view(np.int32)
    zero = 128.0 if samples.dtype == np.uint8 else 0.0
    return ((samples - zero) / _FULL_SCALE[samples.dtype.name]).astype(np.float32), rate


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Bring one channel to 16 kHz.

    tfio's resampler gives what it has when the input ends, delayed by half its filter. Zeros behind
    make it give the rest. Zeros in front make the delay a whole number of output samples, which are
    dropped: sample k of the result is the sound at k / 16000 seconds.

    Args:
      samples: float32 [samples].
      rate: theirs, in hertz.

    Returns:
      float32 [ceil(samples * 16000 / rate)].

    Raises:
      ValueError: for a rate that no sound has.
    """
    if not _LOWEST <= rate <= _HIGHEST:
        raise ValueError(f"the sound has {rate} Hz, not between {_LOWEST} and {_HIGHEST}")
    if rate == RATE:
        return samples
    taps = _TAPS if rate < RATE else ((_TAPS * rate // RATE - 1) & ~7) + 8
    period = rate // math.gcd(rate, RATE)  # input samples between two that meet an output sample
    lead = -(taps // 2) % period
    delay = (taps // 2 + lead) * RATE // rate
    padded = np.pad(samples, (lead, taps + period))
    wanted = -(-len(samples) * RATE // rate)
    return _resampler()(padded[:, None], rate).numpy()[delay : delay + wanted, 0]


@functools.cache
def _resampler():
    """`tfio.audio.resample` as one graph: called as it is, it builds one for every sound."""
    tf.get_logger().setLevel("ERROR")  # it warns that the graph holds a loop

    @tf.function(
        input_signature=[tf.TensorSpec([None, 1], tf.float32), tf.TensorSpec([], tf.int64)]
    )
    def run(samples, rate):
        return tfio.audio.resample(samples, rate, RATE)

    return run


def _is_whole_32(content: bytes) -> bool:
    """Whether a file is a wav of 32-bit whole numbers, by its chunk `fmt `."""
    place = 12
    while content[:4] == b"RIFF" and place + 24 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if name == b"fmt ":
            kind, bits = struct.unpack_from("<H12xH", content, place + 8)
            if kind == 0xFFFE and place + 34 <= len(content):  # the kind stands further behind
                (kind,) = struct.unpack_from("<H", content, place + 32)
            return (kind, bits) == (1, 32)
        place += 8 + size + size % 2
    return False
