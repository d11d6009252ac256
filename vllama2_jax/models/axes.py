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
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Names = Sequence[str | None]

# Under which `jax.checkpoint` knows arrays that were gathered: kept for the backward pass, they
# would fill every device with whole kernels.
GATHERED = "gathered"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes each logical axis is split over.

    Attributes:
      mesh: of devices, or the shape of one.
      rules: {logical name: mesh axes}, slowest first; () is split over none.
      expert_exchange: of `VLlama2`, where experts are split over the devices of tokens.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]]
    expert_exchange: str = "ring"

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

    def stages(self, name: str | None) -> tuple[tuple[str, list[list[int]] | None], ...]:
        """In which steps the parts of a logical axis are best gathered, one after the other.

        A TPU gathers and scatters along one or two dimensions of its torus. Over three, XLA makes
        an all-reduce of the whole of either, which sends twice as much; so it does of some that lie
        along two dimensions of unlike lengths (libtpu 0.0.42). Slices, which another network joins,
        are a step of their own.

        Returns:
          pairs of a mesh axis and the groups of its devices that exchange (None: all of them), as
          `jax.lax.all_gather` takes them; what lies next to each other comes first.
        """
        return tuple(
            (axis, groups)
            for axis in reversed(self.axes(name))
            for groups in _stages(self._places(axis))
        )

    def _places(self, axis: str) -> np.ndarray | None:
        """Slice and coordinates of devices [lines, along a mesh axis, 4]; None but for TPUs."""
        if isinstance(self.mesh, AbstractMesh) or not hasattr(self.mesh.devices.flat[0], "coords"):
            return None
        devices = np.moveaxis(self.mesh.devices, self.mesh.axis_names.index(axis), -1)
        places = [(getattr(d, "slice_index", 0), *d.coords) for d in devices.flat]
        return np.array(places).reshape(-1, devices.shape[-1], len(places[0]))

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


def _stages(places) -> list[list[list[int]] | None]:
    """Groups of devices that exchange, each along one or two dimensions: neighbours first."""
    if places is None:
        return [None]
    stages, count = [], places.shape[1]
    block = count
    while block > 1:
        # The last step: from blocks of `step` devices, as few as may be, to blocks of `block`; but
        # squares are preferred.
        steps = [step for step in range(1, block) if block % step == 0]
        grids = {
            step: places.reshape(len(places), count // block, block // step, step, -1)
            for step in steps
        }
        possible = [step for step in steps if _may_exchange(grids[step])]
        if not possible:
            return [None]
        if block == count and possible[0] == 1:
            return [None]  # all at once
        step = next((step for step in possible if _is_square(grids[step])), possible[0])
        numbers = np.arange(count).reshape(count // block, block // step, step)
        stages.append(numbers.swapaxes(1, 2).reshape(-1, block // step).tolist())
        block = step
    return stages[::-1] if len(stages) > 1 else [None]


def _may_exchange(grid) -> bool:
    """Whether groups lie along two dimensions at most, devices [..., group, :, 4]."""
    varies = grid.max(2) != grid.min(2)
    # Slices talk over another network, never together with the links of one.
    return (varies[..., 1:].sum(-1) + 2 * varies[..., 0]).max() <= 2


def _is_square(grid) -> bool:
    """Whether groups are squares without gaps, or lines."""
    sizes = (grid.max(2) - grid.min(2) + 1).reshape(-1, grid.shape[-1])
    return all(
        len({size for size in box if size > 1}) < 2 and math.prod(box) == grid.shape[2]
        for box in sizes.tolist()
    )


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


def behind(x: jax.Array, earlier: jax.Array) -> jax.Array:
    """`x`, which simulated devices can have only when `earlier` is there.

    XLA for CPUs runs what needs nothing of each other at once, also loops whose turns exchange
    arrays. Between processes Gloo has one channel for all, so that two such loops take each other's
    messages ("Received data size doesn't match expected size"). Gradients are not kept apart.

    Args:
      x: floats [B, ...].
      earlier: of the same rows [B, ...].
    """
    if layout_in_force() is None:
        return x

    def after(x, earlier):
        first = jax.lax.stop_gradient(earlier).reshape(len(x), -1)[:, 0]
        nothing = jnp.minimum(jnp.abs(first), 0).astype(x.dtype)  # which XLA does not know
        return x + nothing.reshape(-1, *[1] * (x.ndim - 1))

    return jax.lax.platform_dependent(x, earlier, cpu=after, default=lambda x, earlier: x)


def gather(x: jax.Array, names: Names, layout: Layout | None, kept: Names = ()) -> jax.Array:
    """Inside `per_device`: an array's parts from all devices, so that its gradient is scattered.

    Args:
      x: this device's part.
      names: of its axes.
      layout: what was in force outside; None gathers nothing.
      kept: names of axes that stay split.
    """
    for index, name in enumerate(names):
        for mesh_axis, groups in layout.stages(name) if layout and name not in kept else ():
            x = jax.lax.all_gather(x, mesh_axis, axis_index_groups=groups, axis=index, tiled=True)
            x = checkpoint_name(x, GATHERED)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_of_shares(x, axes):
    """Inside `per_device`: the sum over devices that all go on with it.

    Their gradients are alike, and need no sum.

    Args:
      x: this device's share.
      axes: of the mesh.
    """
    return jax.lax.psum(x, axes)


sum_of_shares.defvjp(
    lambda x, axes: (sum_of_shares(x, axes), None),
    lambda axes, _, grad: (grad * jax.lax.axis_size(axes),),
)


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

    Raises:
      ValueError: when called with arrays that the layout does not split evenly.
    """
    layout = layout_in_force()
    if layout is None:
        return function

    def local(*args):
        with using(None):
            return function(*args)

    specs = functools.partial(jax.tree.map, layout.spec, is_leaf=_is_names)
    apart = jax.shard_map(
        functools.wraps(function)(local),
        mesh=layout.mesh,
        in_specs=specs(in_names),
        out_specs=specs(out_names),
        check_vma=False,
    )

    def checked(*args):
        jax.tree.map(functools.partial(_check_even, layout), in_names, args, is_leaf=_is_names)
        return apart(*args)

    return checked


def _check_even(layout, names, arrays):
    """Refuse in words what `jax.shard_map` refuses in pages."""
    for array in jax.tree.leaves(arrays):
        for name, size in zip(names, array.shape, strict=False):
            if size % layout.size(name):
                raise ValueError(
                    f"an array {list(array.shape)} has {size} of {name!r}, which do not divide "
                    f"over {layout.size(name)} parts of the mesh; choose other sizes of its axes "
                    f"{', '.join(layout.axes(name))}"
                )


def _is_names(value) -> bool:
    return isinstance(value, tuple) and all(part is None or isinstance(part, str) for part in value)
