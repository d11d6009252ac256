"""Pack records and their media into ArrayRecord shards, for fast random reads of few large files.

    DST/records-00000.arrayrecord ...   one record's JSON per entry
    DST/media-00000.arrayrecord ...     one media file per entry, each distinct file once
    DST/pack.json                       the shards with their numbers of entries; written last

A packed record is the record's JSON with one more key, the numbers of the entries of its media.
`sources.PackedSource` reads it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

from array_record.python import array_record_module

from vllama2_jax.data.files import is_remote, local_media
from vllama2_jax.data.records import Record
from vllama2_jax.data.sources import FORMAT, MANIFEST, MEDIA_ENTRIES, VERSION, Source
from vllama2_jax.media import MediaError

_SHARD_BYTES = 1 << 30
# One entry per group, since reads are at random; media are compressed already.
_RECORD_OPTIONS, _MEDIA_OPTIONS = "group_size:1", "group_size:1,uncompressed"


def pack(
    source: Source,
    folder: str | os.PathLike,
    media_root: str | os.PathLike,
    *,
    leave_out: Collection[int] = (),
    shard_bytes: int = _SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write a pack.

    Args:
      source: the records.
      folder: where to, local; must not exist or be empty.
      media_root: folder that the records' paths are relative to.
      leave_out: numbers of records that are not packed, as a report's quarantine lists them.
      shard_bytes: a shard that has grown so large is the last one to be added to.
      progress: called with (records done, records in all).

    Returns:
      {"records", "media", "bytes"}: numbers of records and distinct media files, bytes of those.

    Raises:
      ValueError: for a record that cannot be used, or a folder that holds something.
      MediaError: for a media file that cannot be read, or a folder of frames.
    """
    if is_remote(os.fspath(folder)):
        raise ValueError(f"{folder}: packs are written locally; copy it to the bucket afterwards")
    folder, left_out = Path(folder), set(leave_out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder or empty it")
    if len(left_out & set(range(len(source)))) == len(source):
        raise ValueError(f"{source.path}: every record is left out; there is nothing to pack")
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, int] = {}
    digest = hashlib.sha256()
    with (
        contextlib.closing(_Shards(folder, "records", _RECORD_OPTIONS, shard_bytes)) as records,
        contextlib.closing(_Shards(folder, "media", _MEDIA_OPTIONS, shard_bytes)) as media,
    ):
        for number in range(len(source)):
            if number not in left_out:
                record = source[number]
                data = record.to_json()
                if record.media:
                    data[MEDIA_ENTRIES] = _add_media(
                        source, number, record, media_root, media, places
                    )
                entry = json.dumps(data, ensure_ascii=False).encode()
                digest.update(len(entry).to_bytes(8, "little") + entry)
                records.add(entry)
            if progress:
                progress(number + 1, len(source))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": digest.hexdigest(),
        "left_out": len(source) - records.total,
        "records": records.entries,
        "media": media.entries,
    }
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    unfinished.replace(folder / MANIFEST)
    return {"records": records.total, "media": media.total, "bytes": media.bytes}


def _add_media(source, number, record: Record, media_root, shards, places: dict[str, int]):
    """Entries of a record's files, adding those that are not there yet."""
    if not all(path in places for path in record.media.paths):
        with local_media(source, number, record.media, media_root) as found:
            found = [found] if isinstance(found, str) else found
            for path, place in zip(record.media.paths, found, strict=True):
                if path not in places:
                    places[path] = shards.add(_content(place))
    return [places[path] for path in record.media.paths]


def _content(path: str) -> bytes:
    if os.path.isdir(path):
        raise MediaError(
            path, "a folder cannot be packed", "list its frames, or make a video of it"
        )
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MediaError(path, "no such file", "check the path") from None
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})", "check its rights") from None


class _Shards:
    """Writes entries into one shard after the other.

    Attributes:
      entries: {file name: number of entries}.
      total, bytes: entries in all, and their bytes.
    """

    def __init__(self, folder: Path, name: str, options: str, shard_bytes: int):
        self._folder, self._name, self._options = folder, name, options
        self._limit, self._left, self._writer = shard_bytes, 0, None
        self.entries: dict[str, int] = {}
        self.total = self.bytes = 0

    def add(self, content: bytes) -> int:
        """Write an entry; returns its number."""
        if self._writer is None or self._left <= 0:
            self.close()
            self._file = f"{self._name}-{len(self.entries):05d}.arrayrecord"
            self._writer = array_record_module.ArrayRecordWriter(
                str(self._folder / self._file), self._options
            )
            self.entries[self._file], self._left = 0, self._limit
        self._writer.write(content)
        self._left -= len(content)
        self.entries[self._file] += 1
        self.bytes += len(content)
        self.total += 1
        return self.total - 1

    def close(self):
        """Finish the shard that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
