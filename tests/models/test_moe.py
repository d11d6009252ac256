"""The mixture of experts against transformers' Mixtral and against plain loops."""

import contextlib
import dataclasses
import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_oracle import FAMILIES, hf_model, params_from_hf, relative_error
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vllama2_jax.models.decoder import Decoder
from vllama2_jax.models.expert_parallel import FEW_TOKENS
from vllama2_jax.models.grouped_matmul import grouped_matmul
from vllama2_jax.models.moe import MoE, load_balancing_loss

CONFIG = FAMILIES["mixtral"]
ON_CPU = ("blocks", "ragged_dot")


@pytest.fixture(scope="module")
def block():
    """transformers' MoE block and our parameters of it."""
    model = hf_model(CONFIG)
    return model.model.layers[0].mlp, params_from_hf(model, CONFIG)["layer_0"]["moe"]


def split(params):
    """The block's parameters with arrays of its own for every expert."""
    return {
        "router": params["router"],
        **{
            f"expert_{e}": {name: params[name][e] for name in ("gate", "up", "down")}
            for e in range(CONFIG.num_experts)
        },
    }


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("split_experts", [False, True])
@pytest.mark.parametrize("rows, length", [(1, 1), (FEW_TOKENS, 1), (1, FEW_TOKENS + 1), (2, 300)])
def test_moe_equals_transformers(block, backend, split_experts, rows, length):
    theirs, params = block
    x = np.random.default_rng(0).standard_normal((rows, length, CONFIG.width)).astype(np.float32)
    if split_experts:
        params = split(params)
    module = MoE(CONFIG, jnp.float32, jnp.float32, backend, split_experts)
    with jax.default_matmul_precision("highest"):
        ours, logits = jax.jit(module.apply)({"params": params}, jnp.array(x))
    with torch.no_grad():
        reference = theirs(torch.tensor(x)).numpy()
    assert logits.shape == (rows, length, CONFIG.num_experts)
    assert relative_error(ours, reference) <= 2e-5


SIZES = [[3, 0, 4, 0], [0, 0, 0, 7], [400, 1, 0, 199], [128, 128, 256, 88], [150, 150, 2, 0]]


@pytest.mark.parametrize("left_over", [0, 5])
@pytest.mark.parametrize(
    "backend, sizes",
    [*itertools.product(ON_CPU, SIZES), *itertools.product(["megablox"], SIZES[1:3])],
)
def test_grouped_matmul_and_its_gradients_equal_loops(backend, sizes, left_over):
    """Also with rows left over, which are no numbers; TPU kernels are interpreted."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(sizes), 12)).astype(np.float32)
    weights = rng.standard_normal((len(sizes), 12, 10)).astype(np.float32)
    cotangent = rng.standard_normal((sum(sizes), 10)).astype(np.float32)
    owner = np.repeat(np.arange(len(sizes)), sizes)

    def longer(rows):
        return jnp.pad(rows, ((0, left_over), (0, 0)), constant_values=np.nan)

    interpreted = force_tpu_interpret_mode() if backend == "megablox" else contextlib.nullcontext()
    with interpreted:
        out, vjp = jax.vjp(
            lambda x, w: grouped_matmul(x, w, jnp.array(sizes), backend),
            longer(x),
            jnp.array(weights),
        )
        grad_x, grad_w = vjp(longer(cotangent))
    expected = np.stack([row @ weights[g] for row, g in zip(x, owner, strict=True)])
    expected_x = np.stack([row @ weights[g].T for row, g in zip(cotangent, owner, strict=True)])
    expected_w = np.stack([x[owner == g].T @ cotangent[owner == g] for g in range(len(sizes))])
    assert out.shape == (sum(sizes) + left_over, 10) and grad_x.shape == (len(out), 12)
    assert relative_error(out[: len(x)], expected) <= 2e-6
    assert relative_error(grad_x[: len(x)], expected_x) <= 2e-6
    assert relative_error(grad_w, expected_w) <= 5e-6


@pytest.mark.parametrize("split_experts", [False, True])
def test_of_few_tokens_only_chosen_experts_are_read(split_experts):
    """Their products stand under conditions, of which one branch runs; the router's does not."""
    module = MoE(CONFIG, jnp.float32, jnp.float32, "blocks", split_experts)
    x = jnp.ones((1, 1, CONFIG.width))
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    branches, entry = jax.jit(module.apply).lower(params, x).compile().as_text().split("\nENTRY", 1)
    assert entry.count(" conditional(") == 2 * CONFIG.num_experts
    assert entry.count(" dot(") == 1 and branches.count(" dot(") == 3 * CONFIG.num_experts


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_equals_transformers(padded):
    logits = np.random.default_rng(0).standard_normal((3, 2, 11, 8)).astype(np.float32)
    mask = np.ones((2, 11), np.int64)
    if padded:
        mask[1, 6:] = 0
    reference = load_balancing_loss_func(
        tuple(torch.tensor(layer).reshape(-1, 8) for layer in logits),
        8,
        2,
        torch.tensor(mask) if padded else None,
    )
    ours = load_balancing_loss(jnp.array(logits), 2, jnp.array(mask) if padded else None)
    assert abs(float(ours) - float(reference)) <= 1e-5 * float(reference)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_router_logits_come_only_on_request(scan_layers):
    config = dataclasses.replace(CONFIG, num_layers=2)
    decoder = Decoder(config, scan_layers=scan_layers)
    x = jax.random.normal(jax.random.key(1), (1, 6, config.width))
    where = (jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
    variables = jax.jit(decoder.init)(jax.random.key(0), x, *where)
    assert set(variables) == {"params"}
    assert len(decoder.apply(variables, x, *where)) == 2
    hidden, cache, logits = decoder.apply(variables, x, *where, with_router_logits=True)
    assert hidden.shape == x.shape and cache is None
    assert logits.shape == (2, 1, 6, config.num_experts)
    assert not np.allclose(logits[0], logits[1])


def test_backends_that_cannot_be_used_are_one_clear_error(monkeypatch):
    arguments = jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2])
    with pytest.raises(ValueError, match="unknown grouped matmul backend 'cutlass'; known: blocks"):
        grouped_matmul(*arguments, "cutlass")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ImportError, match=r"pip install 'vllama2_jax\[tokamax\]'"):
        grouped_matmul(*arguments, "tokamax")


def test_tokamax_compiles_for_gpus_on_a_machine_without():
    pytest.importorskip("tokamax", reason="optional; pip install 'vllama2_jax[tokamax]'")
    shapes = [((64, 32), jnp.bfloat16), ((4, 32, 48), jnp.bfloat16), ((4,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    run = jax.grad(lambda *args: grouped_matmul(*args, "tokamax").astype(float).sum(), (0, 1))
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 2
