"""Seconds that callers give."""

import math

from vllama2_jax.media.errors import MediaError

_LONGEST = 1e12  # beyond, counting frames overflows


def seconds_of(name: str, value, source: str) -> float | None:
    """`start` or `end` as a number, None where none is given.

    Raises:
      MediaError: for what is no finite number of seconds.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not abs(seconds) < _LONGEST:
        raise MediaError(
            source, f"{name} is {value}, not a time", "give a finite number of seconds, or none"
        )
    return seconds
