"""What is seen in Toybox: how scenes of each family are drawn by lot.

* motion: the thing steps across a 3 x 3 board, lane after lane, always the same way, and visits
  every cell once but one that is drawn uniformly. Whichever the direction, the frames are the same
  eight pictures in another order.
* order: two things are shown one after the other for equally long, wherever they stand.
* count: so many things. change: one thing changes, or what is behind it.
* bounce: one thing falls, touches the ground and rises, at one of three times; again the frames are
  the same eight pictures in another order.
"""

import dataclasses

import numpy as np

from vllama2_jax.data.toybox.scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    MOMENTS,
    PAIRS,
    SHAPES,
    SPLITS,
    TIMES,
    Moment,
    Scene,
    Thing,
    is_heldout,
)

_BOARD = 3  # cells along a side
_NORMAL = (0.13, 0.155)  # range of radii, in units of the picture's side
_SMALL, _LARGE = (0.08, 0.095), (0.145, 0.165)
# When the first (A) and the second (B) thing are in the picture, for equally long.
_ORDERS = ("AAAABBBB", "AAA..BBB", ".AAA.BBB", "AAA.BBB.", "AA..BB..", "..AA..BB")
# Of what bounces: where its centre is on the ground, how far it moves in a moment, and at most. Two
# moments' way, so that every bounce consists of the same eight pictures, whenever it is.
_GROUND, _FALL, _HEIGHT = 0.82, 0.25, 0.5


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


MOTIONS = {split: _motions(split) for split in SPLITS}


def motion(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    *pair, direction = MOTIONS[split][stratum]
    path = direction_path(direction, rng.permutation(_BOARD), int(rng.integers(_BOARD**2)))
    shift = rng.uniform(-0.015, 0.015, size=2)
    start = _thing(rng, pair, path[0])
    background = _background(rng)
    moments = []
    for cell in path:
        x, y = _centre(cell) + shift
        moments.append(Moment(background, (dataclasses.replace(start, x=x, y=y),)))
    return Scene("motion", tuple(moments), (start,), direction)


def order(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
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


def count(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
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


def change(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
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


def bounce(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    pairs = [pair for pair in PAIRS if is_heldout([pair], stratum) == (split == "heldout")]
    when = list(TIMES)[stratum]
    thing, moments = bouncing(rng, pairs[rng.integers(len(pairs))], TIMES[when])
    return Scene("bounce", moments, (thing,), when)


def bouncing(rng, pair, when: int) -> tuple[Thing, tuple[Moment, ...]]:
    """A thing that touches the ground at a moment, and what is seen of it."""
    thing, background = _thing(rng, pair, _cell(rng)), _background(rng)
    heights = np.minimum(_FALL * np.abs(np.arange(MOMENTS) - when), _HEIGHT)
    places = (dataclasses.replace(thing, y=float(_GROUND - height)) for height in heights)
    return thing, tuple(Moment(background, (place,)) for place in places)


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
