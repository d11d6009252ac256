"""What `check` finds out about a file of records: as a table, as JSON, and as a length index."""

import collections
import dataclasses
import json
import os

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from vllama2_jax.data.files import read_bytes

FORMAT, VERSION = "vllama2_jax data check", 1
_PERCENTILES = (0, 50, 90, 99, 100)
_SHOWN = 20  # quarantined records that are printed
_UNREAD = "?"  # in the place of what could not be read


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """A record that must not be trained on: its number, its id (its number, if none), and why."""

    number: int
    id: str
    cause: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """A readable record.

    Attributes:
      dataset, media, kind: what it belongs to.
      is_bad: whether its media are.
      seconds: of the part of its media that is asked for; None for what knows no time.
      tokens: of its text.
      silent: whether sound is asked for of a video that has none.
    """

    dataset: str
    media: str
    kind: str
    is_bad: bool
    seconds: float | None
    tokens: int | None
    silent: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check has found.

    Attributes:
      file, fingerprint: of the source.
      ids: of all records, in order; a record without one is called by its number.
      checked: the records that could be read.
      quarantine: what must not be trained on, in order.
      ignored_keys: keys that mean nothing here, and in how many records they occur.
      dropped_sentences: records whose leading sentence, not being human, is not trained on.
      tokenizer, template: what `lengths` were counted with: fingerprint and key; None without.
      lengths: text tokens of all records, in order; None where quarantined.
    """

    file: str
    fingerprint: str
    ids: list[str]
    checked: list[Checked]
    quarantine: list[Quarantined]
    ignored_keys: dict[str, int]
    dropped_sentences: int
    tokenizer: str | None
    template: str | None
    lengths: list[int | None] | None

    def groups(self) -> list[dict]:
        """Counts, and percentiles over usable records, by dataset, media and kind; all at last."""
        groups = collections.defaultdict(list)
        for record in self.checked:
            groups[record.dataset, record.media, record.kind].append(record)
        out = []
        for (dataset, media, kind), members in sorted(groups.items()):
            out.append({"dataset": dataset, "media": media, "kind": kind, **_summary(members)})
        unread = len(self.ids) - len(self.checked)
        if unread:
            names = dict.fromkeys(("dataset", "media", "kind"), _UNREAD)
            out.append({**names, **_summary([]), "records": unread, "quarantined": unread})
        total = {**_summary(self.checked), "records": len(self.ids)}
        total["quarantined"] = len(self.quarantine)
        return [*out, {"dataset": "all", "media": "", "kind": "", **total}]

    def notes(self) -> list[str]:
        """What is no error but should be known."""
        notes = [
            f"key `{name}` is ignored in {n} record(s)" for name, n in self.ignored_keys.items()
        ]
        silent = sum(record.silent for record in self.checked)
        if silent:
            notes.append(
                f"{silent} record(s) ask for the sound of a video that has none; training hears "
                "silence instead"
            )
        repeated = len(self.ids) - len(set(self.ids))
        if repeated:
            notes.append(f"{repeated} id(s) occur again; records are told apart by number")
        if self.dropped_sentences:
            notes.append(
                f"{self.dropped_sentences} record(s) lose a leading sentence that is not human"
            )
        return notes

    def to_json(self) -> dict:
        """The report as its file holds it."""
        lengths = None
        if self.lengths is not None:
            pairs = zip(self.ids, self.lengths, strict=True)
            lengths = {
                "tokenizer": self.tokenizer,
                "template": self.template,
                "records": [{"id": id, "text_tokens": count} for id, count in pairs],
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "file": self.file,
            "fingerprint": self.fingerprint,
            "records": len(self.ids),
            "groups": self.groups(),
            "notes": self.notes(),
            "quarantine": [dataclasses.asdict(entry) for entry in self.quarantine],
            "lengths": lengths,
        }

    def table(self) -> Table:
        """The groups as a table: seconds and tokens as median, 99th percentile and maximum."""
        table = Table(title=self.file)
        for name in ("dataset", "media", "kind"):
            table.add_column(name)
        for name in ("records", "quarantined", "seconds", "text tokens"):
            shown = "\n50/99/100 %" if name in ("seconds", "text tokens") else ""
            table.add_column(name + shown, justify="right")
        groups = self.groups()
        for group in groups:
            if group is groups[-1]:
                table.add_section()
            table.add_row(
                *(group[name] for name in ("dataset", "media", "kind")),
                *(str(group[name]) for name in ("records", "quarantined")),
                *(
                    _in_short(group[name], form)
                    for name, form in (("seconds", ".1f"), ("tokens", "g"))
                ),
            )
        return table

    def show(self, console: Console) -> None:
        """Print the table, the notes, and the head of the quarantine."""
        console.print(self.table())
        for note in self.notes():
            console.print(f"note: {note}", markup=False, highlight=False)
        for entry in self.quarantine[:_SHOWN]:
            named = "" if entry.id == str(entry.number) else f" (id {entry.id})"
            line = f"quarantined: record {entry.number}{named}: {entry.cause}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if len(self.quarantine) > _SHOWN:
            console.print(f"and {len(self.quarantine) - _SHOWN} more; --report lists them all")


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write a report as JSON, whole or not at all."""
    path = epath.Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_report(path: str | os.PathLike, fingerprint: str) -> dict:
    """A report's JSON.

    Args:
      path: of the report.
      fingerprint: of the source that it must be about.

    Raises:
      ValueError: for a file that is no report, or one about other records.
    """
    try:
        data = json.loads(read_bytes(os.fspath(path)))
    except ValueError as error:
        raise ValueError(f"{path}: is no report that can be read ({error})") from None
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: not a report of `vllama2 data check`; make one with --report")
    if data["fingerprint"] != fingerprint:
        raise ValueError(f"{path}: is about other records than these; check the file again")
    return data


def read_usable(path: str | os.PathLike, fingerprint: str) -> np.ndarray:
    """Numbers of the records that a report does not quarantine, for `examples.Subset`: int64 [n].

    Args:
      path: of the report.
      fingerprint: of the source that it must be about.

    Raises:
      ValueError: for a file that is no report, or one about other records.
    """
    data = read_report(path, fingerprint)
    bad = [entry["number"] for entry in data["quarantine"]]
    return np.setdiff1d(np.arange(data["records"]), np.asarray(bad, np.int64))


def read_lengths(
    path: str | os.PathLike, fingerprint: str, tokenizer: str, template: str
) -> np.ndarray | None:
    """Text tokens of conversations ("sft" of `examples.RecordFormat`) that a report has counted.

    Args:
      path: of the report.
      fingerprint: of the source that it must be about.
      tokenizer: fingerprint of the tokenizer that is to be trained with.
      template: key of the template that is to be trained with (`check.template_key`).

    Returns:
      int32 [records], -1 where the record is quarantined; None if the report has counted nothing,
      or with another tokenizer or template.

    Raises:
      ValueError: for a file that is no report, or one about other records.
    """
    lengths = read_report(path, fingerprint)["lengths"]
    if lengths is None or (lengths["tokenizer"], lengths["template"]) != (tokenizer, template):
        return None
    counts = [record["text_tokens"] for record in lengths["records"]]
    return np.asarray([-1 if count is None else count for count in counts], np.int32)


def _summary(members: list[Checked]) -> dict:
    good = [record for record in members if not record.is_bad]
    return {
        "records": len(members),
        "quarantined": len(members) - len(good),
        "seconds": _percentiles([r.seconds for r in good if r.seconds is not None]),
        "tokens": _percentiles([r.tokens for r in good if r.tokens is not None]),
    }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    """{"0": least, "50": median, ..., "total"}; None of no values."""
    if not values:
        return None
    # Of the values themselves, none in between.
    found = np.percentile(values, _PERCENTILES, method="higher")
    named = {str(name): value.item() for name, value in zip(_PERCENTILES, found, strict=True)}
    return named | {"total": sum(values)}


def _in_short(found: dict[str, float] | None, form: str) -> str:
    return (
        "" if found is None else "/".join(format(found[name], form) for name in ("50", "99", "100"))
    )
