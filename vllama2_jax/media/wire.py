"""Messages between a process and its decoder: a JSON header and raw bytes, never a pickle."""

import json
import struct

import numpy as np

_LENGTHS = struct.Struct("<IQ")
PREFIX = _LENGTHS.size


def pack(header: dict, body_bytes: int = 0) -> bytes:
    """The bytes that announce a header and a body of so many bytes; the body follows apart."""
    text = json.dumps(header, default=_plain).encode()
    return _LENGTHS.pack(len(text), body_bytes) + text


def _plain(value):
    """Python's number for one of NumPy, which JSON does not know."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be sent to the decoder")


def unpack_prefix(prefix: bytes) -> tuple[int, int]:
    """Bytes of the header and of the body."""
    return _LENGTHS.unpack(prefix)


def read_header(source, prefix: bytes) -> dict:
    """The header of a message without a body, whose prefix was read already."""
    return json.loads(source.read(unpack_prefix(prefix)[0]))
