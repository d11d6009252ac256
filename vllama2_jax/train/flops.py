"""FLOPs of a training step.

`models/flops.py` says what is counted: matrix products and convolutions, of every slot.
"""

from collections.abc import Mapping
from typing import NamedTuple

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.flops import forward_products

ACTIONS = ("train", "lora", "freeze")

# What the backward pass of a block computes again. "full" begins with the block's input, but never
# needs its last product, whose result is only added; "dots" keeps the products with parameters, but
# not those of experts, which are no plain `dot_general`.
_EXPERTS = {"decoder/moe/gate_up"}  # `down` is the last product, here too (`models/moe.py`)
_SCORES = {"vision/attention/scores", "audio/attention/scores", "decoder/attention/scores"}
_RECOMPUTED = {
    "none": frozenset(),
    "dots": frozenset(_SCORES | _EXPERTS),
    "full": frozenset(
        _SCORES
        | _EXPERTS
        | {"vision/attention/projections", "vision/mlp/fc1"}
        | {"audio/attention/projections", "audio/attention/gate", "audio/mlp/fc1"}
        | {"decoder/attention/projections", "decoder/mlp/gate_up", "decoder/moe/router"}
    ),
}


# What a part's input is made of.
_BELOW = {
    "vision": (),
    "connector": ("vision",),
    "audio": (),
    "audio_connector": ("audio",),
    "decoder": ("vision", "connector", "audio", "audio_connector"),
}


class StepFlops(NamedTuple):
    """FLOPs of one training step.

    Attributes:
      model: what the mathematics needs; model FLOP/s utilisation is made of it.
      parts: of each part of the network that runs, with what is computed again to save memory.
    """

    model: int
    parts: Mapping[str, int]

    @property
    def hardware(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def step_flops(
    config: VLlama2Config,
    actions: Mapping[str, str],
    *,
    rows: int,
    length: int,
    frames: int,
    clips: int,
    sounds: int = 0,
    steps: int | None = None,
    remat: str = "none",
    loss_chunk: int | None = None,
    adapter_params: int = 0,
) -> StepFlops:
    """FLOPs of forward and backward pass; the optimizer's are too few to count.

    A product of the forward pass is as much work again for each of its factors whose gradient is
    wanted: a parameter's if it trains, an activation's if anything that it is made of trains. So a
    frozen decoder above a connector that trains costs its forward pass and the gradients of its
    activations, and a frozen tower below everything that trains its forward pass alone. The layers
    of a decoder are one scanned program: that nothing below the first of them trains, as with
    adapters above a frozen connector, saves nothing.

    The output head counts for every slot. The step leaves out chunks without a supervised slot (see
    `loss.chunked_cross_entropy`), so that it may do less.

    Args:
      config: the shapes.
      actions: how each of `config.parts` trains: "train" (its parameters), "lora" (adapters beside
        them, see `adapter_params`) or "freeze". A part that trains here and there counts as one or
        the other.
      rows: of the whole step: of all devices, of all micro-batches.
      length, frames, clips, sounds, steps: of a row, as in `forward_flops`.
      remat: of the model, a name in `REMAT_POLICIES`.
      loss_chunk: of `LossConfig`; logits of chunks are computed again.
      adapter_params: of LoRA in the decoder; each takes part once per slot (an expert's `top_k` /
        `num_experts` times: scale the number).

    Raises:
      ValueError: for parts, actions or policies that are unknown or missing.
    """
    if set(actions) != set(config.parts):
        raise ValueError(f"actions must name {', '.join(config.parts)}, not {', '.join(actions)}")
    for part, action in actions.items():
        if action not in ACTIONS:
            raise ValueError(f"{part}: unknown action {action!r}; known: {', '.join(ACTIONS)}")
    if remat not in _RECOMPUTED:
        raise ValueError(f"unknown remat policy {remat!r}; known: {', '.join(_RECOMPUTED)}")
    again = set(_RECOMPUTED[remat])
    if loss_chunk is not None and loss_chunk < length:
        again.add("decoder/lm_head")
    shape = dict(rows=rows, length=length, frames=frames, clips=clips, sounds=sounds, steps=steps)
    products = forward_products(config, **shape)
    running = {product.part for product in products}
    learning = [part for part, action in actions.items() if action != "freeze" and part in running]
    adapters = 2 * rows * length * adapter_params
    model, parts = 3 * adapters, dict.fromkeys(sorted(running), 0)
    parts["decoder"] += (4 if remat == "full" else 3) * adapters
    for product in products:
        below = any(part in learning for part in _BELOW[product.part])
        passes = 1
        if below or product.part in learning:
            passes += below or not product.entry
            if not product.weights or actions[product.part] == "train":
                passes += 1
            parts[product.part] += product.flops * (product.name in again)
        model += product.flops * passes
        parts[product.part] += product.flops * passes
    return StepFlops(model, parts)
