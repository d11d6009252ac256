"""How much work answering is, and what it moves between a chip and its memory."""

from flax.traverse_util import flatten_dict

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.expert_parallel import FEW_TOKENS
from vllama2_jax.models.flops import forward_flops
from vllama2_jax.parallel.collectives import Communication
from vllama2_jax.plan.serving_result import Serving
from vllama2_jax.plan.work import bytes_here, is_expert
from vllama2_jax.train.flops import StepFlops


def serving_flops(network: VLlama2Config, serving: Serving, layout: Layout) -> StepFlops:
    """FLOPs of a run of the program, on all chips together."""
    c = network.decoder
    length = serving.length if serving.program == "prefill" else 1
    model = forward_flops(network, rows=serving.rows, length=length, frames=0, clips=0)
    model["decoder/lm_head"] //= length
    hardware = dict(model)
    if length == 1:
        pair = 4 * serving.rows * c.num_layers * c.num_heads * c.head_dim
        reach = min(serving.capacity, c.sliding_window or serving.capacity)
        model["decoder/attention/scores"] = pair * reach
        hardware["decoder/attention/scores"] = pair * serving.capacity
    tokens = serving.rows * length // layout.size("batch")
    if c.num_experts and tokens <= FEW_TOKENS:  # `moe._few_tokens`
        for name in ("decoder/moe/gate_up", "decoder/moe/down"):
            hardware[name] = model[name] * min(c.num_experts, tokens * c.top_k) // c.top_k
    return StepFlops(sum(model.values()), {"decoder": sum(hardware.values())})


def serving_bytes(
    network: VLlama2Config, serving: Serving, layout: Layout, params, cache, sent: Communication
) -> float:
    """Bytes between a chip and its memory in a run of the program.

    Args:
      network, serving, layout: what is planned.
      params: {part: tree of shapes} that know where they lie.
      cache: `KVCache` of such.
      sent: by the program.
    """
    c = network.decoder
    tokens = serving.rows // layout.size("batch")
    if serving.program == "prefill":
        tokens *= serving.length
    chosen = min(1.0, tokens * c.top_k / c.num_experts) if c.num_experts else 1.0
    weights = 0.0
    for path, leaf in flatten_dict(params["decoder"], sep="/").items():
        if path.startswith("embed") and not c.tie_embeddings:
            continue  # a token reads one row of it
        weights += bytes_here(leaf) * (chosen if is_expert(path) else 1)
    gathered = sum(one.bytes * one.count for one in sent.collectives if one.kind == "all-gather")
    return weights + 2 * gathered + bytes_here((cache.keys, cache.values))
