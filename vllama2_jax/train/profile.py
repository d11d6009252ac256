"""A trace of some steps for XProf (`xprof RUN/profile`)."""

import dataclasses
from pathlib import Path

import jax


@dataclasses.dataclass
class Profile:
    """Traces the steps `first` to `last`, both counted from 1.

    Attributes:
      folder: where the trace goes.
      first, last: steps; 0 traces nothing.
    """

    folder: Path
    first: int = 0
    last: int = 0

    def __post_init__(self):
        """Refuse a window that cannot be."""
        if (self.first or self.last) and not 1 <= self.first <= self.last:
            raise ValueError(
                f"a profile of steps {self.first} to {self.last} is empty; give FIRST:LAST, "
                "counted from 1"
            )
        self._running = False

    def borders(self, step: int) -> bool:
        """Whether the window begins or ends behind this step, so that the device must be idle."""
        return step in (self.first - 1, self.last)

    def reached(self, step: int) -> None:
        """Called in front of the first step and behind every one; `step` are done."""
        if self._running and step >= self.last:
            self.close()
        elif not self._running and self.first <= step + 1 <= self.last:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def close(self) -> None:
        """End a trace that is still open."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
