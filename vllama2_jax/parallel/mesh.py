"""The mesh of a run: how many parts along each axis, on which devices."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.expert_parallel import EXCHANGES
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES

_REST = -1


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is laid out over its devices.

    Attributes:
      layout: the table of rules, a name in `rules.LAYOUTS`.
      data, fsdp, expert, sequence, tensor: parts along each axis, within a slice; -1, for one of
        them, is all the devices that the others leave.
      dcn_data, dcn_fsdp: parts across slices, which only the data-center network joins. Their
        product is the number of slices.
      rules: (logical axis, mesh axes) in place of the table's, for experiments.
      expert_exchange: how tokens travel to experts of other devices, "ring" or "all_to_all" (see
        `models.expert_parallel.exchange`).
    """

    layout: str = "fsdp"
    data: int = 1
    fsdp: int = _REST
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    expert_exchange: str = "ring"

    def __post_init__(self):
        """Refuse what cannot be meant."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; known: {', '.join(LAYOUTS)}")
        parts = {axis: getattr(self, axis) for axis in MESH_AXES}
        if list(parts.values()).count(_REST) > 1:
            raise ValueError(f"only one axis of the mesh may be -1, all that is left: {parts}")
        least = {"dcn_data": self.dcn_data, "dcn_fsdp": self.dcn_fsdp} | parts
        for axis, size in least.items():
            if size < 1 and (size != _REST or axis not in parts):
                raise ValueError(f"mesh.{axis} {size} must be at least 1")
        # Towers split their images over all axes; the model behind them is what counts.
        split = {axis for name, axes in self.table().items() if name != "images" for axis in axes}
        idle = [axis for axis, size in parts.items() if size != 1 and axis not in split]
        if idle:
            raise ValueError(
                f"layout {self.layout!r} splits nothing over {', '.join(idle)}; let mesh."
                f"{idle[0]} be 1, or choose another layout: {', '.join(LAYOUTS)}"
            )
        if self.expert_exchange not in EXCHANGES:
            raise ValueError(
                f"unknown mesh.expert_exchange {self.expert_exchange!r}; known: "
                f"{', '.join(EXCHANGES)}"
            )
        strange = {axis for _, axes in self.rules for axis in axes} - set(MESH_AXES)
        if strange:
            raise ValueError(
                f"mesh.rules name the mesh axes {', '.join(sorted(strange))}; known: "
                f"{', '.join(MESH_AXES)}"
            )

    def table(self) -> dict[str, tuple[str, ...]]:
        """The rules in force, {logical axis: mesh axes}.

        Raises:
          ValueError: for a rule of an axis that no array has.
        """
        known = LAYOUTS[self.layout]
        unknown = [name for name, _ in self.rules if name not in known]
        if unknown:
            raise ValueError(
                f"mesh.rules name the axes {', '.join(unknown)}, which no array has; known: "
                f"{', '.join(sorted(known))}"
            )
        return {**known, **{name: tuple(axes) for name, axes in self.rules}}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Parts along each axis, within a slice.

        Args:
          num_devices: in all.

        Raises:
          ValueError: if the axes do not multiply to the devices that there are.
        """
        slices = self.dcn_data * self.dcn_fsdp
        parts = {axis: getattr(self, axis) for axis in MESH_AXES}
        known = math.prod(size for size in parts.values() if size != _REST)
        left, rest = divmod(num_devices, slices * known)
        if rest or left < 1 or (left > 1 and _REST not in parts.values()):
            asked = " x ".join(f"{axis} {size}" for axis, size in parts.items() if size != 1)
            across = f" in {slices} slices" if slices > 1 else ""
            raise ValueError(
                f"a mesh of {asked or 'one device'}{across} does not fit {num_devices} devices; "
                "the product of its axes must be their number, or one axis -1"
            )
        return {axis: left if size == _REST else size for axis, size in parts.items()}


def read_mesh(text: str) -> dict[str, str | int]:
    """Fields of `MeshConfig` that a text like "fsdp+tensor:tensor=4,fsdp=-1" says.

    Beside sizes of axes it may say expert_exchange=all_to_all.

    Raises:
      ValueError: for a part that is not AXIS=SIZE.
    """
    layout, _, sizes = text.partition(":") if "=" not in text or ":" in text else ("", "", text)
    said: dict[str, str | int] = {"layout": layout} if layout else {}
    for part in filter(None, sizes.split(",")):
        axis, _, size = part.partition("=")
        if axis == "expert_exchange":
            said[axis] = size
            continue
        if axis not in (*MESH_AXES, "dcn_data", "dcn_fsdp") or not re.fullmatch(r"-?\d+", size):
            raise ValueError(
                f"mesh {text}: {part!r} is not AXIS=SIZE; axes are {', '.join(MESH_AXES)}, "
                "dcn_data, dcn_fsdp, as in fsdp+tensor:tensor=4,fsdp=-1"
            )
        said[axis] = int(size)
    return said


def parse_mesh(text: str) -> MeshConfig:
    """The mesh that such a text means.

    Raises:
      ValueError: as `read_mesh` and `MeshConfig` do.
    """
    return MeshConfig(**read_mesh(text))


def axes_in_words(sizes: Mapping[str, int]) -> str:
    """The axes of a mesh that split anything: "fsdp 32, tensor 2"; "one device" where none does."""
    split = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return ", ".join(split) or "one device"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Lay devices out so that the fastest axes lie along the fastest links.

    Args:
      config: of the mesh.
      devices: all of them, also those of other processes or of a topology that is not here.

    Raises:
      ValueError: if they do not fit.
    """
    _check_slices(config, devices)
    inside = config.sizes(len(devices))
    across = {axis: 1 for axis in MESH_AXES} | {"data": config.dcn_data, "fsdp": config.dcn_fsdp}
    shape, slices = tuple(inside.values()), tuple(across.values())
    if devices[0].platform == "cpu":  # simulated: there are no links to consider
        grid = np.asarray(devices).reshape(*slices, *shape)
        order = [axis for pair in zip(range(5), range(5, 10), strict=True) for axis in pair]
        whole = [a * b for a, b in zip(slices, shape, strict=True)]
        grid = grid.transpose(order).reshape(whole)
    elif math.prod(slices) > 1:
        on_tpu = devices[0].platform == "tpu"
        grid = mesh_utils.create_hybrid_device_mesh(
            shape,
            slices,
            devices,
            process_is_granule=not on_tpu,
            should_sort_granules_by_key=True,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        if max(shape) == len(devices):
            grid = _squares_outside(devices, grid)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _check_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> None:
    """Refuse a mesh that says nothing of the devices' slices, or of others.

    GPUs of several processes may be one slice, as where they share a switch.
    """
    across = config.dcn_data * config.dcn_fsdp
    platform = devices[0].platform
    if platform == "tpu":
        found, what = {getattr(device, "slice_index", 0) for device in devices}, "slices"
    elif platform != "cpu" and across > 1:
        found, what = {device.process_index for device in devices}, "processes"
    else:
        return
    if across != len(found):
        raise ValueError(
            f"the devices are of {len(found)} {what} and the mesh says dcn_data "
            f"{config.dcn_data} x dcn_fsdp {config.dcn_fsdp}; say what lies across them, as in "
            f"--mesh dcn_data={len(found)}"
        )


def _squares_outside(devices: Sequence[jax.Device], grid: np.ndarray) -> np.ndarray:
    """Devices along one axis, ordered so that two like dimensions of their torus vary slowest.

    What is gathered along the axis is gathered along the third dimension first, and then, which is
    nearly all of it, over the square of the other two, whose links it uses together
    (`axes.Layout.stages`).
    """
    if not hasattr(devices[0], "coords"):
        return grid
    sizes = [max(along) + 1 for along in zip(*(d.coords for d in devices), strict=True)]
    odd = [i for i, size in enumerate(sizes) if size > 1 and sizes.count(size) == 1]
    if len(odd) != 1 or sizes.count(1) or odd[0] == len(sizes) - 1:
        return grid
    order = [i for i in range(len(sizes)) if i != odd[0]] + odd
    ordered = sorted(devices, key=lambda device: [device.coords[i] for i in order])
    return np.asarray(ordered).reshape(grid.shape)


def make_layout(config: MeshConfig, devices: Sequence[jax.Device]) -> Layout:
    """The mesh and the rules of a run."""
    return Layout(make_mesh(config, devices), config.table(), config.expert_exchange)


def abstract_layout(config: MeshConfig, num_devices: int) -> Layout:
    """The shape of a run's mesh, without devices.

    Raises:
      ValueError: if the axes do not multiply to the devices that there are.
    """
    sizes = config.sizes(num_devices)
    for axis, slices in (("data", config.dcn_data), ("fsdp", config.dcn_fsdp)):
        sizes[axis] *= slices
    mesh = AbstractMesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )
    return Layout(mesh, config.table(), config.expert_exchange)
