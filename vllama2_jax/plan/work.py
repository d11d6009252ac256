"""How much work a step is, and what it moves between a chip and its memory."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import DecoderConfig, VLlama2Config
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.roofline import Roofline, moved_bytes, roofline
from vllama2_jax.plan.program import Arguments, Shape
from vllama2_jax.plan.result import Parameters
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.flops import StepFlops, step_flops
from vllama2_jax.train.report import adapter_params, part_actions


def parameters_of(network: VLlama2Config, trainable=()) -> Parameters:
    """How many numbers a network has, and how many of a run's leaves train."""
    count = lambda leaves: sum(leaf.size for leaf in jax.tree.leaves(leaves))  # noqa: E731
    return Parameters(count(abstract_params(network)), count(trainable))


def flops_of(
    config: TrainConfig, network: VLlama2Config, shape: Shape, arguments: Arguments
) -> StepFlops:
    """FLOPs of a step, on all chips together."""
    return step_flops(
        network,
        part_actions(arguments.assigned),
        rows=shape.rows,
        length=shape.length,
        frames=shape.frames,
        clips=shape.clips,
        sounds=shape.sounds,
        remat=config.remat,
        loss_chunk=config.loss.chunk,
        adapter_params=adapter_params(network, arguments.state.trainable),
    )


def shares(layout: Layout, rows: int, frames: int = 0, clips: int = 0, sounds: int = 0):
    """Among how many chips each part of a network is divided; the others do the same once more.

    Args:
      layout: of the step.
      rows: of a micro-batch, on all devices.
      frames, clips, sounds: of a row.

    Returns:
      {part: chips}.
    """

    def split(*named: tuple[str, int | None]) -> int:
        axes = set()
        for name, count in named:
            entry = layout.spec((name,), None if count is None else (count,))[0] or ()
            axes |= {entry} if isinstance(entry, str) else {*entry}
        return math.prod(layout.mesh.shape[axis] for axis in axes)

    whole_clips = rows * clips % layout.size("images") == 0
    sounds_apart = split(("images", rows * sounds))
    return {
        "vision": split(("images", rows * frames)),
        "connector": split(("images" if whole_clips else "clips", rows * clips)),
        "audio": sounds_apart,
        "audio_connector": sounds_apart,
        # The residual stream's own axis is split where products leave sums over it ("2d").
        "decoder": split(("batch", rows), ("length", None), ("mlp", None), ("act_embed", None)),
    }


def chip_flops(flops: StepFlops, divided: dict[str, int]) -> float:
    """Hardware FLOPs of one chip; `divided` is of `shares`."""
    return sum(done / divided[part] for part, done in flops.parts.items())


def moved(
    config: TrainConfig,
    network: VLlama2Config,
    shape: Shape,
    arguments: Arguments,
    layout: Layout,
    gathered: float,
) -> float:
    """Bytes between a chip and its memory in a step, see `roofline.moved_bytes`.

    Args:
      config, network, shape, arguments, layout: of the step.
      gathered: bytes of weights that arrive from other chips.
    """
    learning = learning_parts(arguments)
    width, times = width_of(config), config.micro_batches
    passes = 3 if config.remat == "full" else 2
    read = gradients = 0
    for path, leaf in {**arguments.frozen, **arguments.state.trainable}.items():
        part = path.split("/", 1)[0]
        if not runs(part, shape):
            continue
        # A tower that is frozen has nothing below it that learns.
        through = part in learning or (part == "decoder" and learning)
        parts = layout.size("mlp") * (layout.size("expert") if is_expert(path) else 1)
        here = leaf.size * width / parts * times
        read += here * (passes if through else 1)
        gradients += here * (path in arguments.state.trainable)
    saved = slots_of(shape, layout) * saved_width(network.decoder, config.remat)
    return moved_bytes(
        weights_read=read,
        weights_gathered=gathered,
        gradients=gradients,
        state=bytes_here(arguments.state),
        saved=saved * width if learning else 0,
    )


def saved_width(c: DecoderConfig, remat: str) -> int:
    """Numbers that a decoder keeps of each slot for the backward pass, in all of its layers.

    Args:
      c: the decoder.
      remat: what is computed again, a name in `REMAT_POLICIES`.
    """
    kept = {
        "full": c.width,
        "dots": 6 * c.width + 2 * c.mlp_dim,
        "none": 10 * c.width + 4 * c.mlp_dim * max(1, c.top_k),
    }
    return c.num_layers * kept[remat]


def roofline_of(
    config: TrainConfig,
    network: VLlama2Config,
    shape: Shape,
    arguments: Arguments,
    layout: Layout,
    placement: Placement,
    collectives: Sequence[Collective],
) -> Roofline | None:
    """How long a step takes; None on chips without a stated peak.

    Args:
      config, network, shape, arguments, layout: of the step.
      placement: of its mesh on the topology.
      collectives: that it sends.
    """
    if placement.topology.chip.peak_flops(config.dtype) is None:
        return None
    flops = flops_of(config, network, shape, arguments)
    rows = shape.rows // config.micro_batches
    divided = shares(layout, rows, shape.frames, shape.clips, shape.sounds)
    gathered = sum(one.bytes * one.count for one in collectives if one.kind == "all-gather")
    return roofline(
        placement,
        model_flops=flops.model,
        chip_flops=chip_flops(flops, divided),
        hbm_bytes=moved(config, network, shape, arguments, layout, gathered),
        collectives=collectives,
        dtype=config.dtype,
    )


def assumed(
    layout: Layout, kind: str, axes, size: float, count: float, overlapped=False, shape=""
) -> Collective:
    """A collective of a program that was not compiled, over every chip that differs in `axes`."""
    sizes = layout.mesh.shape
    ordered = tuple(axis for axis in sizes if axis in axes)
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    group = numbers[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel()
    return Collective(
        kind, ordered, round(size), count, tuple(group.tolist()), overlapped, shape=shape
    )


def learning_parts(arguments: Arguments) -> set[str]:
    """Top-level parts of the network that train, wholly or by adapters."""
    actions = part_actions(arguments.assigned)
    return {part for part, action in actions.items() if action != "freeze"}


def runs(part: str, shape: Shape) -> bool:
    """Whether a top-level part of a network runs in a step."""
    needs = {"vision": shape.frames, "connector": shape.clips}
    return bool(needs.get(part, shape.sounds if part.startswith("audio") else True))


def is_expert(path: str) -> bool:
    """Whether a parameter is one of experts, which an expert axis keeps apart."""
    return "/moe/" in path and "/router" not in path


def width_of(config: TrainConfig) -> int:
    """Bytes of a number in a product."""
    return 2 if config.dtype == "bfloat16" else 4


def slots_of(shape: Shape, layout: Layout) -> float:
    """Of a batch, on each chip."""
    return shape.rows / layout.size("batch") * shape.length / layout.size("length")


def bytes_here(tree) -> int:
    """Of a chip's share of arrays that know where they lie."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
