"""The training step: right loss, gradients only where something trains, and it learns."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.models.config import ConnectorConfig, DecoderConfig, ViTConfig, VLlama2Config
from vllama2_jax.models.vllama2 import Batch, VLlama2, init_params
from vllama2_jax.train.loop import prefetch, run_steps
from vllama2_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from vllama2_jax.train.step import (
    batch_loss,
    cross_entropy,
    init_state,
    loss_and_gradients,
    make_step,
)
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition

CONFIG = VLlama2Config(
    name="test",
    vision=ViTConfig(
        image_size=8,
        patch_size=2,
        width=8,
        mlp_dim=16,
        num_layers=2,
        num_heads=2,
        activation="gelu_tanh",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    connector=ConnectorConfig("stc_connector_v35", in_dim=8, out_dim=16, sampler="conv", depth=1),
    decoder=DecoderConfig(
        family="qwen2",
        vocab_size=32,
        width=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    num_frames=2,
)
RULES = (Rule("vision/.*", "freeze"), Rule("connector/.*", "train"), Rule(".*", "train", 0.5))
MODEL = VLlama2(CONFIG)
LOSS = functools.partial(batch_loss, MODEL)


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows, length, media = 3, 12, CONFIG.num_media_tokens()
    assert media == 4
    media_index = np.full((rows, length), -1, np.int32)
    media_index[:2, 1:5] = np.arange(media)
    weights = np.zeros((rows, length), np.float32)
    weights[0, 6:9] = 1
    weights[1, 8:10] = 1
    weights[2, 3] = 0.5
    return Batch(
        tokens=rng.integers(32, size=(rows, length), dtype=np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        media_index=media_index,
        frames=rng.integers(256, size=(rows, 2, 8, 8, 3), dtype=np.uint8),
        clip_frames=np.tile(np.arange(2, dtype=np.int32), (rows, 1, 1)),
        clip_mask=np.array([[True], [True], [False]]),
        targets=rng.integers(32, size=(rows, length), dtype=np.int32),
        target_weights=weights,
    )


def _start(params, rules=RULES, **options):
    config = OptimizerConfig(**{"learning_rate": 1e-2, "steps": 60, "warmup_steps": 3} | options)
    assigned = assign_rules(rules, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(config, assigned)
    return init_state(trainable, optimizer), frozen, optimizer


def test_cross_entropy_equals_torch_over_supervised_tokens():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 5, (4, 7, 11)).astype(np.float32)
    targets = rng.integers(11, size=(4, 7), dtype=np.int32)
    weights = (rng.random((4, 7)) < 0.4).astype(np.float32)
    total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    labels = np.where(weights > 0, targets, -100)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double().reshape(-1, 11), torch.tensor(labels).long().reshape(-1)
    )
    assert float(total / count) == pytest.approx(float(wanted), rel=1e-6)


def test_loss_is_the_weighted_mean_of_the_whole_batch(params, batch):
    hidden = MODEL.apply({"params": params}, batch)
    logits = np.asarray(MODEL.apply({"params": params}, hidden, method="logits"), np.float64)
    losses = []
    for row, slot in np.argwhere(batch.target_weights):
        scores = logits[row, slot]
        probability = np.exp(scores - scores.max())
        probability /= probability.sum()
        loss = -np.log(probability[batch.targets[row, slot]])
        losses.append((loss, batch.target_weights[row, slot]))
    wanted = sum(loss * weight for loss, weight in losses) / 5.5
    assert float(LOSS(params, batch)) == pytest.approx(wanted, rel=1e-5)


def test_batch_without_frames_is_text_alone(params, batch):
    text = dataclasses.replace(
        batch, media_index=np.full_like(batch.media_index, -1), clip_mask=batch.clip_mask & False
    )
    bare = dataclasses.replace(text, frames=None, clip_frames=None, clip_mask=None)
    assert float(LOSS(params, bare)) == pytest.approx(float(LOSS(params, text)), rel=1e-6)


def test_batch_with_nothing_to_learn_has_loss_zero(params, batch):
    idle = dataclasses.replace(batch, target_weights=np.zeros_like(batch.target_weights))
    assert float(LOSS(params, idle)) == 0.0


def test_gradients_exist_for_what_trains_only_and_match_finite_differences(params, batch):
    trainable, frozen = partition(params, assign_rules(RULES, params))
    loss, gradients = loss_and_gradients(LOSS, trainable, frozen, batch)
    assert set(gradients) == set(trainable)
    assert not any(path.startswith("vision/") for path in gradients)
    for path in ("connector/readout_0/kernel", "decoder/layers/mlp/down/kernel"):
        direction = gradients[path] / jnp.linalg.norm(gradients[path])
        step = 3e-3

        def at(offset, path=path, direction=direction, step=step):
            moved = {**trainable, path: trainable[path] + offset * step * direction}
            return float(LOSS(combine(moved, frozen), batch))

        slope = (at(1) - at(-1)) / (2 * step)
        assert slope == pytest.approx(float(jnp.linalg.norm(gradients[path])), rel=2e-2)
    assert float(loss) > 0


def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(params, batch):
    state, frozen, optimizer = _start(params)
    before = {path: np.array(leaf) for path, leaf in frozen.items()}
    first = {path: np.array(leaf) for path, leaf in state.trainable.items()}
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert shapes == sorted(2 * [leaf.shape for leaf in state.trainable.values() if leaf.ndim])
    step = make_step(LOSS, optimizer)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    for path, leaf in frozen.items():
        assert path.startswith("vision/")
        assert np.asarray(leaf).tobytes() == before[path].tobytes()
    moved = [path for path, leaf in state.trainable.items() if (first[path] != leaf).any()]
    # Of the rows of the embedding, and of nothing else, some may stay.
    assert len(moved) == len(first)


def test_step_does_not_hold_frozen_weights_as_constants(params, batch):
    state, frozen, optimizer = _start(params)
    step = make_step(LOSS, optimizer)
    step_of_zeros = {path: jnp.zeros_like(leaf) for path, leaf in frozen.items()}
    kept = jax.tree.map(jnp.array, state)
    _, with_weights = step(state, frozen, batch)
    _, with_zeros = step(kept, step_of_zeros, batch)
    assert float(with_weights["loss"]) != float(with_zeros["loss"])
    assert step._cache_size() == 1


def test_loss_falls_when_fitting_one_batch(params, batch):
    state, frozen, optimizer = _start(params)
    history = []
    state = run_steps(
        make_step(LOSS, optimizer),
        state,
        frozen,
        (batch for _ in range(60)),
        label="test",
        num_steps=60,
        log=history.append,
    )
    assert [record["step"] for record in history] == list(range(1, 61))
    assert int(state.step) == 60
    assert history[0]["loss"] > 3 and history[-1]["loss"] < 0.3 * history[0]["loss"]


def test_first_step_has_learning_rate_zero_and_schedule_is_a_half_cosine():
    config = OptimizerConfig(learning_rate=2.0, steps=110, warmup_steps=10)
    schedule = learning_rate(config)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(1.0)
    for step in (10, 35, 60, 110):
        wanted = 2.0 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 100))
        assert float(schedule(step)) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="warmup_steps"):
        learning_rate(OptimizerConfig(learning_rate=1.0, steps=5, warmup_steps=5))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optimizer_equals_torch_adamw(weight_decay):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    config = OptimizerConfig(0.1, steps=1000, warmup_steps=0, weight_decay=weight_decay)
    assigned = {"a/kernel": Rule(".*", "train"), "b/kernel": Rule(".*", "train", 0.0)}
    optimizer = make_optimizer(config, assigned)
    ours = {"a/kernel": jnp.array(start), "b/kernel": jnp.array(start)}
    state = optimizer.init(ours)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=weight_decay, eps=1e-8)
    for step in range(5):
        gradient = rng.normal(size=(3, 4)).astype(np.float32)
        for group in reference.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 1000))
        theirs.grad = torch.tensor(gradient)
        reference.step()
        updates, state = optimizer.update(dict.fromkeys(ours, jnp.array(gradient)), state, ours)
        ours = {path: ours[path] + updates[path] for path in ours}
    np.testing.assert_allclose(ours["a/kernel"], theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(ours["b/kernel"], start)


def test_run_stops_at_a_loss_that_is_not_finite_and_when_batches_run_out(params, batch):
    state, frozen, optimizer = _start(params)
    step = make_step(LOSS, optimizer)
    common = dict(label="test", num_steps=3)
    with pytest.raises(ValueError, match="ran out"):
        run_steps(step, state, frozen, [batch], **common)
    state, frozen, _ = _start(params)
    broken = dataclasses.replace(batch, target_weights=batch.target_weights * np.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        run_steps(step, state, frozen, [broken], **common)


def test_prefetch_keeps_order_and_raises_the_errors_of_its_source():
    def source():
        yield from range(5)
        raise OSError("disk")

    items = prefetch(source())
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="disk"):
        next(items)
