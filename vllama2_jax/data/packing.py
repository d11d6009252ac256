"""Row plans: which records of a window share a row, and which rows a step.

A plan is a pure function of (seed, window) and of the records' lengths, made before anything is
read, so that every host knows the shape of every step. No record is left out: rows that do not
divide by the rows of a step leave some rows of steps empty, evenly, at most one per step more in
one than in another.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from vllama2_jax.data.mixture import permute

_ROWS, _STEPS = 3, 4  # go on from the purposes of permutations in mixture.py


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One global step.

    Attributes:
      length: slots of every row, one of the buckets.
      rows: for each row the numbers of its records in the window, in the order of the stream; an
        empty row is padding.
    """

    length: int
    rows: tuple[tuple[int, ...], ...]


def plan_window(
    lengths,
    clips,
    sounds=None,
    *,
    rows: int,
    max_length: int,
    max_clips: int,
    max_sounds: int = 0,
    packing: bool,
    buckets: Sequence[int],
    seed: int,
    window: int,
) -> tuple[StepPlan, ...]:
    """Plan the steps over one window of the stream.

    With packing, records are put best-fit, longest first, into rows of `max_length`, which are then
    dealt to steps at random. Without, each record is a row, and rows of one bucket share a step, as
    far as they fill it. The steps of a window come in random order.

    Args:
      lengths: int [n], slots that each record needs, media included; what is longer than
        `max_length` counts as that, since its reader truncates it.
      clips, sounds: int [n], of each record; None is no sounds.
      rows: of a step, on all hosts together.
      max_length: slots of the longest row.
      max_clips, max_sounds: how many a row may hold.
      packing: whether records share rows.
      buckets: the lengths that rows may have, in rising order; the last is `max_length`.
      seed, window: decide what is random.

    Returns:
      ceil(number of filled rows / rows) steps; none for an empty window.

    Raises:
      ValueError: saying which argument cannot be, and why.
    """
    lengths = np.asarray(lengths, np.int64)
    sounds = np.zeros_like(lengths) if sounds is None else sounds
    media = {"clips": (clips, max_clips), "sounds": (sounds, max_sounds)}
    media = {name: (np.asarray(of, np.int64), most) for name, (of, most) in media.items()}
    _check(lengths, media, rows, max_length, buckets)
    if not lengths.size:
        return ()
    lengths = np.minimum(lengths, max_length)
    if packing:
        filled = _best_fit(lengths, tuple(media.values()), max_length)
        row_lengths = np.array([lengths[row].sum() for row in filled])
        # At random, since rows packed one after the other hold records of the same lengths.
        order = permute(np.arange(len(filled)), len(filled), seed, _ROWS, window)
    else:
        filled, row_lengths = [[number] for number in range(len(lengths))], lengths
        # By bucket and no finer: rows are padded to it anyway, and copies of a record, of which a
        # window of a small set holds many, would otherwise stand side by side.
        shuffled = permute(np.arange(len(lengths)), len(lengths), seed, _ROWS, window)
        order = shuffled[np.argsort(np.searchsorted(buckets, lengths[shuffled]), kind="stable")]
    steps = np.array_split(order, -(-len(filled) // rows))
    plans = []
    for place in permute(np.arange(len(steps)), len(steps), seed, _STEPS, window):
        step = steps[place]
        longest = row_lengths[step].max()
        members = sorted(tuple(sorted(filled[row])) for row in step.tolist())
        members += [()] * (rows - len(members))
        length = next(int(bucket) for bucket in buckets if bucket >= longest)
        plans.append(StepPlan(length, tuple(members)))
    return tuple(plans)


def _best_fit(lengths, media, max_length: int) -> list[list[int]]:
    """Records to rows: each, from the longest on, into the fullest row that still holds it.

    Those with media go first: text then fills the rooms that media rows leave. In one order by
    length, text takes rooms that later media need (on a mixture with media in two of three records,
    11 % more rows).

    The rooms of open rows are kept as bits of one integer for each (clips left, sounds left), so
    that the smallest sufficient room is its lowest bit from the record's length on.
    """
    filled: list[list[int]] = []
    (clips, max_clips), (sounds, max_sounds) = media
    whole = (max_clips, max_sounds)
    kinds = list(itertools.product(range(max_clips + 1), range(max_sounds + 1)))
    open_rows = {kind: [[] for _ in range(max_length + 1)] for kind in kinds}
    rooms = dict.fromkeys(kinds, 0)
    sizes, needs = lengths.tolist(), list(zip(clips.tolist(), sounds.tolist(), strict=True))
    for record in np.lexsort((-lengths, -(clips + sounds))).tolist():
        size, (clips_needed, sounds_needed) = sizes[record], needs[record]
        room, left = max_length + 1, whole
        for kind in kinds:
            if kind[0] < clips_needed or kind[1] < sounds_needed:
                continue
            sufficient = rooms[kind] >> size
            if sufficient:
                smallest = size + (sufficient & -sufficient).bit_length() - 1
                if smallest < room:
                    room, left = smallest, kind
        if room > max_length:
            row, room, left = len(filled), max_length, whole
            filled.append([])
        else:
            row = open_rows[left][room].pop()
            if not open_rows[left][room]:
                rooms[left] ^= 1 << room
        filled[row].append(record)
        room, left = room - size, (left[0] - clips_needed, left[1] - sounds_needed)
        if room:
            open_rows[left][room].append(row)
            rooms[left] |= 1 << room
    return filled


def _check(lengths, media, rows, max_length, buckets):
    for name, (counts, _) in media.items():
        if lengths.ndim != 1 or lengths.shape != counts.shape:
            raise ValueError(
                f"lengths {lengths.shape} and {name} {counts.shape} must be lists of equal length"
            )
    if rows < 1:
        raise ValueError(f"a step has {rows} rows; it needs at least one")
    if list(buckets) != sorted(set(buckets)) or not buckets or buckets[-1] != max_length:
        raise ValueError(
            f"buckets {list(buckets)} must rise and end with the longest row, {max_length}"
        )
    if buckets[0] < 1:
        raise ValueError(f"buckets {list(buckets)} must be positive")
    if lengths.size and lengths.min() < 1:
        raise ValueError(
            f"record {int(np.argmin(lengths))} of the window has {lengths.min()} slots; "
            "build the length index anew"
        )
    for name, (counts, most) in media.items():
        wrong = np.flatnonzero((counts < 0) | (counts > most))
        if wrong.size:
            raise ValueError(
                f"record {wrong[0]} of the window has {counts[wrong[0]]} {name}, a row holds 0 to "
                f"{most}; raise max_{name}"
            )
