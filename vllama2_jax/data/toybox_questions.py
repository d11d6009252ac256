"""What Toybox asks about a scene, and how a scene reads as a sentence."""

import dataclasses

import numpy as np

from vllama2_jax.data.toybox_scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    SHAPES,
    Scene,
)

KINDS = ("colour", "shape", "direction", "order", "count", "change")
# What a guesser who knows the possible answers gets right. Shuffled frames carry nothing about the
# temporal kinds, so it is their chance level, too.
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "direction": 1 / len(DIRECTIONS),
    "order": 1 / 2,
    "count": 1 / len(COUNTS),
    "change": 1 / len(CHANGES),
}
TEMPORAL_KINDS = ("direction", "order")

# No question names what another question of the same clip asks for.
_PHRASES = {
    "colour": (
        "What colour is the shape?",
        "What color is it?",
        "Which colour does the moving object have?",
        "What is the colour of the object?",
    ),
    "shape": (
        "What shape is it?",
        "Which shape is moving?",
        "What is the shape of the object?",
        "What kind of shape do you see?",
    ),
    "direction": (
        "Which way does the shape move?",
        "In which direction is the object moving?",
        "Does it move left, right, up or down?",
        "Where is it heading?",
    ),
    "order": (
        "Which came {when}, the {a} or the {b}?",
        "Which one appears {when}: the {a} or the {b}?",
        "What do you see {when}, the {a} or the {b}?",
    ),
    "count": (
        "How many shapes are there?",
        "How many objects do you see?",
        "Count the shapes.",
    ),
    "change": (
        "What changes?",
        "What is different at the end?",
        "What changed during the video: colour, shape, size or background?",
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one of `KINDS` and its only right answer."""

    kind: str
    text: str
    answer: str


def ask_about(scene: Scene, rng: np.random.Generator, stratum: int | None = None) -> list[Question]:
    """The questions that a scene answers, phrased at random.

    Args:
      scene: what the clip shows.
      rng: picks the phrases, and in questions about order what is asked.
      stratum: counts upwards to balance questions about order: first or last, and which of the
        two is named first; None draws it.
    """

    def phrase(kind):
        return _PHRASES[kind][rng.integers(len(_PHRASES[kind]))]

    if scene.family == "motion":
        (thing,) = scene.things
        return [
            Question("colour", phrase("colour"), thing.colour),
            Question("shape", phrase("shape"), thing.shape),
            Question("direction", phrase("direction"), scene.fact),
        ]
    if scene.family == "order":
        stratum = int(rng.integers(4)) if stratum is None else stratum
        asked, swapped = stratum % 2, stratum // 2 % 2
        names = [thing.name for thing in scene.things]
        a, b = reversed(names) if swapped else names
        text = phrase("order").format(when=("first", "last")[asked], a=a, b=b)
        return [Question("order", text, names[asked])]
    return [Question(scene.family, phrase(scene.family), scene.fact)]


def describe(scene: Scene) -> str:
    """A scene in words, holding the answers to all its questions."""
    names = [_with_article(thing.name) for thing in scene.things]
    if scene.family == "motion":
        return f"{names[0]} is moving {scene.fact}.".capitalize()
    if scene.family == "order":
        return f"First there is {names[0]}, then {names[1]}."
    if scene.family == "count":
        be, plural = ("is", "") if len(names) == 1 else ("are", "s")
        return f"There {be} {scene.fact} shape{plural}: {', '.join(names)}."
    before, after = scene.things
    if scene.fact == "background":
        return f"{names[0]} stays while the background changes.".capitalize()
    if scene.fact == "size":
        how = "grows" if after.radius > before.radius else "shrinks"
        return f"{names[0]} {how}.".capitalize()
    return f"{names[0]} becomes {names[1]}.".capitalize()


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
