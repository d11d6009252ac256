"""What a compiled program sends between devices, and which kernels it calls."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vllama2_jax.parallel.groups import axes_of, device_groups
from vllama2_jax.parallel.hlo import Instruction, Module, parse, shape_bytes
from vllama2_jax.parallel.loops import runs

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that sends something.

    Attributes:
      kind: one of `KINDS`.
      axes: of the mesh over which its groups run, slowest first.
      bytes: of the result on each device, of one run.
      count: how often it runs in a step, loops multiplied.
      group: the devices of its first group, numbered along the mesh.
      overlapped: a matrix product or a kernel stands between its start and its end; otherwise
        nothing hides it.
      between_slices: it crosses the data centre's network and nothing else; `group` has as many
        members as there are slices.
      name: of the instruction.
      shape: of the result.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    group: tuple[int, ...] = dataclasses.field(repr=False)
    overlapped: bool = False
    between_slices: bool = False
    name: str = ""
    shape: str = ""

    @property
    def axis(self) -> str:
        """The axes in one word, "fsdp+expert"."""
        return "+".join(self.axes)

    @property
    def group_size(self) -> int:
        """Devices that take part in one group."""
        return len(self.group)


class Total(NamedTuple):
    """Collectives of one kind over the same axes, of one step.

    Attributes:
      kind, axis: of all of them.
      bytes: of results, per device.
      count: runs.
      wire_bytes: see `wire_bytes`.
      overlapped_bytes: of `wire_bytes`, what can overlap with computation.
    """

    kind: str
    axis: str
    bytes: int
    count: int
    wire_bytes: int
    overlapped_bytes: int


class Communication(NamedTuple):
    """What a program sends and calls.

    Attributes:
      collectives: in the order of the program; those over groups of one device are left out.
      kernels: {name: runs per step} of custom calls, such as "gmm" or "splash_mha_fwd_residuals".
      uncounted_loops: with an unknown number of turns, counted as one.
    """

    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]
    uncounted_loops: tuple[str, ...]

    @property
    def wire_bytes(self) -> int:
        """Of a device and step."""
        return sum(map(wire_bytes, self.collectives))


def communication(
    text: str, mesh_shape: Mapping[str, int], across: Mapping[str, int] | None = None
) -> Communication:
    """Read what a compiled program sends.

    Args:
      text: `compiled.as_text()`, the program of one device, scheduled.
      mesh_shape: sizes of the mesh's axes, slowest first, as `dict(mesh.shape)`; the program's
        devices are numbered in the order of `mesh.devices`.
      across: parts of axes that lie across TPU slices, {"data": 2}; each slice has a program of its
        own, which numbers its own devices.

    Raises:
      ValueError: if the text is no program's, or not of that mesh, or groups of devices are written
        in an unknown way.
    """
    module = parse(text)
    mesh = _Mesh(dict(mesh_shape), {axis: n for axis, n in (across or {}).items() if n > 1})
    if math.prod(mesh.inside.values()) != module.num_partitions:
        raise ValueError(
            f"the program runs on {module.num_partitions} devices, not on a mesh of "
            f"{mesh.inside}; say which axes lie across slices"
        )
    found, kernels, uncounted = [], collections.Counter(), []
    for run in runs(module):
        instruction = run.instruction
        if run.uncounted:
            uncounted.append(instruction.name)
        for kernel in _kernels(module, instruction):
            kernels[kernel] += run.times
        for sent in _sent(module, run.computation, instruction):
            collective = _collective(sent, run.times, mesh)
            if collective.group_size > 1:
                found.append(collective)
    return Communication(tuple(found), dict(kernels), tuple(uncounted))


def wire_bytes(collective: Collective) -> int:
    """Bytes that a device puts on the wire in a step, as ring algorithms need them.

    (n - 1) / n of the gathered or scattered array among n devices; twice that for an all-reduce,
    which scatters and gathers; a permuted array once. Of a ragged all-to-all, the whole buffer.
    """
    n = collective.group_size
    size = collective.bytes * collective.count
    if collective.kind == "collective-permute":
        return size
    whole = size * n if collective.kind == "reduce-scatter" else size
    return (2 if collective.kind == "all-reduce" else 1) * whole * (n - 1) // n


def totals(collectives: Iterable[Collective]) -> list[Total]:
    """Sums by kind and axis, the largest on the wire first."""
    groups = collections.defaultdict(list)
    for one in collectives:
        groups[one.kind, one.axis].append(one)
    sums = [
        Total(
            kind,
            axis,
            bytes=sum(one.bytes * one.count for one in group),
            count=sum(one.count for one in group),
            wire_bytes=sum(map(wire_bytes, group)),
            overlapped_bytes=sum(wire_bytes(one) for one in group if one.overlapped),
        )
        for (kind, axis), group in groups.items()
    ]
    return sorted(sums, key=lambda total: -total.wire_bytes)


def largest_gather(collectives: Iterable[Collective]) -> Collective | None:
    """The all-gather with the largest result."""
    gathers = (one for one in collectives if one.kind == "all-gather")
    return max(gathers, key=lambda one: one.bytes, default=None)


class _Sent(NamedTuple):
    """A collective as the text has it: what says its groups, and the shape of its result."""

    kind: str
    instruction: Instruction
    shape: str
    overlapped: bool = False


# Besides plain instructions, collectives are written as
#   all-gather-start .. all-gather-done      everywhere
#   async-start or call-start .. -done       around a computation; TPUs: on SparseCores
#   AsyncCollectiveStart .. -Done            TPUs: in fusions, and once more in every fusion that
#                                            computes meanwhile and carries the collective along
#   all-reduce and slice in one fusion       TPUs' reduce-scatter
#   recv from the Megascale runtime          TPUs: between slices
def _sent(module: Module, computation, instruction: Instruction) -> Iterable[_Sent]:
    """The collectives that an instruction is, starts or contains."""
    opcode = instruction.opcode
    if opcode in KINDS:
        yield _Sent(opcode, instruction, instruction.shape)
    elif opcode.removesuffix("-start") in KINDS:
        ended = _end(module, computation, instruction)
        yield _Sent(opcode.removesuffix("-start"), instruction, *ended)
    elif opcode in ("async-start", "call-start"):
        for inner in _inside(module, instruction):
            _, overlapped = _end(module, computation, instruction)
            yield _Sent(inner.opcode, inner, inner.shape, overlapped)
    elif opcode == "recv" and "_xla_megascale_transfer_type" in instruction.attributes:
        kind = re.search(r'_transfer_type="(\w+)"', instruction.attributes)[1]
        ended = _end(module, computation, instruction)
        yield _Sent(kind.lower().replace("_", "-"), instruction, *ended)
    elif opcode == "fusion":
        yield from _sent_by_fusion(module, computation, instruction)


def _sent_by_fusion(module, computation, fusion):
    name = fusion.called("calls")[0]
    for inner in _inside(module, fusion):
        if "async_collective_fusion_config" in inner.attributes:
            if _has(module.computations[name], "AsyncCollectiveDone"):
                start = _async_start(module, computation, inner)
                overlapped = _work_between(module, computation, start, fusion)
                yield _Sent(inner.opcode, inner, inner.shape, overlapped)
        elif name.startswith("all-reduce-scatter"):
            yield _Sent("reduce-scatter", inner, fusion.shape)
        else:
            yield _Sent(inner.opcode, inner, inner.shape)


def _inside(module, caller):
    """Collectives in what an instruction calls."""
    for name in caller.called("calls", "to_apply"):
        for instruction in module.computations[name].values():
            if instruction.opcode in KINDS:
                yield instruction
            elif instruction.opcode in ("fusion", "call"):
                yield from _inside(module, instruction)


def _kernels(module, instruction):
    """Names of the kernels that an instruction runs, itself or in a fusion that carries them."""
    if instruction.kernel:
        yield instruction.kernel
    elif instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            for inner in module.computations[name].values():
                yield from _kernels(module, inner)


def _has(computation, target):
    return any(f'custom_call_target="{target}"' in i.attributes for i in computation.values())


def _end(module, computation, start) -> tuple[str, bool]:
    """The result of an asynchronous instruction, and whether there is work until it is there."""
    for instruction in computation.values():
        if instruction.opcode.endswith("-done") and start.name in instruction.operands:
            return instruction.shape, _work_between(module, computation, start, instruction)
    # It ends in the loop's next turn. Its own shape is (operand, result, ...).
    return re.findall(r"\w+\[[\d,]*\]", start.shape)[1], True


def _async_start(module, computation, collective):
    """The fusion that started what other fusions carry along; they share a chain's number."""
    chain = re.search(r'chain_id="\d+"', collective.attributes)[0]
    for instruction in computation.values():
        if instruction.opcode == "fusion":
            inner = module.computations[instruction.called("calls")[0]]
            if _has(inner, "AsyncCollectiveStart") and any(
                chain in i.attributes for i in inner.values()
            ):
                return instruction
    raise ValueError(f"{collective.name}: no AsyncCollectiveStart with {chain}")


def _work_between(module, computation, start, end):
    names = list(computation)
    between = names[names.index(start.name) + 1 : names.index(end.name)]
    return any(module.works(computation[name]) for name in between)


@dataclasses.dataclass(frozen=True)
class _Mesh:
    """Sizes of a mesh's axes, and how many parts of each lie across slices."""

    sizes: dict[str, int]
    across: dict[str, int]

    @property
    def inside(self) -> dict[str, int]:
        """Sizes within a slice."""
        return {axis: size // self.across.get(axis, 1) for axis, size in self.sizes.items()}

    def numbers(self, local: np.ndarray) -> np.ndarray:
        """Devices of the first slice, from its own numbers to those of the mesh."""
        places = np.unravel_index(local, tuple(self.inside.values()))
        return np.ravel_multi_index(places, tuple(self.sizes.values()))

    def along(self, axes: tuple[str, ...], device: int) -> np.ndarray:
        """A slice's own numbers of a device and of all that lie along some axes from it."""
        sizes = self.inside
        place = dict(zip(sizes, np.unravel_index(device, tuple(sizes.values())), strict=True))
        lines = [range(n) if axis in axes else [place[axis]] for axis, n in sizes.items()]
        return np.ravel_multi_index(np.meshgrid(*lines, indexing="ij"), tuple(sizes.values()))

    def counterparts(self) -> np.ndarray:
        """The first device of every slice."""
        steps = [np.arange(self.across.get(axis, 1)) * n for axis, n in self.inside.items()]
        return np.ravel_multi_index(np.meshgrid(*steps, indexing="ij"), tuple(self.sizes.values()))


def _collective(sent: _Sent, times, mesh: _Mesh):
    between_slices = sent.instruction.opcode == "recv"
    if between_slices:
        axes, group = tuple(mesh.across), mesh.counterparts()
    else:
        groups = device_groups(sent.instruction.attributes, math.prod(mesh.inside.values()))
        axes = axes_of(groups, mesh.inside)
        pairs = sent.kind == "collective-permute"
        group = mesh.numbers(mesh.along(axes, groups[0, 0]) if pairs else groups[0])
    return Collective(
        kind=sent.kind,
        axes=axes,
        bytes=shape_bytes(sent.shape),
        count=times,
        group=tuple(map(int, group.reshape(-1))),
        overlapped=sent.overlapped,
        between_slices=between_slices,
        name=sent.instruction.name,
        shape=sent.shape,
    )
