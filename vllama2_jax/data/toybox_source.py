"""Toybox as a source of records without files: scenes are drawn, told and rendered in memory.

Record i is a function of (kind, split, seed, i) alone, so that a run can begin anywhere and no
record has to be kept. Grain's workers render, so this imports no JAX.
"""

import dataclasses
import hashlib
import json
import operator

import numpy as np

from vllama2_jax.data.examples import Subset
from vllama2_jax.data.records import Media, Record
from vllama2_jax.data.toybox import PLACEHOLDER
from vllama2_jax.data.toybox_questions import Question, ask_about, describe
from vllama2_jax.data.toybox_scenes import MOMENTS, SPLITS, Scene, render, sample_scene
from vllama2_jax.media import Clip

_WITH_MEDIA = ("clips", "captions", "questions")
# By how much there is to learn: moving things are asked about in three ways, and to pick one of the
# two names that a question about order holds takes a decoder longest.
_CLIP_WEIGHTS = {"motion": 0.22, "order": 0.38, "count": 0.1, "change": 0.3}
_TEXT_WEIGHTS = {"motion": 0.15, "order": 0.6, "count": 0.1, "change": 0.15}
# As many single questions of each kind; half of the kinds are about moving things.
_QUESTION_WEIGHTS = {"motion": 1 / 2, "order": 1 / 6, "count": 1 / 6, "change": 1 / 6}
_WEIGHTS = {
    "clips": _CLIP_WEIGHTS,
    "captions": _CLIP_WEIGHTS,
    "questions": _QUESTION_WEIGHTS,
    "text": _TEXT_WEIGHTS,
    "bare": _TEXT_WEIGHTS,
}
KINDS = tuple(_WEIGHTS)
# Share of text-only conversations that give the answer away in words; the rest must be guessed.
_WITH_STORY = 0.5
# What is counted has no order to be told in.
_TOLD_FAMILIES = ("motion", "order", "change")
_TELL = ("Describe the video.", "What happens in this video?", "Tell me what you see.")
_NOISE = 5  # in steps of 255, so that encoded videos look familiar
_VERSION = 1  # of the records; another one makes runs begin anew


@dataclasses.dataclass(frozen=True)
class ToyboxSource:
    """Records by number, as a `sources.Source` gives them; `frames` are their media.

    Attributes:
      records: how many there are.
      kind: "clips", each with all its questions in any order; "captions", each with its
        description, for the style "plain"; "questions", each with one; or without media "text", of
        which one half tells its scene in front of the questions and the other is to be guessed
        at, and "bare", one question to be guessed at.
      split: of `toybox_scenes.SPLITS`.
      seed: decides all of them.
      told: of "clips", share of the scenes that are described, not asked about: a sentence names
        all that a clip shows, and an answer one thing of it.
    """

    records: int
    kind: str = "clips"
    split: str = "train"
    seed: int = 0
    told: float = 0.0

    def __post_init__(self):
        """Refuse what cannot be meant."""
        for name, value, known in (("kind", self.kind, KINDS), ("split", self.split, SPLITS)):
            if value not in known:
                raise ValueError(f"unknown Toybox {name} {value!r}; known: {', '.join(known)}")
        if self.records < 1 or self.seed < 0:
            raise ValueError(
                f"a Toybox of {self.records} records with seed {self.seed}: give at least one "
                "record and a seed that is not negative"
            )
        if not 0 <= self.told <= 1 or (self.told and self.kind != "clips"):
            raise ValueError(
                f"told {self.told} of a Toybox of {self.kind}: it is a share of `clips`, 0 to 1"
            )

    @property
    def path(self) -> str:
        """What stands for a file in errors."""
        return f"toybox/{self.kind}/{self.split}/{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) that changes with the records."""
        return hashlib.sha256(json.dumps([_VERSION, dataclasses.asdict(self)]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, number: int) -> Record:
        """One record; its `kind` is that of its first question, or "tell".

        Raises:
          IndexError: for a number that is not in `range(len(self))`.
        """
        scene, rng = self._scene(number)
        if self.kind not in _WITH_MEDIA:
            story, questions = self._words(scene, rng)
            prefix, media = f"{story}\n", None
        else:
            questions = self._about(scene, rng)
            prefix, media = PLACEHOLDER, Media("video", f"{self.path}/{number}")
        turns = [(question.text, question.answer) for question in questions]
        turns[0] = (prefix + turns[0][0], turns[0][1])
        return Record(f"{self.kind}-{number}", tuple(turns), media, questions[0].kind)

    def media_bytes(self, number: int) -> None:
        """There are no files (see `sources.Source`)."""
        return None

    def frames(self, number: int, size: int) -> np.ndarray:
        """The moments of a record's scene, uint8 [MOMENTS, size, size, 3]."""
        scene, _ = self._scene(number)
        return noisy(render(scene, size), np.random.default_rng([*self._key(number), 1]))

    def _key(self, number: int) -> list[int]:
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: no record {number}; it holds {len(self)}")
        return [self.seed, KINDS.index(self.kind), SPLITS.index(self.split), number]

    def _scene(self, number: int) -> tuple[Scene, np.random.Generator]:
        """A record's scene, and the generator that decides what is said about it."""
        rng = np.random.default_rng(self._key(number))
        return weighted_scene(rng, self.split, _WEIGHTS[self.kind]), rng

    def _about(self, scene: Scene, rng) -> list[Question]:
        """What is said about a clip."""
        if self.kind == "captions":
            return [Question("tell", "", describe(scene))]
        if scene.family in _TOLD_FAMILIES and rng.random() < self.told:
            return [Question("tell", _TELL[rng.integers(len(_TELL))], describe(scene))]
        questions = _in_any_order(ask_about(scene, rng), rng)
        return questions if self.kind == "clips" else questions[:1]

    def _words(self, scene: Scene, rng) -> tuple[str, list[Question]]:
        """A story and the questions about it; without one, what is asked when there is no video."""
        questions = _in_any_order(ask_about(scene, rng), rng)
        if self.kind == "text" and rng.random() < _WITH_STORY:
            return describe(scene), questions
        return "", questions[:1]


@dataclasses.dataclass(frozen=True)
class ToyboxReader:
    """Renders the media of a `ToyboxSource`, as `assemble.ClipReader` reads those of files.

    Attributes:
      image_size: pixels of a frame's side.
      num_frames: time steps of a clip.
    """

    image_size: int
    num_frames: int

    def __call__(self, source: Subset, number: int, media: Media) -> Clip:
        """The clip of a record of some of a `ToyboxSource`'s."""
        frames = source.source.frames(int(source.numbers[number]), self.image_size)
        moments = np.arange(self.num_frames) * MOMENTS // self.num_frames
        seen, index = np.unique(moments, return_inverse=True)
        return Clip(frames[seen], index.astype(np.int32), np.full(len(seen), np.nan), media.source)


def weighted_scene(
    rng: np.random.Generator, split: str = "train", weights: dict[str, float] = _CLIP_WEIGHTS
) -> Scene:
    """A scene of a split; `weights` are the shares of the families."""
    return sample_scene(rng, split, str(rng.choice(list(weights), p=list(weights.values()))))


def noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames with the noise that makes encoded videos look familiar; uint8."""
    noise = rng.integers(-_NOISE, _NOISE + 1, frames.shape, dtype=np.int16)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def _in_any_order(questions: list[Question], rng) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))]
