"""Does a file hold all the bytes that its container speaks of?"""

import os

_MASTER = {b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"}  # EBML header, Segment
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def cut_short(path: str) -> str:
    """Why the file cannot be whole, in words; "" where nothing speaks against it.

    Looks at sizes only: boxes of MP4/MOV/AVIF, the segment of Matroska/WebM, the chunks of AVI,
    WAV and WebP.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        check = _check_of(file.read(12))
        return check(file, size) if check else ""


def is_known(path: str) -> bool:
    """Does the file begin as one of the containers that `cut_short` can judge?"""
    with open(path, "rb") as file:
        return _check_of(file.read(12)) is not None


def _check_of(head: bytes):
    if head[4:8] in _BOXES:
        return _cut_boxes
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _cut_matroska
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP", b"WAVE"):
        return _cut_riff
    return None


def _missing(size: int, promised: int) -> str:
    return f"is cut short: its container speaks of {promised} bytes, the file has {size}"


def _cut_boxes(file, size: int) -> str:
    place, kinds = 0, set()
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = size - place
        if length < 8:
            return "is damaged: a box of its container has no length"
        kinds.add(kind)
        place += length
    if place > size:
        return _missing(size, place)
    if not kinds & {b"moov", b"meta"}:  # a still picture has only a meta
        return "is cut short: the index (moov) is missing"
    return ""


def _cut_matroska(file, size: int) -> str:
    file.seek(0)
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(12)
        if head[:4] not in _MASTER or len(head) < 5 or head[4] == 0:
            return ""
        width = 9 - head[4].bit_length()
        value = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if value == (1 << 7 * width) - 1:
            return ""  # a live recording: its length was never written
        place += 4 + width + value
    return _missing(size, place) if place > size else ""


def _cut_riff(file, size: int) -> str:
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(8)
        if head[:4] != b"RIFF":
            return ""
        length = int.from_bytes(head[4:8], "little")
        if length in (0, 0xFFFFFFFF):
            return ""  # written as a stream: its length was never filled in
        place += 8 + length
    # A last byte that makes the length even is often left out.
    return _missing(size, place) if place > size + 1 else ""


def count_gif_frames(path: str) -> int | None:
    """Pictures up to the end mark of a GIF, whatever follows it; None where the mark is missing.

    A GIF does not say how long it is, and a reader takes a cut between two blocks for its end.
    """
    count = 0
    with open(path, "rb") as file:
        _skip_colours(file, file.read(13)[10:11])
        while mark := file.read(1):
            if mark == b";":
                return count
            if mark == b"!":  # an extension: its kind, then data
                file.read(1)
            elif mark == b",":  # a picture: place and flags, its colours, a code size, then data
                _skip_colours(file, file.read(9)[8:9])
                file.read(1)
                count += 1
            else:  # filling, which readers skip
                continue
            while (length := file.read(1)) and length != b"\0":
                file.seek(length[0], os.SEEK_CUR)
    return None


def _skip_colours(file, flags: bytes):
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)
