"""Toybox's scenes: what is in a clip, moment by moment and sound by sound.

A clip is `MOMENTS` moments, each held for `HOLD` video frames, so that `MOMENTS` uniformly sampled
frames see each moment exactly once; its sound lasts as long. How scenes come about by lot stands in
`sights.py`, `sounds.py` and, where both belong together, `families.py`; how they become pictures in
`drawing.py`, and samples in `synthesis.py`.

A scene is held out if its combination says so: one sixth of all combinations of colours, shapes and
answer, for example of (colour, shape, direction), or of a voice and answer, is never met in
training.
"""

import dataclasses

MOMENTS = 8
HOLD = 3
FPS = 12
MOMENT_SECONDS = HOLD / FPS
SECONDS = MOMENTS * MOMENT_SECONDS
SPLITS = ("train", "heldout")
MEDIA = ("video", "audio", "av", "all")  # what scenes are about: one of three, or all of these

COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 30),
    "yellow": (245, 228, 60),
    "green": (45, 165, 70),
    "blue": (40, 85, 225),
    "purple": (150, 55, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS = ("left", "right", "up", "down")
COUNTS = ("one", "two", "three", "four", "five")
CHANGES = ("colour", "shape", "size", "background")
# When something short happens, and in which moment that is.
TIMES = {"early": 1, "midway": 3, "late": 5}

# Hz of the six registers that voices have; the lower three are low.
REGISTERS = (250.0, 380.0, 570.0, 870.0, 1320.0, 2000.0)
PITCHES = ("low", "high")
GLIDES = ("rising", "falling")
TIMBRES = ("pure", "hollow", "bright")
NOISES = ("hiss", "rumble", "crackle", "buzz")

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
VOICES = tuple((register, timbre) for register in range(len(REGISTERS)) for timbre in TIMBRES)

_COLOUR_NUMBER = {colour: number for number, colour in enumerate(COLOURS)}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One coloured shape, in units of the picture's side (x to the right, y down)."""

    colour: str
    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """As questions and answers call it: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Moment:
    """What one frame shows."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """One stretch of sound.

    Attributes:
      kind: "tone", or one of `NOISES`.
      start, seconds: when it is heard.
      levels: amplitude at its start and end, of 1.
      pitches: Hz at the start and end of a tone.
      timbre: of `TIMBRES`, of a tone.
    """

    kind: str
    start: float
    seconds: float
    levels: tuple[float, float]
    pitches: tuple[float, float] = (0.0, 0.0)
    timbre: str = ""

    @property
    def moment(self) -> int:
        """The one that its middle falls into."""
        return int((self.start + self.seconds / 2) / MOMENT_SECONDS)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip's contents.

    Attributes:
      family: one of `families.FAMILIES`.
      moments: `MOMENTS` of them, in order; none of a scene that is only heard.
      things: the things asked about: (it,), (first, second), all of them, or (before, after).
      fact: the family's answer: a direction, "" for order, a count, what changed ...
      events: what is heard; none of a scene that is only seen.
    """

    family: str
    moments: tuple[Moment, ...]
    things: tuple[Thing, ...]
    fact: str
    events: tuple[Event, ...] = ()


def is_heldout(pairs, fact: int = 0) -> bool:
    """Whether a combination of what is seen belongs to the held-out split.

    Args:
      pairs: (colour, shape) of each thing; their order does not matter.
      fact: number of the answer, for families that have one; it counts once per thing.
    """
    numbers = [_COLOUR_NUMBER[colour] + SHAPES.index(shape) + fact for colour, shape in pairs]
    return sum(numbers) % 6 == 0


def is_voice_heldout(voice: tuple[int, str], fact: int = 0) -> bool:
    """Whether a combination of a voice, (register, timbre), and an answer's number is held out.

    Of the answer 0 it is (1, "pure"), (0, "hollow") and (5, "bright"): neither the lowest voice of
    all, nor those between which low and high part, of which other timbres would tell too little.
    """
    register, timbre = voice
    return (register + TIMBRES.index(timbre) + fact) % 6 == 1
