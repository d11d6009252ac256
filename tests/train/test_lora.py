"""Adapters against PyTorch, against the chain rule, and against the kernels they merge into."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature import MINIATURE

from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.configs.fiddlers import LINEAR_LAYERS
from vllama2_jax.models.config import ConnectorConfig
from vllama2_jax.models.decoder import Decoder
from vllama2_jax.models.stacking import unstack_layers
from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params
from vllama2_jax.train.lora import adapt, merge
from vllama2_jax.train.loss import LossConfig, batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import init_state, loss_and_gradients, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "models"))
import decoder_oracle  # noqa: E402

RANK, ALPHA = 3, 4.5
KEY = jax.random.key(7)
QWEN2 = decoder_oracle.FAMILIES["qwen2"]
MIXTRAL = dataclasses.replace(decoder_oracle.FAMILIES["mixtral"], num_experts=3)
ORIGINALS = {  # of the projections in transformers
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def rules(quantize="", pattern=LINEAR_LAYERS):
    lora = Rule(pattern, "lora", rank=RANK, alpha=ALPHA, quantize=quantize)
    return lora, Rule(".*", "freeze")


def used(params):
    """The same with random B, as if adapters had been trained."""
    rng, flat = np.random.default_rng(3), flatten(params)
    for path in flat:
        if path.endswith("_lora_b"):
            flat[path] = jnp.asarray(0.3 * rng.standard_normal(flat[path].shape), jnp.float32)
    return unflatten(flat)


def filled(abstract):
    """Arrays for shapes: norms near one, everything else small."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def shapes(config):
    return {"decoder": abstract_params(network(config).config)["decoder"]}


def random_params(config):
    return filled(shapes(config))


def text_batch(config, rows=2, length=21):
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(rows, length + 1), dtype=np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        media_index=np.full((rows, length), -1, np.int32),
        frames=None,
        clip_frames=None,
        clip_mask=None,
        targets=tokens[:, 1:],
        target_weights=np.ones((rows, length), np.float32),
    )


def network(config, **options):
    connector = dataclasses.replace(MINIATURE.connector, out_dim=config.width)
    config = dataclasses.replace(MINIATURE, connector=connector, decoder=config)
    return VLlama2(config, **options)


def loss_and_adapter_gradients(config, params, which, batch, **options):
    """(mean loss, {path: gradient}) of one batch of text."""
    loss = functools.partial(batch_loss, network(config, **options), config=LossConfig(chunk=8))
    trainable, frozen = partition(params, assign_rules(which, params))
    sums, gradients = jax.jit(functools.partial(loss_and_gradients, loss))(trainable, frozen, batch)
    return float(sums.total), gradients


def logits(config, params, tokens, **options):
    decoder = Decoder(config, **options)

    @jax.jit
    def run(params):
        def body(module):
            ones = jnp.ones_like(tokens)
            hidden, _ = module(module.embed(tokens), jnp.cumsum(ones, 1) - 1, ones)
            return module.logits(hidden)

        return decoder.apply({"params": params["decoder"]}, method=body)

    return np.asarray(run(params))


def relative_errors(found, expected):
    assert set(found) == set(expected)
    return {
        path: np.abs(np.asarray(found[path]) - leaf).max() / np.abs(leaf).max()
        for path, leaf in expected.items()
    }


def test_loss_and_gradients_of_adapters_equal_torch():
    """LoRA by its formula on `nn.Linear`: A is [rank, in], B [out, rank]."""
    config = QWEN2
    model = decoder_oracle.hf_model(config)
    unrolled = decoder_oracle.params_from_hf(model, config)
    layers = [unrolled.pop(f"layer_{i}") for i in range(config.num_layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    params = used(adapt({"decoder": {**unrolled, "layers": stacked}}, rules(), KEY))
    batch, flat, theirs = text_batch(config), flatten(params), {}

    def add(module, inputs, output, a, b):
        return output + ALPHA / RANK * (inputs[0] @ a.T @ b.T)

    for ours, name in ORIGINALS.items():
        path = f"decoder/layers/{ours}/kernel"
        for i in range(config.num_layers):
            a = np.asarray(flat[f"{path}_lora_a"][i]).reshape(-1, RANK).T
            b = np.asarray(flat[f"{path}_lora_b"][i]).reshape(RANK, -1).T
            a, b = (torch.tensor(m.copy(), requires_grad=True) for m in (a, b))
            linear = model.get_submodule(f"model.layers.{i}.{name}")
            linear.register_forward_hook(functools.partial(add, a=a, b=b))
            theirs[path, i] = a, b
    out = model(input_ids=torch.tensor(batch.tokens, dtype=torch.long)).logits
    targets = torch.tensor(batch.targets, dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten())
    loss.backward()

    found, gradients = loss_and_adapter_gradients(config, params, rules(), batch)
    assert abs(found - loss.item()) <= 1e-5
    expected = {}
    for path in {path for path, _ in theirs}:
        for number, suffix in enumerate(("_lora_a", "_lora_b")):
            matrices = [theirs[path, i][number].grad.T for i in range(config.num_layers)]
            shape = flat[path + suffix].shape
            expected[path + suffix] = torch.stack(matrices).numpy().reshape(shape)
    errors = relative_errors(gradients, expected)
    assert max(errors.values()) <= 1e-4, errors


def test_gradients_through_experts_and_router_follow_the_chain_rule():
    """With G of W + s A B, A has s G B^T and B has s A^T G."""
    params = used(adapt(random_params(MIXTRAL), rules(), KEY))
    batch = text_batch(MIXTRAL, rows=1, length=20)
    options = dict(moe_backend="ragged_dot")
    loss, found = loss_and_adapter_gradients(MIXTRAL, params, rules(), batch, **options)
    whole = (Rule(LINEAR_LAYERS, "train"), Rule(".*", "freeze"))
    dense, gradients = loss_and_adapter_gradients(MIXTRAL, merge(params), whole, batch, **options)
    assert loss == pytest.approx(dense, abs=1e-5)
    assert {"decoder/layers/moe/down", "decoder/layers/moe/router/kernel"} < set(gradients)
    flat, expected = flatten(params), {}
    for path, gradient in gradients.items():
        a, b = (np.asarray(flat[path + suffix], np.float64) for suffix in ("_lora_a", "_lora_b"))
        stack = np.shape(flat[f"{path}_lora_scale"])
        a_matrix, b_matrix = a.reshape(*stack, -1, RANK), b.reshape(*stack, RANK, -1)
        g = ALPHA / RANK * np.asarray(gradient).reshape(*a_matrix.shape[:-1], b_matrix.shape[-1])
        expected[f"{path}_lora_a"] = (g @ b_matrix.swapaxes(-1, -2)).reshape(a.shape)
        expected[f"{path}_lora_b"] = (a_matrix.swapaxes(-1, -2) @ g).reshape(b.shape)
    errors = relative_errors(found, expected)
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("kind, config", [("int8", QWEN2), ("nf4", MIXTRAL)], ids=["dense", "moe"])
def test_adapters_beside_quantised_kernels_train_as_beside_the_same_numbers(kind, config):
    params = random_params(config)
    quantised = adapt(params, rules(kind), KEY)
    numbers = merge(quantised)  # B is zero: what the parts stand for
    kernel = "decoder/layers/attention/out/kernel"
    assert not np.allclose(flatten(numbers)[kernel], flatten(params)[kernel], rtol=1e-3)
    plain, batch = adapt(numbers, rules(), KEY), text_batch(config)
    options = dict(moe_backend="ragged_dot")
    dense, expected = loss_and_adapter_gradients(config, used(plain), rules(), batch, **options)
    options |= dict(remat="full")
    loss, found = loss_and_adapter_gradients(config, used(quantised), rules(kind), batch, **options)
    assert loss == pytest.approx(dense, rel=1e-6)
    errors = relative_errors(found, {path: np.asarray(leaf) for path, leaf in expected.items()})
    assert max(errors.values()) <= 1e-5, errors


def test_new_adapters_change_no_number():
    config = QWEN2
    params, tokens = random_params(config), text_batch(config).tokens
    before = logits(config, params, tokens)
    np.testing.assert_array_equal(logits(config, adapt(params, rules(), KEY), tokens), before)


@pytest.mark.parametrize(
    "kind, config, length",
    [("", QWEN2, 20), ("nf4", QWEN2, 20), ("", MIXTRAL, 20), ("int8", MIXTRAL, 6)],
    ids=["dense", "dense-nf4", "experts", "experts-int8-few-tokens"],
)
def test_merged_network_equals_the_adapted_one(kind, config, length):
    params = random_params(config)
    adapted = used(adapt(params, rules(kind), KEY))
    tokens = text_batch(config, rows=1, length=length).tokens
    merged = merge(adapted, jnp.float32)
    assert {p: x.shape for p, x in flatten(merged).items()} == {
        p: x.shape for p, x in flatten(params).items()
    }
    expected = logits(config, adapted, tokens)
    assert np.abs(expected - logits(config, params, tokens)).max() > 0.1
    found = logits(config, merged, tokens)
    assert decoder_oracle.relative_error(found, expected) <= 2e-5


def test_merged_kernels_are_summed_in_float32_and_have_the_wanted_dtype():
    config = decoder_oracle.TINY
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config))
    adapted = used(adapt(params, rules(), KEY))
    path = "decoder/layers/attention/out/kernel"
    flat = flatten(adapted)
    change = np.einsum(
        "lhdr,lrw->lhdw", *(np.asarray(flat[path + x], np.float64) for x in ("_lora_a", "_lora_b"))
    )
    expected = np.asarray(flat[path], np.float64) + ALPHA / RANK * change
    found = flatten(merge(adapted, jnp.float32))[path]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    rounded = flatten(merge(adapted))
    assert {leaf.dtype for leaf in rounded.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(rounded[path], found.astype(jnp.bfloat16))


def test_unrolled_layers_give_the_same_logits():
    params, tokens = used(adapt(random_params(QWEN2), rules("nf4"), KEY)), text_batch(QWEN2).tokens
    unrolled = {"decoder": unstack_layers(params["decoder"])}
    found = logits(QWEN2, unrolled, tokens, scan_layers=False)
    assert decoder_oracle.relative_error(found, logits(QWEN2, params, tokens)) <= 2e-5


@pytest.mark.parametrize("kind, share", [("", 1), ("nf4", 0.14)])
def test_backward_pass_holds_no_second_copy_of_the_frozen_kernels(kind, share):
    """Without rematerialisation, too, and quantised kernels are never whole for all layers."""
    config = dataclasses.replace(
        decoder_oracle.TINY, width=256, mlp_dim=512, num_heads=4, head_dim=64, num_layers=6
    )
    abstract = shapes(config)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract["decoder"]["layers"]))
    adapted = jax.eval_shape(lambda params: adapt(params, rules(kind), KEY), abstract)
    trainable, frozen = partition(adapted, assign_rules(rules(kind), adapted))
    layers = [leaf for path, leaf in frozen.items() if "/layers/" in path]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in layers) < 1.01 * share * whole
    loss = functools.partial(batch_loss, network(config))
    gradients = jax.jit(functools.partial(loss_and_gradients, loss))
    compiled = gradients.lower(trainable, frozen, text_batch(config, rows=1, length=8)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * whole


def test_adapters_and_connector_train_and_everything_else_stays():
    connector = ConnectorConfig("mlp2x_gelu", in_dim=8, out_dim=16, sampler="mean")
    config = dataclasses.replace(MINIATURE, connector=connector)
    base = filled(abstract_params(config))
    which = (Rule("connector/.*", "train"), *rules("int8"))
    params = adapt(base, which, KEY)
    assigned = assign_rules(which, params)
    trainable, frozen = partition(params, assigned)
    assert {path for path in trainable if "_lora_" not in path} == {
        path for path in flatten(base) if path.startswith("connector/")
    }
    batch = dataclasses.replace(
        text_batch(config.decoder, rows=2, length=24),
        frames=np.random.default_rng(1).integers(256, size=(2, 2, 8, 8, 3), dtype=np.uint8),
        clip_frames=np.tile(np.arange(2, dtype=np.int32), (2, 1, 1)),
        clip_mask=np.ones((2, 1), bool),
    )
    batch.media_index[:, 1:17] = np.arange(16)
    optimizer = make_optimizer(OptimizerConfig(2e-2), 60, assigned)
    loss = functools.partial(batch_loss, VLlama2(config))
    step = make_step(loss, optimizer)
    state, losses = init_state(trainable, optimizer), []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    moved = {p for p, leaf in state.trainable.items() if (leaf != trainable[p]).any()}
    assert moved == set(trainable)
    merged, before = (
        flatten(merge(p, jnp.float32)) for p in (combine(state.trainable, frozen), params)
    )
    still = {path for path, leaf in merged.items() if (leaf == before[path]).all()}
    outside = {path for path in before if not re.fullmatch(f"connector/.*|{LINEAR_LAYERS}", path)}
    assert still == outside and len(outside) > 20


def test_linear_layers_of_the_recipe_are_all_but_the_output_head():
    """`find_all_linear_names` of the original's train.py: every nn.Linear but lm_head."""
    for config in (QWEN2, MIXTRAL):
        params = shapes(config)
        adapted = jax.eval_shape(lambda params: adapt(params, rules(), KEY), params)
        kernels = {path[: -len("_lora_a")] for path in flatten(adapted) if path.endswith("_lora_a")}
        names = [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]
        if config.num_experts:
            names += ["moe/router/kernel", "moe/gate", "moe/up", "moe/down"]
        else:
            names += [f"mlp/{name}/kernel" for name in ("gate", "up", "down")]
        assert kernels == {f"decoder/layers/{name}" for name in names}


def test_output_head_may_be_adapted_and_quantised():
    config = decoder_oracle.TINY
    which = rules("nf4", "decoder/lm_head/kernel")
    params, batch = used(adapt(random_params(config), which, KEY)), text_batch(config)
    loss, gradients = loss_and_adapter_gradients(config, params, which, batch)
    dense = jax.jit(functools.partial(batch_loss, network(config)))(merge(params), batch)
    assert loss == pytest.approx(float(dense.mean().total), rel=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in gradients.values())


def test_adapters_begin_as_in_peft_whatever_the_other_rules_are():
    """A: `kaiming_uniform_` with a = sqrt(5), that is within 1 / sqrt(in). B: zero."""
    params = random_params(decoder_oracle.TINY)
    flat = flatten(adapt(params, rules(), KEY))
    a = np.asarray(flat["decoder/layers/attention/out/kernel_lora_a"])
    bound = (6 * 8) ** -0.5
    assert a.shape == (2, 6, 8, RANK) and a.dtype == np.float32
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert abs(a.mean()) < 0.1 * bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not np.asarray(flat["decoder/layers/mlp/up/kernel_lora_b"]).any()
    alone = flatten(adapt(params, rules(pattern="decoder/layers/attention/out/kernel"), KEY))
    np.testing.assert_array_equal(alone["decoder/layers/attention/out/kernel_lora_a"], a)
    other = flatten(adapt(params, rules(), jax.random.key(8)))
    assert (other["decoder/layers/attention/out/kernel_lora_a"] != a).all()


def test_without_lora_rules_nothing_changes():
    params = random_params(decoder_oracle.TINY)
    assert adapt(params, [Rule(".*", "train")], KEY) == params
    assert merge(params) == params


def test_mistakes_are_one_clear_line():
    params = random_params(MIXTRAL)
    adapted = adapt(params, rules(), KEY)
    with pytest.raises(ValueError, match="have adapters already; merge them first"):
        adapt(adapted, rules(), KEY)
    with pytest.raises(ValueError, match=r"no adapters: .*moe/gate.*call lora\.adapt first"):
        partition(params, assign_rules(rules(), params))
    split = unstack_layers(params["decoder"], split_experts=True)
    with pytest.raises(ValueError, match="narrow its pattern"):
        adapt({"decoder": split}, rules(pattern=r".*/moe/expert_0/gate"), KEY)
    unrolled = {"decoder": unstack_layers(adapted["decoder"], split_experts=True)}
    with pytest.raises(ValueError, match="split_experts=True takes no adapters"):
        logits(MIXTRAL, unrolled, jnp.ones((1, 2), int), scan_layers=False, split_experts=True)
