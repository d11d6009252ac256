"""What Toybox asks about a scene, and how a scene reads as a sentence."""

import dataclasses

import numpy as np

from vllama2_jax.data.toybox.scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    GLIDES,
    MOMENTS,
    NOISES,
    PITCHES,
    SHAPES,
    TIMES,
    Scene,
)

# Of each kind of question, what a guesser who knows the possible answers gets right. Shuffled
# frames carry nothing about the temporal kinds, so it is their chance level, too; and pictures or
# sound alone nothing about the last two.
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "direction": 1 / len(DIRECTIONS),
    "order": 1 / 2,
    "count": 1 / len(COUNTS),
    "change": 1 / len(CHANGES),
    "bounce": 1 / len(TIMES),
    "pitch": 1 / len(PITCHES),
    "glide": 1 / len(GLIDES),
    "beeps": 1 / len(COUNTS),
    "noise": 1 / len(NOISES),
    "timing": 1 / len(TIMES),
    "sync": 1 / 2,
    "sounding": 1 / 2,
}
KINDS = tuple(CHANCE)
TEMPORAL_KINDS = ("direction", "order", "bounce")

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
    "bounce": (
        "When does the shape bounce?",
        "When does it touch the ground?",
        "At what time does the object bounce?",
    ),
    "pitch": (
        "Is the tone high or low?",
        "Do you hear a high or a low tone?",
        "How high is the tone?",
    ),
    "glide": (
        "Does the tone rise or fall?",
        "Is the tone rising or falling?",
        "How does the tone change?",
    ),
    "beeps": (
        "How many beeps do you hear?",
        "How often does it beep?",
        "Count the beeps.",
    ),
    "noise": (
        "What noise do you hear?",
        "Which noise is it?",
        "What does it sound like?",
    ),
    "timing": (
        "When do you hear the beep?",
        "When is the beep?",
        "At what time does it beep?",
    ),
    "sync": (
        "Does the beep come when the shape bounces?",
        "Do you hear a beep as the object bounces?",
        "Is the beep in time with the bounce?",
    ),
    "sounding": (
        "Which one makes the sound, the {a} or the {b}?",
        "Which of them sounds: the {a} or the {b}?",
        "What do you hear, the {a} or the {b}?",
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
      scene: what the clip holds.
      rng: picks the phrases, and in questions that name two things what is asked.
      stratum: counts upwards to balance those: first or last, and which of the two is named first;
        None draws it.
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
    if scene.family in ("order", "sounding"):
        stratum = int(rng.integers(4)) if stratum is None else stratum
        asked, swapped = stratum % 2, stratum // 2 % 2
        names = [thing.name for thing in scene.things]
        a, b = reversed(names) if swapped else names
        text = phrase(scene.family).format(when=("first", "last")[asked], a=a, b=b)
        return [Question(scene.family, text, scene.fact or names[asked])]
    return [Question(scene.family, phrase(scene.family), scene.fact)]


def describe(scene: Scene) -> str:
    """A scene in words, from which all its questions can be answered."""
    return _IN_WORDS[scene.family](scene, [_with_article(thing.name) for thing in scene.things])


def _count(scene, names) -> str:
    be, plural = _number(scene.fact)
    return f"There {be} {scene.fact} shape{plural}: {', '.join(names)}."


def _beeps(scene, names) -> str:
    be, plural = _number(scene.fact)
    return f"There {be} {scene.fact} beep{plural}."


def _number(count: str) -> tuple[str, str]:
    return ("is", "") if count == COUNTS[0] else ("are", "s")


def _change(scene, names) -> str:
    before, after = scene.things
    if scene.fact == "background":
        return f"{names[0]} stays while the background changes.".capitalize()
    if scene.fact == "size":
        how = "grows" if after.radius > before.radius else "shrinks"
        return f"{names[0]} {how}.".capitalize()
    return f"{names[0]} becomes {names[1]}.".capitalize()


def _sync(scene, names) -> str:
    lowest = max(range(MOMENTS), key=lambda moment: scene.moments[moment].things[0].y)
    (beep,) = scene.events
    bounce, heard = (_WHEN[moment] for moment in (lowest, beep.moment))
    return f"{names[0]} bounces {bounce}, and a beep sounds {heard}.".capitalize()


_WHEN = {moment: when for when, moment in TIMES.items()}
_IN_WORDS = {
    "motion": lambda scene, names: f"{names[0]} is moving {scene.fact}.".capitalize(),
    "order": lambda scene, names: f"First there is {names[0]}, then {names[1]}.",
    "count": _count,
    "change": _change,
    "bounce": lambda scene, names: f"{names[0]} bounces {scene.fact}.".capitalize(),
    "pitch": lambda scene, names: f"There is a {scene.fact} tone.",
    "glide": lambda scene, names: f"A tone is {scene.fact}.",
    "beeps": _beeps,
    "noise": lambda scene, names: f"There is a {scene.fact}.",
    "timing": lambda scene, names: f"A beep sounds {scene.fact}.",
    "sync": _sync,
    "sounding": lambda scene, names: (
        f"First there is {names[0]}, then {names[1]}; the {scene.fact} sounds."
    ),
}


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
