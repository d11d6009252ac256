"""Frames of small sets, decoded once: later epochs and runs read them from ArrayRecord shards.

    FOLDER/frames-00000.arrayrecord ...   one clip per entry: a JSON header and its uint8 frames
    FOLDER/frames.json                    what they are of, and the shards; written last

`cache_frames.py` writes them, as they are, since frames of footage hardly become smaller without
loss. A cache changes how fast a run reads and nothing else: what is not in it, has changed since or
is damaged is decoded as if there were none, with the same errors.
"""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from vllama2_jax.data.assemble import ClipReader
from vllama2_jax.data.examples import Subset
from vllama2_jax.data.files import is_remote, read_bytes
from vllama2_jax.data.records import Media
from vllama2_jax.data.sources import PackedSource, Source
from vllama2_jax.media import Clip, wire

MANIFEST = "frames.json"
_FORMAT, _VERSION = "vllama2_jax frames", 1


class CachedClipReader:
    """Reads the clips of one source like `ClipReader`, from kept frames where there are any.

    What it has read of the folder does not travel to workers; each reads it for itself.
    """

    def __init__(self, folder: str | os.PathLike, source: Source | Subset, reader: ClipReader):
        """Open a cache.

        Args:
          folder: of `cache_frames`.
          source: the records that it was made of, or some of them.
          reader: reads what is not kept.

        Raises:
          ValueError: for a folder that holds no finished cache, or one of other records or of
            frames prepared in another way.
        """
        self._folder, self._reader = os.fspath(folder), reader
        self._key = cache_key(_whole(source), reader)
        self._open()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_places": None, "_entries": None}

    def __call__(self, source: Any, number: int, media: Media) -> Clip:
        """The clip of a record, as `ClipReader` gives it but for its `source`: the path as written.

        Raises:
          MediaError: naming the file, what is wrong and what to do.
        """
        if self._places is None:
            self._open()
        entry, kept = self._places.get(media, (None, None))
        if entry is not None and kept == file_stamps(source, media, self._reader.root):
            try:
                return _from_entry(self._entries[entry], media)
            except Exception as error:  # the library raises its own kinds for a damaged shard
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"{self._folder}: the kept frames of {media.paths[0]} cannot be read "
                    f"({reason}), so it is decoded again; make the cache anew",
                    stacklevel=2,
                )
        return self._reader(source, number, media)

    def _open(self):
        try:
            manifest = json.loads(read_bytes(f"{self._folder}/{MANIFEST}"))
            found = {name: manifest[name] for name in self._key}
            self._places = {
                _media(clip): (entry, clip["files"]) for entry, clip in enumerate(manifest["clips"])
            }
            # "FILE[0:N]" is ArrayRecord's own way to say how many.
            shards = [f"{self._folder}/{name}[0:{n}]" for name, n in manifest["shards"].items()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self._folder}: holds no finished frame cache ({reason}); make it anew"
            ) from None
        other = [name for name, value in self._key.items() if found[name] != value]
        if other:
            raise ValueError(
                f"{self._folder}: its frames are of another {' and '.join(other)} than this run's; "
                "make the cache anew, or leave it out"
            )
        self._entries = ArrayRecordDataSource(shards) if shards else None


def to_entry(clip: Clip) -> bytes:
    """A clip as an entry of a shard."""
    header = {
        "shape": clip.frames.shape,
        "frame_index": clip.frame_index.tolist(),
        "times": clip.times.tolist(),
        "is_image": clip.is_image,
    }
    return wire.pack(header, clip.frames.nbytes) + clip.frames.tobytes()


def _from_entry(entry: bytes, media: Media) -> Clip:
    header_bytes, body_bytes = wire.unpack_prefix(entry[: wire.PREFIX])
    begin = wire.PREFIX + header_bytes
    header = json.loads(entry[wire.PREFIX : begin])
    if not len(entry) - begin == body_bytes == math.prod(header["shape"]):
        raise ValueError("its length is not the one that it names")
    return Clip(
        np.frombuffer(entry, np.uint8, offset=begin).reshape(header["shape"]),
        np.asarray(header["frame_index"], np.int32),
        np.asarray(header["times"], np.float64),
        media.paths[0],
        header["is_image"],
    )


def _whole(source):
    """The source itself; of a subset the one that it is of, which has the cache."""
    return source.source if isinstance(source, Subset) else source


def cache_key(source: Source, reader: ClipReader) -> dict:
    """All but the files that decides what is kept, as JSON gives it back."""
    key = {
        "format": [_FORMAT, _VERSION],
        "records": source.fingerprint,
        "spec": dataclasses.asdict(reader.spec),
        "num_frames": reader.num_frames,
        # How sound is read decides no frame.
        "preset": {k: v for k, v in dataclasses.asdict(reader.preset).items() if k != "sound"},
    }
    return json.loads(json.dumps(key))


def _media(clip: dict) -> Media:
    source = clip["source"]
    source = source if isinstance(source, str) else tuple(source)
    return Media(clip["kind"], source, clip["start"], clip["end"], clip.get("sound"))


def file_stamps(source, media: Media, root: str) -> list | None:
    """[name, bytes, time of change] of each file of a record's media; of a folder, of all in it.

    None for media inside the source, which its fingerprint stands for.
    """
    if isinstance(_whole(source), PackedSource):
        return None
    found = []
    for path in media.paths:
        # What cannot be looked at has no stamp, and the reader says what is wrong with it.
        with contextlib.suppress(OSError, ImportError):
            found += _remote_stamps(root, path) if is_remote(root) else _local_stamps(root, path)
    return found


def _local_stamps(root: str, path: str) -> list:
    place = Path(root, path)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    status = [(file.name, file.stat()) for file in files]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in status]


def _remote_stamps(root: str, path: str) -> list:
    file = epath.Path(root) / path
    status = file.stat()
    return [[file.name, status.length, status.mtime]]
