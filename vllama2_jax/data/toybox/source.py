"""Toybox as a source of records without files: scenes are drawn, told and made in memory.

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
from vllama2_jax.data.toybox.drawing import render
from vllama2_jax.data.toybox.families import MEDIA_OF, sample_scene
from vllama2_jax.data.toybox.questions import Question, ask_about, describe
from vllama2_jax.data.toybox.scenes import MEDIA, MOMENTS, SPLITS, Scene
from vllama2_jax.data.toybox.synthesis import SAMPLE_RATE, synthesise
from vllama2_jax.media import Clip
from vllama2_jax.media.fbank import filter_bank
from vllama2_jax.media.waveform import fit

KINDS = ("clips", "captions", "questions", "text", "bare")
_WITH_MEDIA = ("clips", "captions", "questions")
# Shares of the families, by how much there is to learn: moving things are asked about in three
# ways, and to pick one of the two names that a question about order holds takes a decoder longest.
_SHARES = {
    "video": {"motion": 0.19, "order": 0.36, "count": 0.1, "change": 0.27, "bounce": 0.08},
    "audio": {"pitch": 0.09, "glide": 0.19, "beeps": 0.37, "noise": 0.16, "timing": 0.19},
    "av": {"sync": 0.45, "sounding": 0.55},
}
# Of text and bare questions.
_TEXT_SHARES = {
    "video": {"motion": 0.14, "order": 0.54, "count": 0.09, "change": 0.14, "bounce": 0.09},
    "audio": {"pitch": 0.2, "glide": 0.2, "beeps": 0.2, "noise": 0.2, "timing": 0.2},
    "av": {"sync": 0.6, "sounding": 0.4},
}
# As many single questions of each kind; moving things are asked about in three.
_QUESTION_SHARES = {
    "video": {"motion": 3, "order": 1, "count": 1, "change": 1, "bounce": 1},
    "audio": {"pitch": 1, "glide": 1, "beeps": 1, "noise": 1, "timing": 1},
    "av": {"sync": 1, "sounding": 1},
}
# Shares of the scenes of media "all".
_MEDIA_SHARES = {"video": 0.56, "audio": 0.16, "av": 0.28}
# Share of text-only conversations that give the answer away in words; the rest must be guessed.
_WITH_STORY = 0.5
# What is counted has no order to be told in.
_NEVER_TOLD = ("count",)
_TELL = {
    "video": ("Describe the video.", "What happens in this video?", "Tell me what you see."),
    "audio": ("Describe the sound.", "What do you hear?", "Tell me what you hear."),
    "av": ("Describe the video.", "What do you see and hear?", "What happens in this video?"),
}
_NOISE = 5  # in steps of 255, so that encoded videos look familiar
_VERSION = 3  # of the records; another one makes runs begin anew


@dataclasses.dataclass(frozen=True)
class ToyboxSource:
    """Records by number, as a `sources.Source` gives them; `frames` and `samples` are their media.

    Attributes:
      records: how many there are.
      kind: "clips", each with all its questions in any order; "captions", each with its
        description, for the style "plain"; "questions", each with one; or without media "text", of
        which one half tells its scene in front of the questions and the other is to be guessed
        at, and "bare", one question to be guessed at.
      split: of `scenes.SPLITS`.
      seed: decides all of them.
      told: of "clips", share of the scenes that are described, not asked about: a sentence names
        all that a clip shows, and an answer one thing of it.
      media: what their scenes are about: "video", "audio", "av", what is seen and heard together,
        or "all" of these.
      withheld: of "clips" of "av", share of those that are asked about with their pictures or their
        sound alone, so that the answer is to be guessed at.
    """

    records: int
    kind: str = "clips"
    split: str = "train"
    seed: int = 0
    told: float = 0.0
    media: str = "video"
    withheld: float = 0.0

    def __post_init__(self):
        """Refuse what cannot be meant."""
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("split", self.split, SPLITS),
            ("media", self.media, MEDIA),
        ):
            if value not in known:
                raise ValueError(f"unknown Toybox {name} {value!r}; known: {', '.join(known)}")
        if self.records < 1 or self.seed < 0:
            raise ValueError(
                f"a Toybox of {self.records} records with seed {self.seed}: give at least one "
                "record and a seed that is not negative"
            )
        for name, media in (("told", MEDIA), ("withheld", ("av",))):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (share and (self.kind != "clips" or self.media not in media)):
                raise ValueError(
                    f"{name} {share} of a Toybox of {self.kind} about {self.media}: it is a share "
                    f"of `clips` about {' or '.join(media)}, 0 to 1"
                )

    @property
    def path(self) -> str:
        """What stands for a file in errors."""
        return f"toybox/{self.media}/{self.kind}/{self.split}/{self.seed}"

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
        if self.kind in _WITH_MEDIA:
            questions, given = self._about(scene, rng), MEDIA_OF[scene.family]
            if questions[0].kind != "tell" and rng.random() < self.withheld:
                given = ("video", "audio")[rng.integers(2)]
            media = Media(given, f"{self.path}/{number}")
            prefix = f"{media.placeholder}\n"
        else:
            story, questions = self._words(scene, rng)
            prefix, media = f"{story}\n", None
        turns = [(question.text, question.answer) for question in questions]
        turns[0] = (prefix + turns[0][0], turns[0][1])
        return Record(f"{self.media}-{self.kind}-{number}", tuple(turns), media, questions[0].kind)

    def media_bytes(self, number: int) -> None:
        """There are no files (see `sources.Source`)."""
        return None

    def frames(self, number: int, size: int) -> np.ndarray:
        """The moments of a record's scene, uint8 [MOMENTS, size, size, 3]."""
        scene, _ = self._scene(number)
        return noisy(render(scene, size), np.random.default_rng([*self._key(number), 1]))

    def samples(self, number: int) -> np.ndarray:
        """The sound of a record's scene, as `synthesise` makes it."""
        scene, _ = self._scene(number)
        return synthesise(scene.events, np.random.default_rng([*self._key(number), 2]))

    def _key(self, number: int) -> list[int]:
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: no record {number}; it holds {len(self)}")
        known = ((KINDS, self.kind), (SPLITS, self.split), (MEDIA, self.media))
        return [self.seed, *(values.index(value) for values, value in known), number]

    def _scene(self, number: int) -> tuple[Scene, np.random.Generator]:
        """A record's scene, and the generator that decides what is said about it."""
        rng = np.random.default_rng(self._key(number))
        shares = {"questions": _QUESTION_SHARES, "text": _TEXT_SHARES, "bare": _TEXT_SHARES}
        return _draw(rng, self.split, self.media, shares.get(self.kind, _SHARES)), rng

    def _about(self, scene: Scene, rng) -> list[Question]:
        """What is said about a clip."""
        if self.kind == "captions":
            return [Question("tell", "", describe(scene))]
        if scene.family not in _NEVER_TOLD and rng.random() < self.told:
            phrases = _TELL[MEDIA_OF[scene.family]]
            return [Question("tell", phrases[rng.integers(len(phrases))], describe(scene))]
        questions = _in_any_order(ask_about(scene, rng), rng)
        return questions if self.kind == "clips" else questions[:1]

    def _words(self, scene: Scene, rng) -> tuple[str, list[Question]]:
        """A story and the questions about it; or "", and one to guess at."""
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


@dataclasses.dataclass(frozen=True)
class ToyboxListener:
    """The filter banks of a `ToyboxSource`, as `assemble.SoundReader` reads those of files.

    Attributes:
      seconds: of the tower's input.
    """

    seconds: float

    def __call__(self, source: Subset, number: int, media: Media, seed: int) -> np.ndarray:
        """The filter bank of a record of some of a `ToyboxSource`'s, float32 [frames, 128]."""
        samples = source.source.samples(int(source.numbers[number]))
        return filter_bank(fit(samples, round(self.seconds * SAMPLE_RATE)))


def weighted_scene(
    rng: np.random.Generator, media: str, shares: dict[str, float] | None = None
) -> Scene:
    """A training scene of some of `MEDIA`; `shares` of its families, by default those of clips."""
    return _draw(rng, "train", media, {media: shares} if shares else _SHARES)


def _draw(rng, split: str, media: str, shares: dict[str, dict[str, float]]) -> Scene:
    if media == "all":
        media = _pick(rng, _MEDIA_SHARES)
    return sample_scene(rng, split, _pick(rng, shares[media]))


def _pick(rng, shares: dict[str, float]) -> str:
    total = sum(shares.values())
    return str(rng.choice(list(shares), p=[share / total for share in shares.values()]))


def noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames with the noise that makes encoded videos look familiar; uint8."""
    noise = rng.integers(-_NOISE, _NOISE + 1, frames.shape, dtype=np.int16)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def _in_any_order(questions: list[Question], rng) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))]
