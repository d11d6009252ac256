"""FLOPs of a step: exactly PyTorch's where gradients flow, XLA's where blocks run again."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from miniature import SEEING_TINY

from vllama2_jax.convert.hf_config import model_from_json, read_json
from vllama2_jax.models.config import ConnectorConfig, DecoderConfig
from vllama2_jax.models.flops import forward_flops
from vllama2_jax.models.remat import REMAT_POLICIES
from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params
from vllama2_jax.train.flops import step_flops
from vllama2_jax.train.loss import LossConfig, batch_loss

FROZEN = dict(vision="freeze", connector="freeze", decoder="freeze")
STEPS, TEXT = 4, 20
STAGES = {
    "pretrain": FROZEN | dict(connector="train"),
    "sft": FROZEN | dict(connector="train", decoder="train"),
    "decoder": FROZEN | dict(decoder="train"),
    "all": dict.fromkeys(FROZEN, "train"),
    "lora": FROZEN | dict(connector="train", decoder="lora"),
    "nothing": FROZEN,
}


def convolution_backward(grad_out, inputs, kernel, *args, **kwargs):
    """A forward pass for each gradient; torch's own formula takes groups for dense ones."""
    wanted = args[7]  # of input, kernel, bias
    return sum(wanted[:2]) * 2 * math.prod(grad_out) * math.prod(kernel[1:])


def add_adapters(language, rank=3):
    """Adapters beside queries and down projections; how many parameters they have."""
    import torch

    def adapt(layer):
        a = torch.nn.Parameter(torch.zeros(layer.in_features, rank))
        b = torch.nn.Parameter(torch.zeros(rank, layer.out_features))
        layer.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ a @ b)
        return a.numel() + b.numel()

    layers = [m for name, m in language.named_modules() if name.endswith(("q_proj", "down_proj"))]
    return sum(adapt(layer) for layer in layers)


@pytest.mark.parametrize(
    ("connector", "stage"),
    [*(("stc_connector", stage) for stage in STAGES), ("mlp2x_gelu", "pretrain")],
)
def test_each_stage_takes_what_pytorch_counts_forward_and_backward(tmp_path, connector, stage):
    torch = pytest.importorskip("torch")
    import oracle
    from torch.utils.flop_counter import FlopCounterMode

    actions = STAGES[stage]
    model = oracle.write_miniature(tmp_path, "qwen2", "clip", connector, num_frames=STEPS)
    config = model_from_json(read_json(tmp_path / "config.json"), "test")
    model.tower.encoder.layers = model.tower.encoder.layers[: config.vision.num_blocks_used]
    for part, module in zip(FROZEN, (model.tower, model.connector, model.language), strict=True):
        module.requires_grad_(actions[part] == "train")
    adapter_params = add_adapters(model.language) if stage == "lora" else 0
    text = torch.zeros(2, TEXT, dtype=torch.long)
    size = config.vision.image_size

    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        hidden = model.tower(torch.zeros(2 * STEPS, 3, size, size), output_hidden_states=True)
        features = hidden.hidden_states[-1][:, 1:].unflatten(0, (2, STEPS))
        rows = [model.language.get_input_embeddings()(text), model.connector(features)]
        logits = model.language(inputs_embeds=torch.cat(rows, dim=1)).logits
        if logits.requires_grad:
            logits.sum().backward()

    length = logits.shape[1]
    shape = dict(rows=2, length=length, frames=STEPS, clips=1)
    flops = step_flops(config, actions, **shape, adapter_params=adapter_params)
    # PyTorch multiplies the whole square of scores, which we count by half.
    passes = 1 if stage == "nothing" else 3
    square = passes * forward_flops(config, **shape)["decoder/attention/scores"]
    assert flops.model + square == counter.get_total_flops()
    assert flops.hardware == flops.model


# One short row: attention is one square there, and each expert gets one block of 128 tokens.
LENGTH, CHUNK, EXPERTS = 128, 32, 2


def text_config(num_experts):
    tiny = SEEING_TINY
    decoder = DecoderConfig(
        family="mixtral" if num_experts else "qwen2",
        vocab_size=512,
        width=256,
        mlp_dim=768,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e4,
        norm_eps=1e-6,
        num_experts=num_experts,
    )
    connector = ConnectorConfig("linear", tiny.vision.width, decoder.width, sampler="mean")
    return dataclasses.replace(tiny, decoder=decoder, connector=connector)


def compiled_flops(config, remat, chunk):
    """XLA's count of loss and gradients of an unrolled decoder; the body of a loop counts once."""
    model = VLlama2(config, remat=remat, scan_layers=False)
    params = abstract_params(config, scan_layers=False)
    row = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, LENGTH), jnp.float32)
    batch = Batch(row, row, row, None, None, None, None, row, weights)

    @jax.value_and_grad
    def loss(decoder, others, batch):
        return batch_loss(model, others | {"decoder": decoder}, batch, LossConfig(chunk)).total

    others = {part: leaf for part, leaf in params.items() if part != "decoder"}
    compiled = jax.jit(loss).lower(params["decoder"], others, batch).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("num_experts", [0, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_blocks_computed_again_cost_what_xla_compiles(remat, num_experts):
    config = text_config(num_experts)
    shape = dict(rows=1, length=LENGTH, frames=0, clips=0)
    actions = FROZEN | dict(decoder="train")
    flops = step_flops(config, actions, **shape, remat=remat)
    # XLA multiplies the whole square, once more where it is computed again.
    passes = 3 if remat == "none" else 4
    square = passes * forward_flops(config, **shape)["decoder/attention/scores"]
    # The rest are elementwise operations, which it counts, too.
    assert 1.0 < compiled_flops(config, remat, None) / (flops.hardware + square) < 1.015
    assert flops.model == step_flops(config, actions, **shape).hardware


def test_logits_of_chunks_are_computed_again():
    config, actions = text_config(0), FROZEN | dict(decoder="train")
    shape = dict(rows=1, length=LENGTH, frames=0, clips=0)
    flops = functools.partial(step_flops, config, actions, **shape)
    head = forward_flops(config, **shape)["decoder/lm_head"]
    assert flops(loss_chunk=CHUNK).hardware == flops().hardware + head
    assert flops(loss_chunk=LENGTH) == flops()
    # XLA sees four products of one chunk in place of three of the row.
    saved = compiled_flops(config, "none", None) - compiled_flops(config, "none", CHUNK)
    assert saved == pytest.approx(3 * head - 4 * head * CHUNK / LENGTH, rel=0.02)


def test_text_alone_trains_without_the_tower_and_its_connector():
    shape = dict(rows=2, length=64, frames=0, clips=0)
    tiny = SEEING_TINY
    expected = 3 * sum(forward_flops(tiny, **shape).values())
    for actions in (STAGES["sft"], STAGES["all"]):
        assert step_flops(tiny, actions, **shape).model == expected


@pytest.mark.parametrize(
    ("actions", "options", "words"),
    [
        (dict(decoder="train"), {}, "actions must name vision, connector, decoder, not decoder"),
        (FROZEN | dict(decoder="tune"), {}, "decoder: unknown action 'tune'; known: train, lora"),
        (FROZEN, dict(remat="some"), "unknown remat policy 'some'; known: none, dots, full"),
    ],
)
def test_what_cannot_be_meant_is_refused(actions, options, words):
    with pytest.raises(ValueError, match=words):
        step_flops(SEEING_TINY, actions, rows=1, length=8, frames=0, clips=0, **options)
