"""A few static lengths, so that each compiles once."""

_SMALLEST = 64


def bucket(length: int) -> int:
    """The smallest bucket that holds `length`: four per octave, so at most a quarter is padding.

    64, 80, 96, 112, 128, 160 ... 1024, 1280, 1536, 1792, 2048 ...
    """
    if length <= _SMALLEST:
        return _SMALLEST
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step
