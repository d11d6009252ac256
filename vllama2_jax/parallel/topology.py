"""Names of pods, slices and nodes -> what they are made of, and devices to compile for.

v5p:4x4x4    a TPU slice by its shape
v5p-128      the same by its accelerator type: of v4 and v5p, the number counts cores, 2 per chip
v5e-256      256 chips; also v5litepod-256
2xv5p-128    two slices, joined by the data centre's network
h100:8x4     4 nodes of 8 GPUs
cpu:8        8 simulated devices
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile

from vllama2_jax.parallel.chips import CHIPS, Chip

# Every name of a family of chips.
_FAMILIES = {name: name for name in CHIPS} | {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
}

# The shape of a slice that is asked for by its size (the tables of cloud.google.com/tpu/docs/v4,
# v5p, v5e and v6e).
_SHAPES = {
    3: (
        *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8)),
        *((4, 8, 12), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
    ),
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
}

_NAME = re.compile(r"(?:(\d+)x)?([a-z][a-z0-9]*)(?:-(\d+)|:(\d+(?:x\d+)*))")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
      chip: what all of them are.
      shape: of one slice's torus; of one node, (number of GPUs,).
      num_slices: or nodes, joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """By its shape: "v5p:4x4x4"."""
        shape = "x".join(map(str, self.shape))
        if self.platform == "gpu" and self.num_slices > 1:
            return f"{self.chip.name}:{shape}x{self.num_slices}"
        return (f"{self.num_slices}x" if self.num_slices > 1 else "") + f"{self.chip.name}:{shape}"

    @property
    def platform(self) -> str:
        """Of its chips: "tpu", "gpu" or "cpu"."""
        return self.chip.platform

    @property
    def chips_per_slice(self) -> int:
        """Or per node."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """Of all slices together; as many JAX devices."""
        return self.chips_per_slice * self.num_slices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which dimensions of the torus are closed.

        Of v4 and v5p all, in a slice of whole cubes of 4 x 4 x 4, whose faces optical switches
        join; of v5e and v6e those that are as long as the pod, 16 (the scaling book on TPUs).
        """
        if self.chip.dimensions == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


def topology(name: str) -> Topology:
    """The topology of that name, see the top of this page.

    Raises:
      ValueError: for an unknown name, listing what is known.
    """
    match = _NAME.fullmatch(name.strip().lower())
    family = match and _FAMILIES.get(match[2])
    if family is None:
        raise ValueError(
            f"unknown topology {name!r}; known: v5p:4x4x4, v5p-128, 2xv5p-128, h100:8x4, cpu:8 and "
            f"the like, of {', '.join(_FAMILIES)}"
        )
    chip, slices = CHIPS[family], int(match[1] or 1)
    sizes = tuple(map(int, match[4].split("x"))) if match[4] else ()
    if 0 in (slices, *sizes):
        raise ValueError(f"{name}: a size of 0")
    if chip.platform == "tpu":
        return Topology(chip, _tpu_shape(name, chip, int(match[3] or 0), sizes), slices)
    if match[1] or not sizes or len(sizes) > (2 if chip.platform == "gpu" else 1):
        form = "h100:8 (one node) or h100:8x4 (4 nodes)" if chip.platform == "gpu" else "cpu:8"
        raise ValueError(f"{name}: write it as {form}")
    return Topology(chip, sizes[:1], sizes[1] if len(sizes) == 2 else 1)


def _tpu_shape(name, chip, number, sizes):
    if sizes:
        if len(sizes) != chip.dimensions:
            raise ValueError(f"{name}: a slice of {chip.name} has {chip.dimensions} dimensions")
        cubes = chip.dimensions == 3 and not any(size % 4 for size in sizes)
        if cubes and math.prod(sizes) > chip.slice_chips:
            raise ValueError(
                f"{name}: the largest slice of {chip.name} has {chip.slice_chips:,} chips"
            )
        if not cubes and tuple(sorted(sizes)) not in map(tuple, map(sorted, _SHAPES[len(sizes)])):
            small = [shape for shape in _SHAPES[len(sizes)] if chip.dimensions == 2 or 2 in shape]
            known = ", ".join("x".join(map(str, shape)) for shape in small)
            beyond = ", and multiples of 4x4x4" if chip.dimensions == 3 else ""
            raise ValueError(
                f"{name}: no such slice of {chip.name} can be had; there are {known}{beyond}"
            )
        return sizes
    known = {
        math.prod(shape) * chip.cores: shape
        for shape in _SHAPES[chip.dimensions]
        if math.prod(shape) <= (chip.slice_chips or math.inf)
    }
    if number not in known:
        names = ", ".join(f"{chip.name}-{count}" for count in known)
        example = "x".join(["4"] * chip.dimensions)
        raise ValueError(
            f"no default shape for {name}; known: {names}, or name it, {chip.name}:{example}"
        )
    return known[number]


def devices(wanted: Topology) -> list:
    """JAX devices of a topology, slice after slice.

    TPU devices are only descriptions that one can compile for, made by libtpu without a TPU. This
    sets two environment variables that libtpu reads when it is loaded: not to look for the
    machine's own TPU, and to share the library with other processes.

    Raises:
      ValueError: where libtpu is missing or not the one that this JAX is made for, where it knows
        no such slice or flag, or where this machine has too few GPUs or simulated devices.
    """
    import jax

    if wanted.platform != "tpu":
        return _local_devices(wanted)
    _check_libtpu()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if os.environ.get("LIBTPU_INIT_ARGS"):
        _check_flags(os.environ["LIBTPU_INIT_ARGS"])
    # Without `wrap`, libtpu plans for a mesh with open ends: no ring, and gathers over the whole
    # slice become sums of zero-padded arrays, twice the bytes.
    padded = (*wanted.shape, *(1,) * (3 - len(wanted.shape)))
    options = {
        "chips_per_host_bounds": tuple(map(min, padded, (2, 2, 1))),
        "wrap": (*wanted.rings, *(False,) * (3 - len(wanted.shape))),
        "num_slices": wanted.num_slices,
    }
    if wanted.chip.cores == 2:
        options["chip_config_name"] = "megacore"  # two cores of a chip are one device
    name = f"{wanted.chip.name}:{'x'.join(map(str, wanted.shape))}"
    try:
        with _without_libtpu_noise():
            described = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no slice {name}: {str(error).splitlines()[0]}") from None
    return sorted(described, key=lambda d: (getattr(d, "slice_index", 0), d.id))


def _local_devices(wanted):
    import jax

    try:
        found = jax.devices(wanted.platform)
    except RuntimeError:  # of a platform that is not there
        found = []
    if len(found) < wanted.num_chips:
        remedy = (
            "estimate without compiling"
            if wanted.platform == "gpu"
            else f"set XLA_FLAGS=--xla_force_host_platform_device_count={wanted.num_chips}"
        )
        raise ValueError(f"{wanted.name}: JAX sees {len(found)} such devices here; {remedy}")
    return found[: wanted.num_chips]


def _check_libtpu():
    """Refuse a libtpu that is absent, or not the one that JAX's own `tpu` extra pins."""
    remedy = "pip install 'vllama2_jax[tpu]'"
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"compiling for TPUs needs libtpu, which is not installed; {remedy}")
    pins = re.findall(r"libtpu *== *([\d.]*\d)", " ".join(importlib.metadata.requires("jax") or ()))
    found = importlib.metadata.version("libtpu")
    if pins and not f"{found}.".startswith(f"{pins[0]}."):
        jax_version = importlib.metadata.version("jax")
        raise ValueError(f"jax {jax_version} wants libtpu {pins[0]}, not {found}; {remedy}")


@functools.cache
def _check_flags(flags: str) -> None:
    """Refuse flags for which libtpu would end this process where it is loaded."""
    load = 'from jax.experimental import topologies as t; t.get_topology_desc("v5e:2x2", "tpu")'
    tried = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    if tried.returncode:
        said = tried.stderr.strip().splitlines() or [f"it ends with {tried.returncode}"]
        raise ValueError(
            f"libtpu does not start with LIBTPU_INIT_ARGS={flags!r} ({said[-1]}); correct or unset "
            "that variable"
        )


@contextlib.contextmanager
def _without_libtpu_noise():
    """Drop what native code writes to stderr: libtpu complains that this machine is no TPU VM."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
