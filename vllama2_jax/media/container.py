"""Does a file hold all the bytes that its container speaks of?"""

import os

_MASTER = {b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"}  # EBML header, Segment


def cut_short(path: str) -> str:
    """Why the file cannot be whole, in words; "" where nothing speaks against it.

    Looks at sizes only: boxes of MP4/MOV, the segment of Matroska/WebM, the chunks of AVI.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _cut_boxes(file, size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _cut_matroska(file, size)
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            return _cut_riff(file, size)
    return ""


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
    if b"moov" not in kinds:
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
        place += 8 + int.from_bytes(head[4:8], "little")
    return _missing(size, place) if place > size else ""
