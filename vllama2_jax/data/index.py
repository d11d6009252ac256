"""The length index: what room each record of a source takes, known before anything is decoded.

Row plans need it (`schedule.py`), and losses per dataset need to know whose each record is. To
build one, every record is read and tokenized, which takes a core some minutes per million of them;
`load_or_build` does it once.
"""

import dataclasses
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from vllama2_jax.data.check import template_key
from vllama2_jax.data.check_report import read_lengths
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.files import read_bytes
from vllama2_jax.data.records import RecordError
from vllama2_jax.data.sources import Source

_VERSION = 2  # of the file, and of how records are counted
_ARRAYS = ("text_tokens", "clips", "sounds", "datasets")

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What is known of a source's n records before their turn comes.

    Attributes:
      text_tokens: int32 [n], ids without the placeholder, before anything is cut, for
        `RecordFormat.slots`; -1 where a record makes no example.
      clips, sounds: int32 [n], of each record, 0 or 1.
      datasets: int32 [n], into `dataset_names`; -1 where the record cannot be read.
      dataset_names: distinct, in the order in which records name them.
    """

    text_tokens: np.ndarray
    clips: np.ndarray
    sounds: np.ndarray
    datasets: np.ndarray
    dataset_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.text_tokens)

    @property
    def kinds(self) -> set[tuple[int, int]]:
        """(clips, sounds) of its records, each combination once."""
        return {(pair >> 1, pair & 1) for pair in np.unique(self.clips * 2 + self.sounds).tolist()}

    def take(self, numbers) -> "Index":
        """The index of the `examples.Subset` with these record numbers, int [n]."""
        taken = {name: getattr(self, name)[np.asarray(numbers, np.int64)] for name in _ARRAYS}
        return dataclasses.replace(self, **taken)


def build_index(
    source: Source,
    record_format: RecordFormat,
    *,
    default_dataset: str = "",
    counted: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Index:
    """Read and tokenize every record of a source.

    A record that cannot be used is no error here: the pipeline names it when its turn comes.

    Args:
      source: the records.
      record_format: how they are said.
      default_dataset: of records that name none.
      counted: int [n], text tokens that are known already; below 0 is one that is not.
      progress: called with (records done, records in all).

    Raises:
      ValueError: if the source fails as a whole.
    """
    arrays = {name: np.full(len(source), -1, np.int32) for name in _ARRAYS}
    arrays["clips"][:] = arrays["sounds"][:] = 0
    codes: dict[str, int] = {}
    for number in range(len(source)):
        known = -1 if counted is None else counted[number]
        try:
            record = source[number]
        except RecordError:
            record = None
        if record is not None:
            name = record.dataset or default_dataset
            arrays["datasets"][number] = codes.setdefault(name, len(codes))
            try:
                tokens = known if known >= 0 else record_format.text_tokens(record)
            except ValueError:
                tokens = -1
            arrays["text_tokens"][number] = tokens
            if tokens >= 0 and record.media is not None:
                arrays["clips"][number] = record.media.seen
                arrays["sounds"][number] = record.media.heard
        if progress:
            progress(number + 1, len(source))
    return Index(**arrays, dataset_names=tuple(codes))


def load_or_build(
    folder: str | os.PathLike,
    source: Source,
    record_format: RecordFormat,
    *,
    default_dataset: str = "",
    report: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Index:
    """The index of a source, from `folder` if it was built before, else built and kept there.

    A kept index is named after all that decides it: the records, the tokenizer, the template, the
    style. One that is damaged is built anew.

    Args:
      folder: of kept indices, local or in a bucket; made if it is not there.
      source, record_format, default_dataset, progress: see `build_index`.
      report: of `data check --report` on this source: what it has counted with the same tokenizer
        and template need not be tokenized again. Its quarantined records stay in the index; leave
        them out by `Index.take(check_report.read_usable(...))`.

    Raises:
      ValueError: if the source fails as a whole, the report is about another, or the folder cannot
        be written.
    """
    key = _key(source, record_format, default_dataset)
    path = epath.Path(folder) / f"index-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    index = _load(path, key, len(source))
    if index is None:
        counted = None
        if report is not None and record_format.style == "sft":
            known = (record_format.tokenizer.fingerprint(), template_key(record_format.template))
            counted = read_lengths(report, source.fingerprint, *known)
        index = build_index(
            source,
            record_format,
            default_dataset=default_dataset,
            counted=counted,
            progress=progress,
        )
        _save(path, key, index)
    return index


def joint_datasets(indices: Sequence[Index]) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """Dataset names of a mixture, and for each source the int32 [n] codes into them.

    Sources that hold records of the same dataset share its code.
    """
    codes: dict[str, int] = {}
    for index in indices:
        for name in index.dataset_names:
            codes.setdefault(name, len(codes))
    # The last place answers to -1.
    tables = (np.asarray([*map(codes.get, i.dataset_names), -1], np.int32) for i in indices)
    arrays = tuple(table[i.datasets] for table, i in zip(tables, indices, strict=True))
    return tuple(codes), arrays


def _key(source: Source, record_format: RecordFormat, default_dataset: str) -> str:
    """All that an index depends on, as text."""
    uses_template = record_format.style != "plain"
    about = {
        "version": _VERSION,
        "records": source.fingerprint,
        "tokenizer": record_format.tokenizer.fingerprint(),
        "template": template_key(record_format.template) if uses_template else None,
        "style": record_format.style,
        "default_dataset": default_dataset,
    }
    return json.dumps(about)


def _load(path: epath.Path, key: str, size: int) -> Index | None:
    """A kept index, if it is there, whole, and the one that is asked for."""
    try:
        with np.load(io.BytesIO(read_bytes(os.fspath(path))), allow_pickle=False) as held:
            about = json.loads(held["about"].tobytes())
            arrays = {name: held[name] for name in _ARRAYS}
        names = tuple(about["dataset_names"])
        if about["key"] != key or not all(
            array.shape == (size,) and array.dtype == np.int32 for array in arrays.values()
        ):
            return None
    except Exception:  # a damaged archive fails in many ways, and any of them means to build anew
        return None
    return Index(**arrays, dataset_names=names)


def _save(path: epath.Path, key: str, index: Index):
    """Write an index, whole or not at all."""
    about = json.dumps({"key": key, "dataset_names": index.dataset_names}).encode()
    content = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez_compressed(content, about=np.frombuffer(about, np.uint8), **arrays)
    # Several hosts may build the same one; each writes a file of its own.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path.parent}: the length index cannot be kept there ({error.strerror or error}); "
            "name a folder that can be written"
        ) from None
