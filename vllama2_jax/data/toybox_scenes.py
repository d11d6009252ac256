"""Toybox's scenes: what is in a clip, moment by moment, and how it is drawn.

A clip is `MOMENTS` moments, each held for `HOLD` video frames, so that `MOMENTS` uniformly sampled
frames see each moment exactly once. Scenes are built so that a single frame, or the frames without
their order, say nothing about the two temporal questions:

* direction: the thing steps across a 3 x 3 board, lane after lane, always the same way, and visits
  every cell once but one that is drawn uniformly. Whichever the direction, the frames are the same
  eight pictures in another order.
* order: two things are shown one after the other for equally long, wherever they stand.

A scene is held out if its combination says so (`is_heldout`): one sixth of all combinations of
colours, shapes and answer, for example of (colour, shape, direction), is never seen in training.
"""

import dataclasses
import math

import numpy as np

MOMENTS = 8
HOLD = 3
SPLITS = ("train", "heldout")
FAMILIES = ("motion", "order", "count", "change")

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

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

_BOARD = 3  # cells along a side
_NORMAL = (0.13, 0.155)  # range of radii, in units of the picture's side
_SMALL, _LARGE = (0.08, 0.095), (0.145, 0.165)
_COLOUR_NUMBER = {colour: number for number, colour in enumerate(COLOURS)}
# When the first (A) and the second (B) thing are in the picture, for equally long.
_ORDERS = ("AAAABBBB", "AAA..BBB", ".AAA.BBB", "AAA.BBB.", "AA..BB..", "..AA..BB")


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
class Scene:
    """A clip's contents.

    Attributes:
      family: one of `FAMILIES`.
      moments: `MOMENTS` of them, in order.
      things: the things asked about: (it,), (first, second), all of them, or (before, after).
      fact: the family's answer: a direction, "" for order, a count, or what changed.
    """

    family: str
    moments: tuple[Moment, ...]
    things: tuple[Thing, ...]
    fact: str


def is_heldout(pairs, fact: int = 0) -> bool:
    """Whether a combination belongs to the held-out split.

    Args:
      pairs: (colour, shape) of each thing; their order does not matter.
      fact: number of the answer, for families that have one; it counts once per thing.
    """
    numbers = [_COLOUR_NUMBER[colour] + SHAPES.index(shape) + fact for colour, shape in pairs]
    return sum(numbers) % 6 == 0


def strata(family: str, split: str) -> int:
    """How many values of `stratum` in `sample_scene` cover a family's answers evenly."""
    return {
        "motion": len(_MOTIONS[split]),
        "order": len(PAIRS),
        "count": len(COUNTS),
        "change": len(CHANGES),
    }[family]


def sample_scene(
    rng: np.random.Generator, split: str, family: str | None = None, stratum: int | None = None
) -> Scene:
    """Draw a scene.

    Args:
      rng: the only source of chance.
      split: "train" or "heldout"; decides which combinations may appear.
      family: one of `FAMILIES`, or None to draw it.
      stratum: which answer the scene has, modulo `strata`; None draws it. Counting upwards gives
        every answer equally often.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    family = family or FAMILIES[rng.integers(len(FAMILIES))]
    if family not in FAMILIES:
        raise ValueError(f"unknown scene family {family!r}; known: {', '.join(FAMILIES)}")
    size = strata(family, split)
    stratum = int(rng.integers(size)) if stratum is None else stratum % size
    sampler = {"motion": _motion, "order": _order, "count": _count, "change": _change}[family]
    return sampler(rng, split, stratum)


def direction_path(direction: str, lanes, start: int) -> list[tuple[int, int]]:
    """The `MOMENTS` cells (column, row) that a thing visits.

    Args:
      direction: one of `DIRECTIONS`.
      lanes: the order in which rows (left, right) or columns (up, down) are crossed.
      start: 0 to 8, where in the closed tour over the nine cells the clip begins; the cell in
        front of it is the one left out.
    """
    tour = []
    for lane in lanes:
        for step in range(_BOARD):
            along = step if direction in ("right", "down") else _BOARD - 1 - step
            tour.append((along, lane) if direction in ("left", "right") else (lane, along))
    return [tour[(start + i) % len(tour)] for i in range(MOMENTS)]


def _motions(split: str) -> list[tuple[str, str, str]]:
    """A split's combinations of (colour, shape, direction), any stretch of them nearly balanced."""
    by_direction = [
        [p for p in PAIRS if is_heldout([p], d) == (split == "heldout")]
        for d in range(len(DIRECTIONS))
    ]
    return [
        (*pairs[(turn + d) % len(pairs)], DIRECTIONS[d])
        for turn in range(len(by_direction[0]))
        for d, pairs in enumerate(by_direction)
    ]


_MOTIONS = {split: _motions(split) for split in SPLITS}


def _motion(rng, split, stratum) -> Scene:
    *pair, direction = _MOTIONS[split][stratum]
    path = direction_path(direction, rng.permutation(_BOARD), int(rng.integers(_BOARD**2)))
    shift = rng.uniform(-0.015, 0.015, size=2)
    start = _thing(rng, pair, path[0])
    background = _background(rng)
    moments = []
    for cell in path:
        x, y = _centre(cell) + shift
        moments.append(Moment(background, (dataclasses.replace(start, x=x, y=y),)))
    return Scene("motion", tuple(moments), (start,), direction)


def _order(rng, split, stratum) -> Scene:
    # The two differ in both colour and shape, so that either word tells them apart.
    colour, shape = PAIRS[stratum]
    others = [
        p
        for p in PAIRS
        if p[0] != colour
        and p[1] != shape
        and is_heldout([(colour, shape), p]) == (split == "heldout")
    ]
    pairs = [(colour, shape), others[rng.integers(len(others))]]
    # Things differ in how many others they may appear with; a coin makes both ways round as likely.
    if rng.random() < 0.5:
        pairs.reverse()
    first, second = (_thing(rng, pair, _cell(rng)) for pair in pairs)
    background = _background(rng)
    shown = {"A": (first,), "B": (second,), ".": ()}
    pattern = _ORDERS[rng.integers(len(_ORDERS))]
    moments = tuple(Moment(background, shown[letter]) for letter in pattern)
    return Scene("order", moments, (first, second), "")


def _count(rng, split, stratum) -> Scene:
    cells = rng.permutation(_BOARD**2)[: stratum + 1]
    while True:
        pairs = [PAIRS[rng.integers(len(PAIRS))] for _ in cells]
        if is_heldout(pairs, stratum) == (split == "heldout"):
            break
    things = tuple(
        _thing(rng, pair, divmod(int(cell), _BOARD))
        for pair, cell in zip(pairs, cells, strict=True)
    )
    return Scene("count", (Moment(_background(rng), things),) * MOMENTS, things, COUNTS[stratum])


def _change(rng, split, stratum) -> Scene:
    what = CHANGES[stratum]
    while True:
        before = PAIRS[rng.integers(len(PAIRS))]
        after = _another(rng, before, what)
        if is_heldout([before, after], stratum) == (split == "heldout"):
            break
    thing, background = _thing(rng, before, _cell(rng)), _background(rng)
    changed, background_after = thing, background
    if what == "colour":
        changed = dataclasses.replace(thing, colour=after[0], rgb=_shade(rng, after[0]))
    elif what == "shape":
        changed = dataclasses.replace(thing, shape=after[1])
    elif what == "size":
        sizes = [rng.uniform(*_SMALL), rng.uniform(*_LARGE)]
        grows = rng.random() < 0.5
        thing = dataclasses.replace(thing, radius=sizes[not grows])
        changed = dataclasses.replace(thing, radius=sizes[grows])
    else:
        background_after = _background(rng, dark=sum(background) > 3 * 127)
    when = int(rng.integers(3, 6))
    moments = (Moment(background, (thing,)),) * when
    moments += (Moment(background_after, (changed,)),) * (MOMENTS - when)
    return Scene("change", moments, (thing, changed), what)


def _another(rng, pair, what):
    """The (colour, shape) pair after a change."""
    colour, shape = pair
    if what == "colour":
        others = [c for c in COLOURS if c != colour]
        return others[rng.integers(len(others))], shape
    if what == "shape":
        others = [s for s in SHAPES if s != shape]
        return colour, others[rng.integers(len(others))]
    return pair


def _cell(rng) -> tuple[int, int]:
    return int(rng.integers(_BOARD)), int(rng.integers(_BOARD))


def _centre(cell) -> np.ndarray:
    return (np.asarray(cell) + 0.5) / _BOARD


def _thing(rng, pair, cell) -> Thing:
    x, y = _centre(cell) + rng.uniform(-0.015, 0.015, size=2)
    return Thing(*pair, _shade(rng, pair[0]), float(x), float(y), float(rng.uniform(*_NORMAL)))


def _shade(rng, colour) -> tuple[int, int, int]:
    jitter = rng.integers(-12, 13, size=3)
    return tuple(int(v) for v in np.clip(np.asarray(COLOURS[colour]) + jitter, 0, 255))


def _background(rng, dark: bool | None = None) -> tuple[int, int, int]:
    dark = rng.random() < 0.5 if dark is None else dark
    level = rng.integers(70, 105) if dark else rng.integers(150, 185)
    return tuple(int(level + v) for v in rng.integers(-4, 5, size=3))


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw each moment once: uint8 [MOMENTS, size, size, 3], edges smoothed over one pixel."""
    drawn: dict[Moment, np.ndarray] = {}
    for moment in scene.moments:
        if moment not in drawn:
            drawn[moment] = _draw(moment, size)
    return np.stack([drawn[moment] for moment in scene.moments])


def _draw(moment: Moment, size: int) -> np.ndarray:
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = moment.background
    for thing in moment.things:
        radius = thing.radius * size
        x, y = thing.x * size, thing.y * size
        reach = radius + 2
        left, top = max(int(x - reach), 0), max(int(y - reach), 0)
        right, bottom = min(int(x + reach) + 1, size), min(int(y + reach) + 1, size)
        # Pixel centres relative to the thing's centre.
        dx = np.arange(left, right, dtype=np.float32) + 0.5 - x
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
        cover = np.clip(0.5 - _distance(thing.shape, dx, dy, radius), 0, 1)[..., None]
        region = picture[top:bottom, left:right]
        region += cover * (np.asarray(thing.rgb, np.float32) - region)
    return np.rint(picture).astype(np.uint8)


def _distance(shape: str, x, y, radius: float) -> np.ndarray:
    """Signed distance in pixels to a shape's edge, negative inside (exact near the edge)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        arm = 0.34 * radius
        upright = np.maximum(x - arm, y - radius)
        return np.minimum(upright, np.maximum(x - radius, y - arm))
    if shape == "triangle":
        corners = _corners(3, radius * 1.12, radius * 1.12) + (0, 0.15 * radius)
    else:
        corners = _corners(5, radius * 1.1, radius * 0.45)
    return _polygon(corners, x, y)


def _corners(points: int, outer: float, inner: float) -> np.ndarray:
    """Corners [2 * points, 2] of a regular polygon, or a star if `inner` differs; one on top."""
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    # A polygon's edge midpoints lie at cos(pi / n) of its corners.
    inner = inner * math.cos(math.pi / points) if inner == outer else inner
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _polygon(corners: np.ndarray, x, y) -> np.ndarray:
    """Signed distance to a closed polygon: nearest edge, and the even-odd rule for the sign."""
    nearest, inside = np.inf, np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)
