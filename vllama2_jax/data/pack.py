"""Pack records and their media into ArrayRecord shards, for fast random reads of few large files.

    DST/records-00000.arrayrecord ...   one record's JSON per entry
    DST/media-00000.arrayrecord ...     one media file per entry, each distinct file once
    DST/pack.json                       the shards with their numbers of entries; written last

A packed record is the record's JSON with one more key, the numbers of the entries of its media.
`sources.PackedSource` reads it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
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
    left_out = set(leave_out) & set(range(len(source)))
    if len(left_out) == len(source):
        raise ValueError(f"{source.path}: every record is left out; there is nothing to pack")
    with PackWriter(folder, shard_bytes) as writer:
        for number in range(len(source)):
            if number not in left_out:
                record = source[number]
                if record.media:
                    _add_media(source, number, record, media_root, writer)
                writer.add(record.to_json(), record.media.paths if record.media else ())
            if progress:
                progress(number + 1, len(source))
        return writer.finish(left_out=len(left_out))


def _add_media(source, number, record: Record, media_root, writer: "PackWriter"):
    """Add a record's files, but for those that are there."""
    if not all(path in writer.places for path in record.media.paths):
        with local_media(source, number, record.media, media_root) as found:
            for path, place in zip(record.media.paths, found, strict=True):
                if path not in writer.places:
                    writer.add_media(path, _content(place))


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


class PackWriter:
    """Writes one pack, as a context manager; without `finish`, what it leaves is no pack.

    Attributes:
      places: {path: number of its entry} of the media added so far.
    """

    def __init__(self, folder: str | os.PathLike, shard_bytes: int = _SHARD_BYTES):
        """Make the folder.

        Raises:
          ValueError: if it is of a bucket, or holds something.
        """
        if is_remote(os.fspath(folder)):
            raise ValueError(
                f"{folder}: packs are written locally; copy it to the bucket afterwards"
            )
        self._folder = Path(folder)
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise ValueError(
                f"{folder}: exists and is not empty; choose another folder or empty it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._records = _Shards(self._folder, "records", _RECORD_OPTIONS, shard_bytes)
        self._media = _Shards(self._folder, "media", _MEDIA_OPTIONS, shard_bytes)
        self._digest = hashlib.sha256()
        self.places: dict[str, int] = {}

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def _close(self):
        try:
            self._records.close()
        finally:
            self._media.close()

    def add_media(self, path: str, content: bytes) -> None:
        """Add a media file, under the path by which records name it."""
        self._digest.update(hashlib.sha256(content).digest())
        self.places[path] = self._media.add(content)

    def add(self, data: dict, paths: Sequence[str] = ()) -> None:
        """Add a record.

        Args:
          data: its JSON.
          paths: of its media, in order, all of them added before.
        """
        if paths:
            data = data | {MEDIA_ENTRIES: [self.places[path] for path in paths]}
        entry = json.dumps(data, ensure_ascii=False).encode()
        self._digest.update(len(entry).to_bytes(8, "little") + entry)
        self._records.add(entry)

    def finish(self, left_out: int = 0) -> dict[str, int]:
        """Write the manifest, which makes the pack whole.

        Args:
          left_out: how many records did not come in, for the manifest to say.

        Returns:
          {"records", "media", "bytes"}: numbers of records and distinct media files, bytes of
          those.
        """
        self._close()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self._digest.hexdigest(),
            "left_out": left_out,
            "records": self._records.entries,
            "media": self._media.entries,
        }
        unfinished = self._folder / f"{MANIFEST}.unfinished"
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.replace(self._folder / MANIFEST)
        return {
            "records": self._records.total,
            "media": self._media.total,
            "bytes": self._media.bytes,
        }


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
