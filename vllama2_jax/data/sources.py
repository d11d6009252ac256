"""Where records come from: JSON, JSON Lines and ArrayRecord shards behind one interface.

Files may be local or in a bucket (`gs://`). A source holds no open file and no record: its state is
a few numbers per record, so that it travels cheaply into Grain's workers.
"""

import abc
import hashlib
import json
import operator
import os
import re
from pathlib import Path

import numpy as np

from vllama2_jax.data.files import is_remote, read_bytes
from vllama2_jax.data.records import Record, RecordError, parse_record

MANIFEST = "pack.json"
FORMAT, VERSION = "vllama2_jax data pack", 1
MEDIA_ENTRIES = "media_entries"  # key of a packed record: which entries hold its media

_skip_space = re.compile(r"[ \t\r\n]*").match


class Source(abc.ABC):
    """Records by number, as Grain's `MapDataset.source` takes them.

    Attributes:
      path: the file or folder, as errors name it.
      fingerprint: sha256 (hex) that changes with the records.
    """

    path: str
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abc.abstractmethod
    def _text(self, number: int) -> bytes:
        """A record's JSON."""

    def read(self, number: int) -> dict:
        """A record's JSON, unchecked.

        Raises:
          IndexError: for a number that is not in `range(len(self))`.
          RecordError: for text that is not JSON.
        """
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: no record {number}; it holds {len(self)}")
        text = self._text(number)
        try:
            return json.loads(text)
        except ValueError as error:
            raise RecordError(self.path, number, "", f"is not JSON ({error})") from None

    def __getitem__(self, number: int) -> Record:
        """One record.

        Raises:
          IndexError: for a number that is not in `range(len(self))`.
          RecordError: for a record that cannot be used.
        """
        return parse_record(self.read(number), self.path, operator.index(number))

    def media_bytes(self, number: int) -> tuple[bytes, ...] | None:
        """Contents of a record's media files, where the source holds them, else None."""
        return None


class JsonSource(Source):
    """Records of a JSON list or of JSON Lines, found by their places in the file."""

    def __init__(self, path: str):
        """Read the file once, to find its records.

        Raises:
          ValueError: for a file that cannot be read, or holds no list of records.
        """
        self.path = path
        data = read_bytes(path)
        self._stamp = None if is_remote(path) else _stamp(os.stat(path))
        self._content = data if is_remote(path) else None
        self.fingerprint = hashlib.sha256(data).hexdigest()
        if path.endswith(".jsonl"):
            spans = _line_spans(data)
        else:
            spans = _list_spans(data, path)
        if not spans:
            raise ValueError(f"{path}: holds no records")
        self._spans = np.asarray(spans, np.int64)  # [records, 2], bytes: begin, end

    def __len__(self) -> int:
        return len(self._spans)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_content": None}

    def _text(self, number: int) -> bytes:
        begin, end = self._spans[number].tolist()
        if self._stamp is None:
            if self._content is None:  # in a worker: fetched again, once
                self._content = read_bytes(self.path)
            return self._content[begin:end]
        try:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self._stamp:
                    raise ValueError(f"{self.path}: has changed since it was opened; start again")
                file.seek(begin)
                return file.read(end - begin)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror})") from None


class PackedSource(Source):
    """ArrayRecord shards that `data pack` wrote, media inside."""

    def __init__(self, path: str):
        """Read the manifest and the shards' sizes.

        Raises:
          ValueError: for a folder that is no finished pack, or shards that do not fit it.
        """
        self.path = path
        try:
            manifest = json.loads(read_bytes(f"{path}/{MANIFEST}"))
            if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {manifest['format']} {manifest['version']} is not known")
            self.fingerprint = manifest["fingerprint"]
            self._records = self._open(manifest["records"])
            self._media = self._open(manifest["media"])
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            if not is_remote(path) and not list(Path(path).glob("*.arrayrecord")):
                raise ValueError(
                    f"{path}: no .json list, .jsonl file or finished pack; of a folder of media, "
                    "give the list of records that names them, and the folder as media root"
                ) from None
            raise ValueError(f"{path}: not a finished pack ({reason}); pack it again") from None
        if self._records is None:
            raise ValueError(f"{path}: holds no records")

    def _open(self, shards: dict[str, int]):
        """Random access to all entries of {file name: number of entries}; None if there are none.

        The numbers spare the opening of each shard, which a pod's hosts would all do.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if not shards:
            return None
        # "FILE[0:N]" is ArrayRecord's own way to say how many.
        return ArrayRecordDataSource([f"{self.path}/{name}[0:{n}]" for name, n in shards.items()])

    def __len__(self) -> int:
        return len(self._records)

    def _entry(self, entries, number: int) -> bytes:
        try:
            return entries[number]
        except Exception as error:  # the library raises its own kinds, missing files included
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"{self.path}: a shard cannot be read ({reason})") from None

    def _text(self, number: int) -> bytes:
        return self._entry(self._records, number)

    def read(self, number: int) -> dict:
        """A record's JSON, unchecked (see `Source.read`)."""
        data = super().read(number)
        data.pop(MEDIA_ENTRIES, None)
        return data

    def media_bytes(self, number: int) -> tuple[bytes, ...] | None:
        """Contents of a record's media files, in the order of `Media.paths`; None for text."""
        entries = super().read(number).get(MEDIA_ENTRIES)
        return None if entries is None else tuple(self._entry(self._media, n) for n in entries)


def open_source(path: str | os.PathLike) -> Source:
    """The records of a `.json` list, a `.jsonl` file, or a folder that `data pack` wrote.

    Raises:
      ValueError: naming the file and what is wrong.
    """
    path = os.fspath(path).rstrip("/")
    if path.endswith((".json", ".jsonl")):
        return JsonSource(path)
    if os.path.isfile(path):
        raise ValueError(f"{path}: not a .json list, a .jsonl file or a folder of `data pack`")
    return PackedSource(path)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _line_spans(data: bytes) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for line in data.split(b"\n"):
        if line.strip():
            spans.append((begin, begin + len(line)))
        begin += len(line) + 1
    return spans


def _list_spans(data: bytes, path: str) -> list[tuple[int, int]]:
    """Begin and end, in bytes, of each item of a JSON list."""
    decode, spans = json.JSONDecoder().raw_decode, []
    try:
        text = data.decode()
        place = _skip_space(text, 0).end()
        if text[place : place + 1] != "[":
            raise ValueError("no list of records; one record per line is for a .jsonl file")
        place = _skip_space(text, place + 1).end()
        while text[place : place + 1] != "]" or spans:
            end = decode(text, place)[1]
            spans.append((place, end))
            place = _skip_space(text, end).end()
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = _skip_space(text, place + 1).end()
        if _skip_space(text, place + 1).end() != len(text):
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if len(text) == len(data):
        return spans
    # Characters of several bytes: shift each place by what lies before it.
    shifted, place, byte = [], 0, 0
    for span in spans:
        found = []
        for target in span:
            byte, place = byte + len(text[place:target].encode()), target
            found.append(byte)
        shifted.append(tuple(found))
    return shifted
