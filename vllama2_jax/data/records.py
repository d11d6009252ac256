"""Conversation records: LLaVA-style JSON, read strictly."""

import collections
import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from vllama2_jax.text import PLACEHOLDERS, TemplateError, messages_from_llava, place_media_tag
from vllama2_jax.text.chat import Message

MEDIA_KINDS = ("image", "video", "audio")
KNOWN_KEYS = ("id", *MEDIA_KINDS, "start", "end", "kind", "dataset", "conversations")
# A key that is so much like a known one is that one misspelt; any other is somebody else's note.
_MISSPELT = 0.8


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
      file: where it stands.
      number: which of the file's records it is, from 0.
      id: its id, "" where it has none.
      cause: what is wrong with it.
    """

    def __init__(self, file: str, number: int, id: str, cause: str):
        # All four are `args`, so that the error survives a pickle between processes.
        super().__init__(file, number, id, cause)
        self.file, self.number, self.id, self.cause = file, number, id, cause

    def __str__(self) -> str:
        named = f" (id {self.id})" if self.id else ""
        return " ".join(f"{self.file}, record {self.number}{named}: {self.cause}".split())


@dataclasses.dataclass(frozen=True)
class Media:
    """What a conversation is about.

    Attributes:
      kind: one of `MEDIA_KINDS`, or "av", a video with its sound.
      source: path relative to the media root; of a video, a tuple of paths of its frames as well,
        which are used as they are, without sampling.
      start, end: seconds of a video's or a sound's part; None is the file's own start or end.
      sound: path of the sound of "av"; None is the video's own track.
    """

    kind: str
    source: str | tuple[str, ...]
    start: float | None = None
    end: float | None = None
    sound: str | None = None

    @property
    def seen(self) -> bool:
        """Whether there are pictures."""
        return self.kind != "audio"

    @property
    def heard(self) -> bool:
        """Whether there is sound."""
        return self.kind in ("audio", "av")

    @property
    def placeholder(self) -> str:
        """What stands for the media in a question; pictures and sound share one place."""
        return "<video>" if self.kind == "av" else f"<{self.kind}>"

    @property
    def paths(self) -> tuple[str, ...]:
        """The files: one or a frame list's, and that of a sound of its own."""
        source = (self.source,) if isinstance(self.source, str) else self.source
        return source if self.sound is None else (*source, self.sound)

    def pictures(self, places: Sequence[str]) -> str | list[str]:
        """What of the files' places `media.load_clip` takes."""
        if isinstance(self.source, str):
            return places[0]
        return list(places[: len(self.source)])

    def track(self, places: Sequence[str]) -> str:
        """Which of the files' places `media.load_sound` takes."""
        return places[0] if self.sound is None else places[-1]

    def to_json(self) -> dict:
        """The keys of a record that name it, those without a value as None."""
        source = self.source if isinstance(self.source, str) else list(self.source)
        named = {self.kind: source}
        if self.kind == "av":
            named = {"video": source, "audio": self.sound or True}
        return named | {"start": self.start, "end": self.end}


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation, with the media that it is about.

    Attributes:
      id: names the record in messages; need not be unique (in LLaVA's own data it is not).
      turns: (question, answer) pairs as written; with media, one question holds their placeholder.
      media: None for text alone.
      kind: the kind of question, where the data set knows it.
      dataset: where the record is from, where the data set says it.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    media: Media | None = None
    kind: str = ""
    dataset: str = ""

    def messages(self) -> list[Message]:
        """Chat messages, the placeholder moved to the front of its turn (`place_media_tag`)."""
        messages = []
        for question, answer in self.turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return place_media_tag(messages, self.media.placeholder) if self.media else messages

    def to_json(self) -> dict:
        """The record as LLaVA-style JSON holds it."""
        data = {"id": self.id} | (self.media.to_json() if self.media else {})
        data |= {"kind": self.kind, "dataset": self.dataset}
        conversations = []
        for question, answer in self.turns:
            conversations.append({"from": "human", "value": question})
            conversations.append({"from": "gpt", "value": answer})
        kept = {name: value for name, value in data.items() if value not in (None, "")}
        return kept | {"conversations": conversations}


def parse_record(data: dict, file: str | Path, number: int) -> Record:
    """A record from its JSON object.

    One leading sentence that is not human is dropped, as the original does.

    Args:
      data: the object.
      file: where it stands; errors name it.
      number: which of the file's records it is; the id of a record that has none.

    Raises:
      RecordError: saying what is wrong.
    """
    found = id_of(data)
    try:
        return _parse(data, found or str(number))
    except ValueError as error:
        raise RecordError(str(file), number, found, str(error)) from None


def id_of(data) -> str:
    """The id of a record's JSON, "" where it has none that is a string or a whole number."""
    value = data.get("id") if isinstance(data, dict) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _parse(data: dict, id: str) -> Record:
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise ValueError("needs an object with a list `conversations`")
    for name in data:
        _check_key(name)
    if data.get("id") is not None and not id_of(data):
        raise ValueError("`id` must be a string or a whole number")
    sentences = data["conversations"]
    if not all(
        isinstance(s, dict) and isinstance(s.get("from"), str) and isinstance(s.get("value"), str)
        for s in sentences
    ):
        raise ValueError("every sentence needs a string `from` and a string `value`")
    try:
        texts = [message["content"] for message in messages_from_llava(sentences)]
    except TemplateError as error:
        raise ValueError(str(error)) from None
    words = {name: data.get(name) or "" for name in ("kind", "dataset")}
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"`{name}` must be a string, not {value!r}")
    turns, media = tuple(zip(texts[::2], texts[1::2], strict=True)), _media(data)
    _check_placeholders(turns, media)
    return Record(id, turns, media, **words)


def _check_key(name: str):
    if name not in KNOWN_KEYS:
        meant = difflib.get_close_matches(name, KNOWN_KEYS, 1, _MISSPELT)
        if meant:
            raise ValueError(f"unknown key `{name}`; did you mean `{meant[0]}`?")


def _media(data: dict) -> Media | None:
    kinds = [name for name in MEDIA_KINDS if data.get(name) not in (None, False)]
    sound = data["audio"] if kinds == ["video", "audio"] else None
    if sound is not None:
        kinds = ["video"]
    if len(kinds) > 1:
        raise ValueError(
            f"holds {' and '.join(kinds)}; a record is about one of them, or a video and its audio"
        )
    start, end = (_seconds(name, data.get(name)) for name in ("start", "end"))
    kind = kinds[0] if kinds else None
    source = data[kind] if kind else None
    timed = kind in ("video", "audio") and isinstance(source, str)
    if (start is not None or end is not None) and not timed:
        raise ValueError("`start` and `end` are for a video or a sound that is one file")
    if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
        raise ValueError(
            f"`start` {start} must not be negative, and `end` {end} must lie behind it"
        )
    if kind is None:
        return None
    if isinstance(source, list) and kind == "video":
        if not source or not all(isinstance(path, str) and path for path in source):
            raise ValueError("`video` must be a path or a list of paths of its frames")
        source = tuple(source)
    elif not isinstance(source, str) or not source:
        frames = " or a list of paths of its frames" if kind == "video" else ""
        raise ValueError(f"`{kind}` must be a path{frames}")
    if sound is None:
        return Media(kind, source, start, end)
    if sound is True and not isinstance(source, str):
        raise ValueError("a list of frames has no sound; let `audio` name its file")
    if sound is not True and not (isinstance(sound, str) and sound):
        raise ValueError("`audio` beside a video must be a path, or true for the video's own sound")
    return Media("av", source, start, end, None if sound in (True, source) else sound)


def _seconds(name: str, value) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a number of seconds, not {value!r}")
    return float(value)


def _check_placeholders(turns, media: Media | None):
    """One question holds the placeholder of the record's media, and no text any other.

    A placeholder becomes slots for media tokens wherever it stands, so one too many or too few
    cannot be trained on. (In the original, a record whose question lacks it is trained blind.)
    """
    own = media.placeholder if media else None
    holders = 0
    for question, answer in turns:
        for tag in PLACEHOLDERS:
            if tag in answer:
                raise ValueError(f"an answer holds the placeholder {tag}; take it out")
            if tag in question and tag != own:
                remedy = f"write {own}" if own else "name the media or take it out"
                raise ValueError(f"a question holds {tag} but there is no such media; {remedy}")
        holders += own is not None and own in question
    if own and holders != 1:
        raise ValueError(f"one question must hold {own}; {holders or 'none'} do")


def read_records(path: str | Path) -> list[Record]:
    """All records of a small JSON file that holds a list of them, ids unique (`sources.py`: more).

    Raises:
      ValueError: naming the file, the record and what is wrong.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: must hold a list of records")
    records = [parse_record(item, path, i) for i, item in enumerate(data)]
    repeated = [id for id, n in collections.Counter(r.id for r in records).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: ids must be unique; these occur again: {', '.join(repeated)}")
    return records


def write_records(path: str | Path, records) -> None:
    """Write records as one JSON list."""
    text = json.dumps([record.to_json() for record in records], indent=1)
    Path(path).write_text(text + "\n")
