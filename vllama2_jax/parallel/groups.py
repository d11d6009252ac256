"""Which devices of a program talk with each other, and which axes of the mesh that is."""

import re
from collections.abc import Mapping

import numpy as np

_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_TURNED = r"\[([\d,]+)\]T\(([\d,]+)\)"
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def device_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, or the (source, target) pairs of a permutation.

    XLA writes groups in full, `{{0,1},{2,3}}`; as the rows of a reshaped and transposed count,
    `[2,2]<=[2,2]T(1,0)`; or as axes of a mesh of its own, `mesh['a'=2,'b'=2] {'a'}`, where `b:(2)4`
    is the part of `b` of size 4 behind one of size 2.

    Args:
      attributes: text of the instruction's attributes.
      num_devices: of the program; an empty list of groups means all of them.

    Returns:
      int [groups, devices of each].

    Raises:
      ValueError: where no groups are found, or groups differ in size.
    """
    if found := _PAIRS.search(attributes):
        return _numbers(found[1]).reshape(-1, 2)
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if found := re.search("replica_groups=" + _IOTA, attributes):
        return _iota(*found.groups())
    if found := _LISTS.search(attributes):
        if not found[1]:
            return np.arange(num_devices)[None]
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        if len({len(group) for group in groups}) == 1:
            return np.stack(groups)
    raise ValueError(f"cannot read the groups of devices in {attributes[:200]!r}")


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh along which the members of a group differ, slowest first.

    Args:
      groups: int [groups, devices of each]; devices are numbered along the mesh, its last axis the
        fastest.
      mesh_shape: sizes of its axes.
    """
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, moves in zip(mesh_shape, differ, strict=True) if moves)


def _numbers(text):
    return np.array([int(number) for number in re.findall(r"\d+", text)], int)


def _iota(shape, sizes, order):
    ids = np.arange(_numbers(sizes).prod()).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))


def _mesh_groups(axes, device_ids, grouped):
    names, sizes = zip(*re.findall(r"([^,=]+)=(\d+)", axes), strict=True)
    sizes = [int(size) for size in sizes]
    if not device_ids:
        ids = np.arange(np.prod(sizes))
    elif found := re.fullmatch(_IOTA, device_ids):
        ids = _iota(*found.groups())
    elif found := re.fullmatch(_TURNED, device_ids):
        ids = np.arange(_numbers(found[1]).prod()).reshape(_numbers(found[1]))
        ids = ids.transpose(_numbers(found[2]))
    else:  # "[2,2]0,2,1,3"
        ids = _numbers(device_ids.rpartition("]")[2])
    # Every axis in parts: those that groups run over, and those before, between and behind them.
    parts, ours = [], []
    for name, size in zip(names, sizes, strict=True):
        chosen = re.findall(rf"(?:^|,){re.escape(name)}(?::\((\d+)\)(\d+))?(?=,|$)", grouped)
        done = 1
        for before, length in sorted((int(b or 1), int(n or size)) for b, n in chosen):
            parts += [before // done, length]
            ours.append(len(parts) - 1)
            done = before * length
        parts.append(size // done)
    others = [axis for axis in range(len(parts)) if axis not in ours]
    width = int(np.prod([parts[axis] for axis in ours]))
    return ids.reshape(parts).transpose(others + ours).reshape(-1, width)
