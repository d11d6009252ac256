"""How every parameter of a model lies on a mesh, as lines that people read and tests compare."""

import collections
import math
import re
from collections.abc import Mapping

import jax

from vllama2_jax.models.axes import Layout
from vllama2_jax.parallel.sharding import leaf_axes


def sharding_table(
    layout: Layout,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    named: Mapping[str, tuple[str, ...]],
) -> list[str]:
    """One line per parameter: path, shape, split, bytes on each device; the last has the sums.

    Parameters that differ in the number of a block alone share a line that ends with their number,
    "vision/block_*/mlp/fc1/kernel  1024x4096  fsdp,-  131072  x23".

    Args:
      layout: `Layout(AbstractMesh(...), LAYOUTS[...])`; no devices are needed.
      leaves: {path: array or shape}.
      named: of `sharding.param_axes`.

    Raises:
      ValueError: for a parameter whose axes have no names, or names that no rule knows, or two axes
        that would be split over the same axis of the mesh.
    """
    rows = collections.defaultdict(list)
    count = size = 0
    for path, leaf in leaves.items():
        try:
            spec = layout.spec(leaf_axes(path, named)[: len(leaf.shape)], leaf.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(path + ': ')}") from None
        entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
        parts = math.prod(layout.mesh.shape[axis] for axes in entries for axis in axes)
        bytes_here = math.prod(leaf.shape) * leaf.dtype.itemsize // parts
        shape = "x".join(map(str, leaf.shape))
        split = ",".join("+".join(axes) or "-" for axes in entries)
        rows[re.sub(r"_\d+(?=/)", "_*", path), shape, split, bytes_here].append(path)
        count += math.prod(leaf.shape)
        size += bytes_here
    lines = [
        f"{path if len(paths) > 1 else paths[0]}  {shape}  {split}  {bytes_here}"
        + (f"  x{len(paths)}" if len(paths) > 1 else "")
        for (path, shape, split, bytes_here), paths in rows.items()
    ]
    return [*lines, f"{count} parameters, {size} bytes on each device"]
