"""Toybox batches made in memory; batch number k is a function of (seed, k) alone."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vllama2_jax.data.collate import pack_rows
from vllama2_jax.data.toybox_questions import Question, ask_about, describe
from vllama2_jax.data.toybox_scenes import MOMENTS, Scene, render, sample_scene
from vllama2_jax.models.vllama2 import Batch
from vllama2_jax.text import Supervised, Tokenizer, sft_example, supervise

TEMPLATE = "chatml"
# By how much there is to learn: moving things are asked about in three ways, and to pick one of the
# two names that a question about order holds takes a decoder longest.
CLIP_WEIGHTS = {"motion": 0.22, "order": 0.38, "count": 0.1, "change": 0.3}
TEXT_WEIGHTS = {"motion": 0.15, "order": 0.6, "count": 0.1, "change": 0.15}
# Share of text-only conversations that give the answer away in words; the rest must be guessed.
_WITH_STORY = 0.5
# Share of scenes to be told in words, not asked about: a sentence names all that a clip shows, and
# an answer one thing of it. What is counted has no order to be told in.
_TOLD = 0.4
_TOLD_FAMILIES = ("motion", "order", "change")
_TELL = ("Describe the video.", "What happens in this video?", "Tell me what you see.")
_NOISE = 5  # in steps of 255, so that encoded videos look familiar
_TEXT_PER_ROW = 4
_ROWS_PER_BARE_QUESTION = 3


@dataclasses.dataclass(frozen=True)
class ToyboxFeed:
    """Makes batches of training scenes for one model.

    Attributes:
      tokenizer: its ids.
      media_tokens: slots that a clip takes.
      image_size: pixels along a side of a frame.
      length: slots of a row.
      rows: of a batch.
      seed: decides everything.
    """

    tokenizer: Tokenizer
    media_tokens: int
    image_size: int
    length: int
    rows: int
    seed: int

    def text(self) -> Iterator[Batch]:
        """Endless batches of conversations without a video, several in a row."""
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, 0, number])
            examples = [
                [self._text_example(rng) for _ in range(_TEXT_PER_ROW)] for _ in range(self.rows)
            ]
            yield Batch(frames=None, clip_frames=None, clip_mask=None, **self._pack(examples))
            number += 1

    def clips(self) -> Iterator[Batch]:
        """Endless batches of clips with all their questions, and some bare questions beside them.

        Without those the decoder forgets to name one of the two things when it sees neither. Where
        every row had one, it learnt to guess at orders that it could have seen.
        """
        clip_frames = np.broadcast_to(np.arange(MOMENTS, dtype=np.int32), (self.rows, 1, MOMENTS))
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, 1, number])
            examples, frames = [], []
            for row in range(self.rows):
                scene = training_scene(rng)
                examples.append([self._clip_example(scene, rng)])
                if row % _ROWS_PER_BARE_QUESTION == 0:
                    examples[-1].append(self._bare_question(rng))
                frames.append(noisy(render(scene, self.image_size), rng))
            yield Batch(
                frames=np.stack(frames),
                clip_frames=clip_frames,
                clip_mask=np.ones((self.rows, 1), bool),
                **self._pack(examples),
            )
            number += 1

    def _pack(self, rows: list[list[Supervised]]) -> dict[str, np.ndarray]:
        """The text arrays of a batch."""
        kept = [_fitting(examples, self.length) for examples in rows]
        return pack_rows(kept, self.length, self.media_tokens)

    def _clip_example(self, scene: Scene, rng) -> Supervised:
        return self._example("<video>\n", _tell_or_ask(scene, rng), self.media_tokens)

    def _text_example(self, rng) -> Supervised:
        if rng.random() >= _WITH_STORY:
            return self._bare_question(rng)
        scene = training_scene(rng, TEXT_WEIGHTS)
        questions = _in_any_order(ask_about(scene, rng), rng)
        return self._example(describe(scene) + "\n", questions, 0)

    def _bare_question(self, rng) -> Supervised:
        """What inference sends when there is no video: one question, to be guessed at."""
        questions = _in_any_order(ask_about(training_scene(rng, TEXT_WEIGHTS), rng), rng)
        return self._example("\n", questions[:1], 0)

    def _example(self, prefix: str, questions, media_tokens: int) -> Supervised:
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": prefix + question.text})
            messages.append({"role": "assistant", "content": question.answer})
            prefix = ""
        return supervise(sft_example(messages, TEMPLATE, self.tokenizer), media_tokens)


def _fitting(examples: list[Supervised], length: int) -> list[Supervised]:
    """The first example, and of the others those that a row still has room for."""
    kept, room = [], length
    for example in examples:
        if not kept or len(example.tokens) <= room:
            kept.append(example)
            room -= len(example.tokens)
    return kept


def _tell_or_ask(scene: Scene, rng) -> list[Question]:
    if scene.family in _TOLD_FAMILIES and rng.random() < _TOLD:
        return [Question("tell", _TELL[rng.integers(len(_TELL))], describe(scene))]
    return _in_any_order(ask_about(scene, rng), rng)


def _in_any_order(questions: list[Question], rng) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))]


def training_scene(rng: np.random.Generator, weights: dict[str, float] = CLIP_WEIGHTS) -> Scene:
    """A scene of the training split; `weights` are the shares of the families."""
    return sample_scene(rng, "train", str(rng.choice(list(weights), p=list(weights.values()))))


def noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames with the noise that makes encoded videos look familiar; uint8."""
    noise = rng.integers(-_NOISE, _NOISE + 1, frames.shape, dtype=np.int16)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)
