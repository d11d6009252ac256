"""How much work a step is, and what it moves between a chip and its memory."""

import math
from collections.abc import Sequence

import jax

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.roofline import Roofline, moved_bytes, roofline
from vllama2_jax.plan.program import Arguments, Shape
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.flops import StepFlops, step_flops
from vllama2_jax.train.report import adapter_params, part_actions


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
    width, parts = width_of(config), layout.size("mlp")
    passes = 3 if config.remat == "full" else 2
    read = gradients = 0
    for path, leaf in {**arguments.frozen, **arguments.state.trainable}.items():
        part = path.split("/", 1)[0]
        if not runs(part, shape):
            continue
        # A tower that is frozen has nothing below it that learns.
        through = part in learning or (part == "decoder" and learning)
        read += leaf.size * width / parts * (passes if through else 1)
        gradients += leaf.size * width / parts * (path in arguments.state.trainable)
    decoder = network.decoder
    slots = slots_of(shape, layout)
    saved = slots * decoder.num_layers * decoder.width * width if "decoder" in learning else 0
    return moved_bytes(
        weights_read=read,
        weights_gathered=gathered,
        gradients=gradients,
        state=bytes_here(arguments.state),
        saved=saved,
    )


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
    if placement.topology.chip.peak_flops is None:
        return None
    flops = flops_of(config, network, shape, arguments)
    gathered = sum(one.bytes * one.count for one in collectives if one.kind == "all-gather")
    return roofline(
        placement,
        model_flops=flops.model,
        hardware_flops=flops.hardware,
        hbm_bytes=moved(config, network, shape, arguments, layout, gathered),
        collectives=collectives,
    )


def learning_parts(arguments: Arguments) -> set[str]:
    """Top-level parts of the network that train, wholly or by adapters."""
    actions = part_actions(arguments.assigned)
    return {part for part, action in actions.items() if action != "freeze"}


def runs(part: str, shape: Shape) -> bool:
    """Whether a top-level part of a network runs in a step."""
    needs = {"vision": shape.frames, "connector": shape.clips}
    return bool(needs.get(part, shape.sounds if part.startswith("audio") else True))


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
