"""Whether a mesh splits a network as it says: the one place where sizes are held against it.

`axes.Layout.spec` leaves whole what a mesh axis does not divide, which suits towers, norms and the
keys and values of few heads. A language model that is not split fills every device.
"""

import itertools
import math
from collections.abc import Iterable, Mapping

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.mesh import MeshConfig, axes_in_words
from vllama2_jax.parallel.rules import MESH_AXES


def check_network(
    mesh: MeshConfig, layout: Layout, network: VLlama2Config, lengths: Iterable[int] = ()
) -> None:
    """Refuse a mesh that does not divide the language model, or rows of known lengths.

    Args:
      mesh: how it is laid out.
      layout: made of it.
      network: that shall be split.
      lengths: slots that rows may have.

    Raises:
      ValueError: naming the axes of the mesh, the size that they do not divide, and what would do.
    """
    sizes = _sizes(network)
    for name, (what, size) in sizes.items():
        if size % layout.size(name):
            (held,) = layout.sharding((name,), (size,)).shard_shape((size,))
            raise ValueError(
                f"{_axes_of(layout, name)} does not divide the {what} {size} of {network.name}, "
                f"so every device would hold {'all' if held == size else held} of it; "
                f"{_remedy(mesh, layout, {name: size for name, (_, size) in sizes.items()})}"
            )
    uneven = [length for length in lengths if length % layout.size("length")]
    if uneven:
        parts = layout.size("length")
        raise ValueError(
            f"{_axes_of(layout, 'length')} does not divide rows of {uneven[0]} slots; let all of "
            f"data.buckets and data.max_length be multiples of {parts}, or do without it"
        )


def _sizes(network: VLlama2Config) -> dict[str, tuple[str, int]]:
    """{logical axis: what it is, its size} of the language model's large parameters.

    Key-value heads are missing on purpose: fewer of them than devices is usual, they are small, and
    each device then has those of its query heads (`row_slices.shared_heads`).
    """
    c = network.decoder
    sizes = {
        "embed": ("width", c.width),
        "mlp": ("hidden width", c.mlp_dim),
        "heads": ("number of heads", c.num_heads),
        "vocab": ("vocabulary", c.vocab_size),
    }
    if c.num_experts:
        sizes |= {
            "expert": ("number of experts", c.num_experts),
            "expert_embed": ("width", c.width),
        }
    return sizes


def _axes_of(layout: Layout, name: str) -> str:
    """Mesh axes that split a logical one: "fsdp 8 x expert 4"."""
    axes = {axis: layout.mesh.shape[axis] for axis in layout.axes(name)}
    return axes_in_words(axes).replace(", ", " x ")


def _remedy(mesh: MeshConfig, layout: Layout, wanted: Mapping[str, int]) -> str:
    """Sizes that divide, as near as may be: what is too many goes to `fsdp`, and then to `data`."""
    now = mesh.sizes(layout.mesh.size)
    across = {**dict.fromkeys(MESH_AXES, 1), "data": mesh.dcn_data, "fsdp": mesh.dcn_fsdp}
    for tensor, expert in itertools.product(_divisors(now["tensor"]), _divisors(now["expert"])):
        left = math.prod(now[a] for a in ("fsdp", "tensor", "expert")) // (tensor * expert)
        for fsdp in _divisors(left):
            found = now | {"tensor": tensor, "expert": expert, "fsdp": fsdp}
            found["data"] *= left // fsdp
            parts = {axis: size * across[axis] for axis, size in found.items()}
            if all(
                size % math.prod(parts[axis] for axis in layout.rules[name]) == 0
                for name, size in wanted.items()
            ):
                return f"say --mesh {_in_words(mesh, found)}"
    return "choose other sizes of the mesh"


def _divisors(number: int) -> list[int]:
    """The largest first."""
    return [part for part in range(number, 0, -1) if number % part == 0]


def _in_words(mesh: MeshConfig, sizes: Mapping[str, int]) -> str:
    """What `mesh.read_mesh` reads, with sizes in place of the mesh's own."""
    plain = MeshConfig()
    said = {axis: size for axis, size in sizes.items() if (size, getattr(mesh, axis)) != (1, 1)}
    for name in ("dcn_data", "dcn_fsdp", "expert_exchange"):
        if getattr(mesh, name) != getattr(plain, name):
            said[name] = getattr(mesh, name)
    text = ",".join(f"{name}={value}" for name, value in said.items())
    return text if mesh.layout == plain.layout else f"{mesh.layout}:{text}"
