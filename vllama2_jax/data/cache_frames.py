"""Decode the media of records once and keep their frames, for `frame_cache.CachedClipReader`."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module

from vllama2_jax.data.assemble import ClipReader
from vllama2_jax.data.files import is_remote
from vllama2_jax.data.frame_cache import MANIFEST, cache_key, file_stamps, to_entry
from vllama2_jax.data.pipeline import read_ahead
from vllama2_jax.data.records import Media, RecordError
from vllama2_jax.data.sources import Source

_SHARD_BYTES = 1 << 30
_OPTIONS = "group_size:1,uncompressed"  # reads are at random
_BUFFER = 2


class Cached(NamedTuple):
    """What `cache_frames` has done: clips kept, their bytes, and why others could not be."""

    clips: int
    bytes: int
    bad: tuple[str, ...]


def cache_frames(
    source: Source,
    reader: ClipReader,
    folder: str | os.PathLike,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Cached:
    """Decode the media of all records, each distinct clip once, and keep their frames.

    Args:
      source: the records.
      reader: how they are read.
      folder: where to, local; must not exist or be empty.
      workers: processes that decode; 0 is a thread of this one (see `pipeline.Feed`).
      progress: called with (clips done, clips in all).

    Raises:
      ValueError: for a folder that holds something, a source that fails as a whole, or too little
        shared memory for workers.
    """
    if is_remote(os.fspath(folder)):
        raise ValueError(f"{folder}: frames are kept locally; copy them to the bucket afterwards")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    clips = _Clips(source, reader)
    clip_bytes = reader.num_frames * 3 * reader.spec.size**2
    per_shard = max(_SHARD_BYTES // clip_bytes, 1)
    shards: dict[str, int] = {}
    kept, bad, size = [], [], 0
    dataset = grain.MapDataset.source(clips)
    with (
        contextlib.closing(read_ahead(dataset, workers, _BUFFER, clip_bytes)) as found,
        contextlib.ExitStack() as shard,
    ):
        for done, (entry, about, cause) in enumerate(found, start=1):
            if cause:
                bad.append(cause)
            else:
                name = f"frames-{len(kept) // per_shard:05d}.arrayrecord"
                if name not in shards:
                    shard.close()
                    path, shards[name] = str(folder / name), 0
                    writer = array_record_module.ArrayRecordWriter(path, _OPTIONS)
                    shard.callback(writer.close)
                writer.write(entry.tobytes())
                shards[name] += 1
                kept.append(json.loads(about))
                size += len(entry)
            if progress:
                progress(done, len(clips))
    manifest = {**cache_key(source, reader), "shards": shards, "clips": kept}
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    unfinished.replace(folder / MANIFEST)
    return Cached(len(kept), size, tuple(bad))


class _Clips:
    """The distinct clips of a source, as Grain's `MapDataset.source` takes them.

    Each is (its entry, uint8 [bytes]; its line in the manifest; why it cannot be kept, or "").
    """

    def __init__(self, source: Source, reader: ClipReader):
        self._source, self._reader = source, reader
        first: dict[Media, int] = {}
        for number in range(len(source)):
            with contextlib.suppress(RecordError):  # the pipeline names it when its turn comes
                media = source[number].media
                if media is not None and media.seen:
                    first.setdefault(media, number)
        self._numbers = list(first.values())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> tuple[np.ndarray, str, str]:
        number = self._numbers[place]
        media = self._source[number].media
        try:
            # Before it is read: a file that changes meanwhile must not be taken for the one kept.
            stamps = file_stamps(self._source, media, self._reader.root)
            clip = self._reader(self._source, number, media)
        except ValueError as error:
            return np.zeros(0, np.uint8), "", str(error)
        about = json.dumps({**dataclasses.asdict(media), "files": stamps})
        return np.frombuffer(to_entry(clip), np.uint8), about, ""
