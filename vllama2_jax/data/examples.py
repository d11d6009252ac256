"""Records -> the ids that a row holds, and how many slots they take."""

import dataclasses

import numpy as np

from vllama2_jax.data.records import Record
from vllama2_jax.text import (
    ChatTemplate,
    Example,
    Supervised,
    Tokenizer,
    audio_plain_example,
    plain_example,
    render,
    sft_example,
    supervise,
    tokenize,
    truncate,
)

STYLES = ("sft", "plain", "audio_plain")


def text_tokens(record: Record, template: str | ChatTemplate, tokenizer: Tokenizer) -> int:
    """Ids of a record's conversation in training, media placeholders not counted.

    Raises:
      TemplateError: if the template refuses the conversation.
    """
    text = render(record.messages(), template, add_generation_prompt=False)
    return _count_text(tokenize(text, tokenizer))


def _count_text(ids: list[int]) -> int:
    return sum(token >= 0 for token in ids)


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """How a record is said to the model.

    Attributes:
      tokenizer: its ids.
      template: as in `text.render`; not used by "plain".
      style: "sft", a conversation whose answers are supervised; or a caption of connector
        pre-training, "plain" (`text.plain_example`) or "audio_plain" (`text.audio_plain_example`).
      media_tokens: slots of a clip.
      sound_tokens: slots of a sound; 0 for a model that does not hear.
      max_tokens: ids are cut there, a placeholder counting as one (the original's
        `model_max_length`), so that a row with a clip may be longer by its slots.
      max_length: slots of the longest row; ids are also cut where they would not fit it.
    """

    tokenizer: Tokenizer
    template: str | ChatTemplate
    style: str
    media_tokens: int
    max_tokens: int
    max_length: int
    sound_tokens: int = 0

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"unknown style {self.style!r}; known: {', '.join(STYLES)}")

    def check_room(self, clips: int, sounds: int) -> None:
        """Refuse rows that are too short for a record with so many clips and sounds (0 or 1).

        Raises:
          ValueError: if no text fits beside them.
        """
        if self.limit(clips, sounds) < 2:
            clip = [f"a clip of {self.media_tokens}"] if clips else []
            sound = [f"a sound of {self.sound_tokens}"] if sounds else []
            beside = f" beside {' and '.join(clip + sound)}" if clip + sound else ""
            raise ValueError(
                f"rows of {self.max_length} slots leave no room for text{beside}; raise max_length"
            )

    def _beside(self, clips, sounds):
        """Slots that media take in place of their placeholder, less that one."""
        return clips * self.media_tokens + sounds * self.sound_tokens - (clips | sounds)

    def limit(self, clips: int, sounds: int) -> int:
        """How many ids a record with so many clips and sounds (0 or 1 of each) may have."""
        return min(self.max_tokens, self.max_length - self._beside(clips, sounds))

    def slots(self, text_tokens, clips, sounds=0) -> np.ndarray:
        """Slots int64 [n] that records take, as `supervised` makes them.

        Args:
          text_tokens: int [n], ids without the placeholder, before anything is cut; below 0 is a
            record that makes no example (one in quarantine is left out, see `Subset`).
          clips, sounds: int [n], of each, 0 or 1; both share one placeholder.
        """
        clips, sounds = np.asarray(clips, np.int64), np.asarray(sounds, np.int64)
        beside = self._beside(clips, sounds)
        ids = np.maximum(np.asarray(text_tokens, np.int64), 0) + (clips | sounds)
        limits = np.minimum(self.max_tokens, self.max_length - beside)
        return np.maximum(np.minimum(ids, limits), 1) + beside

    def text_tokens(self, record: Record) -> int:
        """Ids of the record's text, its placeholder not counted, before anything is cut.

        A conversation is tokenized once, where `example` does so for every answer to see what is
        supervised; that takes more than half of the time.

        Raises:
          ValueError: if the record makes no example, saying why.
        """
        if self.style != "sft":
            return _count_text(self.example(record).ids)
        return text_tokens(record, self.template, self.tokenizer)

    def example(self, record: Record) -> Example:
        """The record's ids and what is supervised, before anything is cut.

        Raises:
          ValueError: if the record makes no example, saying why.
        """
        messages = record.messages()
        if self.style == "plain":
            return plain_example(messages, self.tokenizer)
        if self.style == "audio_plain":
            return audio_plain_example(messages, self.template, self.tokenizer)
        return sft_example(messages, self.template, self.tokenizer)

    def supervised(self, record: Record) -> Supervised:
        """The record's arrays, cut to what a row may hold.

        Raises:
          ValueError: if the record makes no example, its placeholders and media do not pair up, or
            the cut would lose its media or all that it teaches.
        """
        media = record.media
        clips, sounds = (0, 0) if media is None else (int(media.seen), int(media.heard))
        if sounds and not self.sound_tokens:
            raise ValueError("the record has sound, and the model does not hear")
        limit = self.limit(clips, sounds)
        if limit < 2:
            raise ValueError(
                f"rows of {self.max_length} slots have no room for a clip, its sound and text"
            )
        example = truncate(self.example(record), limit)
        slots = clips * self.media_tokens + sounds * self.sound_tokens
        # A list, since one number would let any number of placeholders pass.
        return supervise(example, [slots] if slots else [])


class Subset:
    """Some records of a source, such as those that are not in quarantine.

    Attributes:
      source: the `sources.Source` that they are of.
      numbers: int64 [n], their numbers there.
    """

    def __init__(self, source, numbers):
        """Keep the record numbers int [n] of a `sources.Source`, in this order."""
        self.source, self.numbers = source, np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Record:
        return self.source[int(self.numbers[number])]

    def media_bytes(self, number: int) -> tuple[bytes, ...] | None:
        """See `sources.Source`."""
        return self.source.media_bytes(int(self.numbers[number]))
