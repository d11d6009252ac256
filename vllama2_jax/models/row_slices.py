"""Rows whose slots lie on several devices: who attends for which of them.

Every device holds a slice of each row. It gathers the keys and values of whole rows (their
gradients leave as reduce-scatters) and attends for as many queries as its slice has. In causal
attention late queries see more keys than early ones, so devices exchange the second halves of their
queries with the device opposite: of n slices, i and n - 1 - i. Each then has one early and one late
half, and all have the same work. Why keys are gathered, and not passed round a ring, says
docs/decisions/attention.md.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Slices:
    """How the slots of every row are split; by default not at all.

    Attributes:
      axes: mesh axes that they are split over, slowest first.
      count: slices of a row.
      balanced: whether second halves are exchanged.
    """

    axes: tuple[str, ...] = ()
    count: int = 1
    balanced: bool = False

    def slots(self, length: int) -> np.ndarray:
        """Slots of the queries that each device attends for, int32 [count, length].

        Args:
          length: of a slice.
        """
        slots = np.arange(self.count * length, dtype=np.int32).reshape(self.count, length)
        if self.balanced:
            late = length - length // 2
            slots[:, late:] = slots[::-1, late:].copy()
        return slots

    def index(self) -> jax.Array | int:
        """Which slice this device has."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def gather(self, x: jax.Array) -> jax.Array:
        """Whole rows [B, count * L, ...] of this device's slice [B, L, ...]."""
        if not self.axes:
            return x
        # Along a new axis in front: XLA for TPUs makes the gradient's reduce-scatter along another
        # axis an all-reduce where the rows are long.
        slices = jax.lax.all_gather(x, self.axes, axis=0)
        return jnp.moveaxis(slices, 0, 1).reshape(len(x), -1, *x.shape[2:])

    def exchange(self, x: jax.Array) -> jax.Array:
        """What `slots` says, of the slice [B, L, ...] that lies here; and back again."""
        half = x.shape[1] // 2
        if not (self.axes and self.balanced and half):
            return x
        early, late = x[:, :-half], x[:, -half:]
        opposite = [(i, self.count - 1 - i) for i in range(self.count)]
        return jnp.concatenate([early, jax.lax.ppermute(late, self.axes, opposite)], axis=1)


WHOLE = Slices()


def shared_heads(x: jax.Array, parts: int) -> jax.Array:
    """Key-value heads repeated as far as needed to be split into `parts`, [B, S, KV', D].

    Each part then has the heads of its own query heads, if these are split likewise.
    """
    return jnp.repeat(x, parts // math.gcd(parts, x.shape[2]), axis=2)
