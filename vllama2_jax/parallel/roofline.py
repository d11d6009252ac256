"""How long a step would take if each part of a chip ran at the speed that its maker states."""

import dataclasses
from collections.abc import Iterable

from vllama2_jax.parallel.chips import GPU_FRACTION
from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.topology import Topology

# Of `moved_bytes`, in words.
TRAINING_TRAFFIC = (
    "weights (written where they are gathered, read once per pass), whole gradients and saved "
    "activations (written and read) and optimizer state (read and written)"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A step's times in seconds, and what they imply.

    Attributes:
      compute_seconds: a chip's hardware FLOPs at the peak.
      hbm_seconds: bytes moved at the memory's bandwidth.
      ici_seconds: collectives within slices (or nodes).
      dcn_seconds: collectives between slices.
      exposed_seconds: of both, what no computation hides.
      step_seconds: the longest of compute, memory and hidden collectives, and the exposed ones.
      utilisation: model FLOPs / (step seconds x peak).
    """

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    exposed_seconds: float
    step_seconds: float
    utilisation: float


def roofline(
    placement: Placement,
    *,
    model_flops: float,
    chip_flops: float,
    hbm_bytes: float,
    collectives: Iterable[Collective],
    dtype: str = "bfloat16",
) -> Roofline:
    """A step's roofline.

    Args:
      placement: of the mesh on its chips.
      model_flops: of a step, of all chips together.
      chip_flops: of each chip: its share, what it computes again, and what others compute too.
      hbm_bytes: of a step and chip, see `moved_bytes`.
      collectives: of a step.
      dtype: of products.

    Raises:
      ValueError: for chips without a stated peak, such as simulated ones.
    """
    topology = placement.topology
    chip, peak = topology.chip, _peak(topology, dtype)
    compute = chip_flops / peak
    memory = hbm_bytes / chip.hbm_bandwidth
    times = [(one.overlapped, *placement.seconds(one)) for one in collectives]
    ici, dcn = (sum(time[index] for time in times) for index in (1, 2))
    exposed = sum(within + between for hidden, within, between in times if not hidden)
    hidden_ici = sum(within for hidden, within, _ in times if hidden)
    hidden_dcn = sum(between for hidden, _, between in times if hidden)
    step = max(compute, memory, hidden_ici, hidden_dcn) + exposed
    utilisation = model_flops / topology.num_chips / (step * peak)
    return Roofline(compute, memory, ici, dcn, exposed, step, utilisation)


def _peak(topology, dtype):
    peak = topology.chip.peak_flops(dtype)
    if peak is None:
        raise ValueError(f"{topology.name}: no peak is stated for a {topology.chip.name}")
    return peak


def moved_bytes(
    *, weights_read: float, weights_gathered: float, gradients: float, state: float, saved: float
) -> float:
    """Bytes that a training step moves between a chip and its memory.

    Args:
      weights_read: of weights that products read, once per pass over them.
      weights_gathered: of weights that arrive from other chips and are written down.
      gradients: of whole gradients, written, and read to be scattered or used.
      state: of the chip's own trainable parameters and moments, read and written.
      saved: of activations kept for the backward pass, written and read.
    """
    return weights_read + weights_gathered + 2 * (gradients + state + saved)


def assumptions(
    topology: Topology, traffic: str = TRAINING_TRAFFIC, dtype: str = "bfloat16"
) -> list[str]:
    """What a roofline takes for granted, one sentence each.

    Args:
      topology: that it is of.
      traffic: what was counted as moved between a chip and its memory, in words.
      dtype: of products.

    Raises:
      ValueError: as `roofline` does.
    """
    chip, peak = topology.chip, _peak(topology, dtype)
    links = {0: "a switch", 2: "a 2-D torus", 3: "a 3-D torus"}[chip.dimensions]
    sentences = [
        "Compute: a chip's hardware FLOPs, with recomputation and with what other chips compute "
        f"too, at the datasheet's peak of {peak / 1e12:g} TFLOP/s ({dtype}), which no product "
        "reaches in practice.",
        f"Memory: {chip.hbm_bandwidth / 1e9:,.0f} GB/s for {traffic}; what passes between "
        "neighbouring operations is free.",
        f"Links: {links}, {chip.link_bandwidth / 1e9:g} GB/s per link and direction.",
        "A collective sends (n - 1) / n of the gathered or scattered array, twice that for an "
        "all-reduce, without latency. Half of an all-to-all crosses the middle of the longest "
        "dimension. A permutation sends its array over one link.",
    ]
    if chip.dimensions:
        sentences.append(
            f"{sum(topology.rings)} of {len(topology.shape)} dimensions of {topology.name} are "
            "rings, where a chip receives over two links; along the others it receives over one. A "
            "group uses the links of all dimensions that it spans."
        )
    if topology.platform == "gpu":
        sentences.append(
            f"Of the card's memory, {GPU_FRACTION:.0%}, as launch/flags/gpu.env sets; JAX takes "
            "75% unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."
        )
    if topology.num_slices > 1:
        sentences.append(
            f"Between slices or nodes each chip sends {chip.dcn_bandwidth / 1e9:g} GB/s, after the "
            "part within the slice."
        )
    return [
        *sentences,
        "A collective is hidden if a matrix product or a kernel stands between its start and its "
        "end in the compiled program, and exposed otherwise; hidden ones may fill the whole step.",
        "The step is the longest of compute, memory and hidden collectives, plus exposed ones. "
        "Every branch of a conditional counts, as if all were taken.",
        "Elementwise operations, the optimizer's arithmetic, the input pipeline and stragglers are "
        "free.",
    ]
