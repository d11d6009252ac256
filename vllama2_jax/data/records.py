"""Conversation records: LLaVA-style JSON, read strictly."""

import collections
import dataclasses
import json
from pathlib import Path

_OTHER_MEDIA = ("image", "audio")


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation, with the video that it is about.

    Attributes:
      id: names the record in messages.
      turns: (question, answer) pairs; the first question may hold the `<video>` placeholder.
      video: path relative to the media root, or None for text alone.
      kind: the kind of question, where the data set knows it.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    video: str | None = None
    kind: str = ""

    def to_json(self) -> dict:
        """The record as LLaVA-style JSON holds it."""
        conversations = []
        for question, answer in self.turns:
            conversations.append({"from": "human", "value": question})
            conversations.append({"from": "gpt", "value": answer})
        data = {"id": self.id, "video": self.video, "kind": self.kind}
        return {k: v for k, v in data.items() if v} | {"conversations": conversations}


def parse_record(data: dict, where: str) -> Record:
    """A record from its JSON object.

    Raises:
      ValueError: saying `where` and what is wrong.
    """
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise ValueError(f"{where}: needs an object with a list `conversations`")
    sentences = data["conversations"]
    speakers = [s.get("from") if isinstance(s, dict) else None for s in sentences]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"{where}: `conversations` must alternate human, gpt; found {speakers}")
    values = [s.get("value") for s in sentences]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: every sentence needs a string `value`")
    other = [name for name in _OTHER_MEDIA if data.get(name) is not None]
    if other:
        raise ValueError(f"{where}: `{other[0]}` is not supported yet; only `video` is read")
    video, kind = data.get("video"), data.get("kind", "")
    if not isinstance(video, str | None) or not isinstance(kind, str):
        raise ValueError(f"{where}: `video` and `kind` must be strings")
    return Record(
        id=str(data.get("id", where)),
        turns=tuple(zip(values[::2], values[1::2], strict=True)),
        video=video,
        kind=kind,
    )


def read_records(path: str | Path) -> list[Record]:
    """All records of a JSON file that holds a list of them.

    Raises:
      ValueError: naming the file, the record and what is wrong.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: must hold a list of records")
    records = [parse_record(item, f"{path}, record {i}") for i, item in enumerate(data)]
    repeated = [id for id, n in collections.Counter(r.id for r in records).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: ids must be unique; these occur again: {', '.join(repeated)}")
    return records


def write_records(path: str | Path, records) -> None:
    """Write records as one JSON list."""
    text = json.dumps([record.to_json() for record in records], indent=1)
    Path(path).write_text(text + "\n")
