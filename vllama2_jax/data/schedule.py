"""Which records every step reads, for the whole run, known before its first step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllama2_jax.data.mixture import Mixture
from vllama2_jax.data.packing import StepPlan, plan_window


class Step(NamedTuple):
    """What one global step reads.

    Attributes:
      number: of the step, from 0.
      length: slots of its rows.
      rows: for each row of all hosts the (source, record) pairs that share it.
    """

    number: int
    length: int
    rows: tuple[tuple[tuple[int, int], ...], ...]


class Schedule:
    """The steps of a run: `len` of them, and `schedule[step]` is a `Step`.

    Step k is a function of the arguments and k alone, so a run that stops continues with step k on
    any number of hosts and workers. Windows are planned one by one when a step of theirs is asked
    for; only their numbers of steps are kept.
    """

    def __init__(
        self,
        mixture: Mixture,
        lengths: Sequence[np.ndarray],
        clips: Sequence[np.ndarray],
        sounds: Sequence[np.ndarray] | None = None,
        *,
        rows: int,
        max_length: int,
        max_clips: int,
        max_sounds: int = 0,
        packing: bool,
        buckets: Sequence[int],
        epochs: int | None = None,
        num_steps: int | None = None,
        window: int = 1 << 14,
    ):
        """Count the steps.

        Args:
          mixture: the stream of records; its seed also decides the plans.
          lengths, clips, sounds: of each source's records, see `plan_window`.
          rows, max_length, max_clips, max_sounds, packing, buckets: see `plan_window`.
          epochs: how often to read a mixture that has an end.
          num_steps: how many steps to take, instead.
          window: positions of the stream that are planned together.

        Raises:
          ValueError: saying which argument cannot be, and why.
        """
        if (epochs is None) == (num_steps is None):
            raise ValueError("give either epochs or num_steps")
        if min(epochs or 1, num_steps or 1, window) < 1 or 0 in (epochs, num_steps):
            raise ValueError(
                f"epochs {epochs}, num_steps {num_steps} and window {window} must be at least 1"
            )
        sizes = tuple(len(array) for array in lengths)
        sounds = [np.zeros_like(of) for of in clips] if sounds is None else sounds
        known = [tuple(len(array) for array in of) for of in (clips, sounds)]
        if sizes != mixture.sizes or known != [sizes, sizes]:
            raise ValueError(
                f"the length index covers {sizes} records, the mixture's sources hold "
                f"{mixture.sizes}; build the index anew"
            )
        self._mixture = mixture
        # One array for all sources, so that a window is one gather.
        self._begins = np.cumsum((0, *sizes[:-1]))
        arrays = (lengths, clips, sounds)
        self._lengths, self._clips, self._sounds = map(np.concatenate, arrays)
        self._how = dict(
            rows=rows,
            max_length=max_length,
            max_clips=max_clips,
            max_sounds=max_sounds,
            packing=packing,
            buckets=tuple(buckets),
            seed=mixture.seed,
        )
        self._window = window
        self._end = None if epochs is None else epochs * len(mixture)
        self._cached: tuple[int, tuple, np.ndarray, np.ndarray] | None = None
        self.rows, self.max_clips, self.max_sounds = rows, max_clips, max_sounds
        # The first step of each window, and the number of all steps behind them.
        self._first_steps = self._count(num_steps)
        self._num_steps = num_steps or int(self._first_steps[-1])

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, number: int) -> Step:
        if not 0 <= number < len(self):
            raise IndexError(f"step {number} is not one of the {len(self)} steps of this run")
        window = int(np.searchsorted(self._first_steps, number, side="right")) - 1
        plans, sources, records = self._plan(window)
        plan = plans[number - self._first_steps[window]]
        rows = tuple(
            tuple((int(sources[place]), int(records[place])) for place in row) for row in plan.rows
        )
        return Step(int(number), plan.length, rows)

    def slots(self, source: int, record: int) -> int:
        """Slots that a record takes."""
        return int(min(self._lengths[self._begins[source] + record], self._how["max_length"]))

    def __getstate__(self) -> dict:
        """All but the planned window, which would travel to every worker."""
        return {**self.__dict__, "_cached": None}

    def _count(self, num_steps: int | None) -> np.ndarray:
        first = [0]
        while first[-1] < num_steps if num_steps else (len(first) - 1) * self._window < self._end:
            first.append(first[-1] + len(self._plan(len(first) - 1)[0]))
        return np.asarray(first)

    def _plan(self, window: int) -> tuple[tuple[StepPlan, ...], np.ndarray, np.ndarray]:
        cached = self._cached
        if cached is None or cached[0] != window:
            begin = window * self._window
            end = (
                begin + self._window if self._end is None else min(begin + self._window, self._end)
            )
            sources, records = self._mixture.locate(np.arange(begin, end))
            places = self._begins[sources] + records
            arrays = (of[places] for of in (self._lengths, self._clips, self._sounds))
            plans = plan_window(*arrays, window=window, **self._how)
            # One assignment, so that threads never see half of it.
            cached = self._cached = (window, plans, sources, records)
        return cached[1:]
