"""From arrays in a host's memory to arrays that are split over devices, and the other way about."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.vllama2 import BATCH_AXES, Batch


class Shards:
    """An array that is filled part by part; each process holds only what its devices hold.

    A stack of 32 layers of Mixtral's experts is 30 GB; of 64 devices that share it, the four of a
    host take 2 GB, and what is read at a time is one expert of one layer.
    """

    def __init__(self, shape: tuple[int, ...], dtype, sharding: NamedSharding | None):
        """Take host memory for the parts of this process's devices.

        Args:
          shape: of the whole array.
          dtype: of it.
          sharding: where it will lie; None is the default device.
        """
        self._shape, self._sharding = shape, sharding
        if sharding is None:
            self._buffers = {tuple((0, size) for size in shape): np.empty(shape, dtype)}
            return
        self._places = {
            device: _bounds(index, shape)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        self._buffers = {
            bounds: np.empty([end - begin for begin, end in bounds], dtype)
            for bounds in set(self._places.values())
        }

    def write(self, index: tuple[int, ...], part: np.ndarray) -> None:
        """Fill in `array[index] = part`, for leading axes' numbers."""
        for bounds, buffer in self._buffers.items():
            own = bounds[: len(index)]
            if all(begin <= i < end for i, (begin, end) in zip(index, own, strict=True)):
                local = tuple(i - begin for i, (begin, _) in zip(index, own, strict=True))
                buffer[local] = part[tuple(slice(*ends) for ends in bounds[len(index) :])]

    def array(self) -> jax.Array:
        """The whole array; what was not written is undefined."""
        if self._sharding is None:
            (buffer,) = self._buffers.values()
            return jax.device_put(buffer)
        parts = [
            jax.device_put(self._buffers[bounds], device) for device, bounds in self._places.items()
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def place(leaves: Mapping[str, jax.Array], where: Mapping[str, NamedSharding]) -> dict:
    """The same arrays, where they shall lie; those that lie there already are not copied.

    Args:
      leaves: {path: array}, of all processes.
      where: {path: sharding}.
    """
    astray = {
        path: leaf
        for path, leaf in leaves.items()
        if not leaf.sharding.is_equivalent_to(where[path], leaf.ndim)
    }
    if not astray:
        return dict(leaves)
    moved = jax.jit(
        lambda tree: tree, out_shardings={path: where[path] for path in astray}, donate_argnums=0
    )(astray)
    return {**leaves, **moved}


def place_batch(layout: Layout, batch: Batch, rows: int) -> Batch:
    """A batch of all processes from this one's rows of it.

    Args:
      layout: how it is split.
      batch: of NumPy arrays [this process's rows, ...].
      rows: of the whole.
    """

    def put(array, names):
        if array is None:
            return None
        shape = (rows, *array.shape[1:])
        where = layout.sharding(names, shape)
        return jax.make_array_from_process_local_data(where, array, shape)

    return Batch(**{name: put(getattr(batch, name), names) for name, names in BATCH_AXES.items()})


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Which rows of a step this process reads: share number i of n equal ones.

    Processes whose devices hold the same rows, as where a row's heads or slots are split between
    them, read the same share.

    Args:
      sharding: of an array [rows].
      rows: of a step.

    Raises:
      ValueError: if they do not divide, or a process's rows do not lie next to each other.
    """
    held: dict[int, set[tuple[int, int]]] = {}
    for device, index in sharding.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).add(_bounds(index, (rows,))[0])
    mine = sorted(held[jax.process_index()])
    begin, end = mine[0][0], mine[-1][1]
    joined = all(a[1] == b[0] for a, b in itertools.pairwise(mine))
    if not joined or begin % (end - begin) or rows % (end - begin):
        raise ValueError(
            f"rows of this process do not lie next to each other ({mine} of {rows}); let the mesh "
            "split rows over whole hosts"
        )
    return begin // (end - begin), rows // (end - begin)
