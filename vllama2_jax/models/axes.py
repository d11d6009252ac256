"""Names of array axes, and what a layout makes of them.

Networks name the axes of their parameters and activations and know no mesh. Who runs them on
several devices wraps the call in `using(layout)`, inside the function that is jitted, so that the
layout is part of the program:

    def step(state, batch):
        with using(layout):
            ...

Without a layout every function here does nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Names = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes each logical axis is split over.

    Attributes:
      mesh: of devices, or the shape of one.
      rules: {logical name: mesh axes}, slowest first; () is split over none.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]]

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes that a logical axis is split over, without those of size 1.

        Raises:
          ValueError: for a name that no rule knows.
        """
        if name is None:
            return ()
        if name not in self.rules:
            known = ", ".join(sorted(self.rules))
            raise ValueError(f"no rule says how the axis {name!r} is split; known: {known}")
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1)

    def size(self, name: str | None) -> int:
        """Into how many parts a logical axis is split."""
        return self._parts(self.axes(name))

    def _parts(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def spec(self, names: Names, shape: Sequence[int] | None = None) -> PartitionSpec:
        """How an array with such axes is split.

        Args:
          names: of its axes; None is split over nothing.
          shape: of the array; an axis is split over as many of its mesh axes, slowest first, as
            divide its size.

        Raises:
          ValueError: if two axes would be split over the same mesh axis, or names are unknown.
        """
        entries, taken = [], {}
        for index, name in enumerate(names):
            axes = self.axes(name)
            for axis in axes:
                if axis in taken:
                    raise ValueError(
                        f"{taken[axis]!r} and {name!r}, axes of one array, would both be split "
                        f"over {axis!r}; give one of them another rule"
                    )
                taken[axis] = name
            while shape is not None and shape[index] % self._parts(axes):
                axes = axes[:-1]
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)

    def sharding(self, names: Names, shape: Sequence[int] | None = None) -> NamedSharding:
        """The same as a sharding of the mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))


_IN_FORCE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def layout_in_force() -> Layout | None:
    """The layout of the innermost `using`."""
    return _IN_FORCE.get()


@contextlib.contextmanager
def using(layout: Layout | None):
    """Have networks that are traced inside split their arrays as `layout` says; None: not."""
    token = _IN_FORCE.set(layout)
    try:
        yield
    finally:
        _IN_FORCE.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, split as the layout says of axes with these names; gradients likewise."""
    layout = layout_in_force()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(names, x.shape))


def divisible(name: str, size: int) -> str | None:
    """A name for `per_device`: `name`, or None where its mesh axes do not divide `size`."""
    layout = layout_in_force()
    return name if layout is None or size % layout.size(name) == 0 else None


def per_device(function: Callable, in_names, out_names) -> Callable:
    """`function` of each device's own parts (`jax.shard_map` over the whole mesh).

    Inside, mesh axes may be named in collectives (`Layout.axes` says which); no layout is in force,
    so that `constrain` does nothing.

    Args:
      function: of arrays, or trees of them.
      in_names: of each argument a tuple of axis names, or a tree of such.
      out_names: of the result, likewise.

    Returns:
      `function` itself where no layout is in force.
    """
    layout = layout_in_force()
    if layout is None:
        return function

    def local(*args):
        with using(None):
            return function(*args)

    specs = functools.partial(jax.tree.map, layout.spec, is_leaf=_is_names)
    return jax.shard_map(
        functools.wraps(function)(local),
        mesh=layout.mesh,
        in_specs=specs(in_names),
        out_specs=specs(out_names),
        check_vma=False,
    )


def _is_names(value) -> bool:
    return isinstance(value, tuple) and all(part is None or isinstance(part, str) for part in value)
