"""The training step: right loss, gradients only where something trains, and it learns."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from miniature import MINIATURE

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.models.vllama2 import Batch, VLlama2, init_params
from vllama2_jax.train.loss import LossConfig, LossSums, batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import init_state, loss_and_gradients, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition

RULES = (Rule("vision/.*", "freeze"), Rule("connector/.*", "train"), Rule(".*", "train", 0.5))
MODEL = VLlama2(MINIATURE)
LOSS = functools.partial(batch_loss, MODEL)
EVALUATE = jax.jit(functools.partial(loss_and_gradients, LOSS))
COMPILED_LOSS = jax.jit(lambda params, batch: LOSS(params, batch).mean().total)


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(lambda: init_params(MINIATURE, jax.random.key(0)))())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows, length, media = 4, 12, MINIATURE.num_media_tokens()
    assert media == 4
    media_index = np.full((rows, length), -1, np.int32)
    media_index[[0, 1, 3], 1:5] = np.arange(media)
    weights = np.zeros((rows, length), np.float32)
    weights[0, 6:9] = 1
    weights[1, 8:10] = 1
    weights[2, 3] = 0.5  # a row of text; the last row has nothing to learn
    return Batch(
        tokens=rng.integers(32, size=(rows, length), dtype=np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        media_index=media_index,
        frames=rng.integers(256, size=(rows, 2, 8, 8, 3), dtype=np.uint8),
        clip_frames=np.tile(np.arange(2, dtype=np.int32), (rows, 1, 1)),
        clip_mask=np.array([[True], [True], [False], [True]]),
        targets=rng.integers(32, size=(rows, length), dtype=np.int32),
        target_weights=weights,
    )


@pytest.fixture(scope="module")
def training(params):
    """(a function that makes the first state, the frozen parameters, the compiled step)."""
    assigned = assign_rules(RULES, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(OptimizerConfig(3e-2, warmup_ratio=0.05), 60, assigned)
    step = make_step(LOSS, optimizer)
    return lambda: init_state(trainable, optimizer), frozen, step


def test_loss_is_the_weighted_mean_of_the_whole_batch(params, batch):
    hidden = jax.jit(MODEL.apply)({"params": params}, batch)
    logits = np.asarray(MODEL.apply({"params": params}, hidden, method="logits"), np.float64)
    losses = []
    for row, slot in np.argwhere(batch.target_weights):
        scores = logits[row, slot]
        probability = np.exp(scores - scores.max())
        probability /= probability.sum()
        loss = -np.log(probability[batch.targets[row, slot]])
        losses.append((loss, batch.target_weights[row, slot]))
    wanted = sum(loss * weight for loss, weight in losses) / 5.5
    assert float(COMPILED_LOSS(params, batch)) == pytest.approx(wanted, rel=1e-5)


def test_batch_without_frames_is_text_alone(params, batch):
    text = dataclasses.replace(
        batch, media_index=np.full_like(batch.media_index, -1), clip_mask=batch.clip_mask & False
    )
    bare = dataclasses.replace(text, frames=None, clip_frames=None, clip_mask=None)
    wanted = float(COMPILED_LOSS(params, text))
    assert float(COMPILED_LOSS(params, bare)) == pytest.approx(wanted, rel=1e-6)


def test_batch_with_nothing_to_learn_has_loss_zero(params, batch):
    idle = dataclasses.replace(batch, target_weights=np.zeros_like(batch.target_weights))
    assert float(COMPILED_LOSS(params, idle)) == 0.0


def test_gradients_exist_for_what_trains_only_and_match_finite_differences(params, batch):
    trainable, frozen = partition(params, assign_rules(RULES, params))
    sums, gradients = EVALUATE(trainable, frozen, batch)
    assert set(gradients) == set(trainable)
    assert not any(path.startswith("vision/") for path in gradients)
    for path in ("connector/readout_0/kernel", "decoder/layers/mlp/down/kernel"):
        direction = gradients[path] / jnp.linalg.norm(gradients[path])
        step = 3e-3

        def at(offset, path=path, direction=direction, step=step):
            moved = {**trainable, path: trainable[path] + offset * step * direction}
            return float(COMPILED_LOSS(combine(moved, frozen), batch))

        slope = (at(1) - at(-1)) / (2 * step)
        assert slope == pytest.approx(float(jnp.linalg.norm(gradients[path])), rel=2e-2)
    assert float(sums.total) > 0


def test_state_holds_what_trains_and_nothing_else(params, batch, training):
    start, frozen, step = training
    wanted = {path for path in flatten(params) if not path.startswith("vision/")}
    assert wanted and wanted.isdisjoint(frozen) and wanted | set(frozen) == set(flatten(params))
    state = start()
    first = {path: np.array(leaf) for path, leaf in state.trainable.items()}
    for _ in range(3):  # the first step has a learning rate of zero
        state, _ = step(state, frozen, batch)
    assert set(state.trainable) == wanted
    (adam,) = (s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s))
    assert set(adam.mu) == set(adam.nu) == wanted
    # Beside Adam's two moments of every parameter there are only counts of steps.
    arrays = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert len(arrays) == 2 * len(wanted)
    still = [path for path, leaf in state.trainable.items() if (first[path] == leaf).all()]
    assert not still


def test_chunks_and_longer_rows_change_no_loss(params, batch):
    def longer(values, fill):
        return np.pad(values, ((0, 0), (0, 7)), constant_values=fill)

    padded = dataclasses.replace(
        batch,
        media_index=longer(batch.media_index, -1),
        **{
            name: longer(getattr(batch, name), 0)
            for name in ("tokens", "positions", "segment_ids", "targets", "target_weights")
        },
    )
    loss = functools.partial(batch_loss, MODEL, config=LossConfig(chunk=5))
    sums = jax.jit(lambda params, batch: loss(params, batch).mean())(params, padded)
    assert float(sums.total) == pytest.approx(float(COMPILED_LOSS(params, batch)), rel=1e-6)
    assert {name: float(value) for name, value in sums.counts.items()} == {
        "tokens": 48,
        "supervised_tokens": 6,
    }


def _is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def test_step_consumes_its_state_and_leaves_the_frozen_weights_alone(batch, training):
    start, frozen, step = training
    before = start()
    step(before, frozen, batch)
    assert all(leaf.is_deleted() for leaf in before.trainable.values())
    assert not any(leaf.is_deleted() for leaf in frozen.values())


def test_step_does_not_hold_frozen_weights_as_constants(batch, training):
    start, frozen, step = training
    zeros = {path: jnp.zeros_like(leaf) for path, leaf in frozen.items()}
    _, with_weights = step(start(), frozen, batch)
    _, with_zeros = step(start(), zeros, batch)
    assert float(with_weights["loss"]) != float(with_zeros["loss"])
    assert step._cache_size() == 1


def test_one_batch_is_learnt_by_heart(batch, training):
    start, frozen, step = training
    state, losses = start(), []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 60
    assert losses[0] > 3 and losses[-1] < 0.05 * losses[0]


def squares(params, batch):
    """A loss with one parameter of each part: rows of weight `w` cost w * (part - x)^2."""
    costs = sum((params[part]["bias"] - batch["x"]) ** 2 for part in params)
    return LossSums((costs * batch["w"]).sum(), batch["w"].sum(), {}, {"tokens": batch["w"].sum()})


MASTERS = {"connector/bias": np.float32(1), "decoder/bias": np.float32(-2)}
ROWS = {"x": np.arange(8, dtype=np.float32), "w": np.float32([3, 1, 0, 0, 2, 1, 5, 0])}


def test_accumulation_of_four_equals_one_batch_of_the_whole(params, batch):
    trainable, frozen = partition(params, assign_rules(RULES, params))
    whole, wanted = EVALUATE(trainable, frozen, batch)
    in_parts = jax.jit(functools.partial(loss_and_gradients, LOSS, micro_batches=4))
    parts, gradients = in_parts(trainable, frozen, batch)
    assert float(parts.total) == pytest.approx(float(whole.total), rel=1e-6)
    assert parts.counts == whole.counts
    assert set(gradients) == set(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(gradients[path], leaf, atol=1e-5 * np.abs(leaf).max())


@pytest.mark.parametrize("average", ["tokens", "micro_batches"])
def test_average_is_over_tokens_or_over_micro_batches_as_in_the_original(average):
    evaluate = functools.partial(loss_and_gradients, squares, micro_batches=4, average=average)
    sums, gradients = jax.jit(evaluate)(MASTERS, {}, ROWS)
    x, w = ROWS["x"].astype(np.float64), ROWS["w"].astype(np.float64)
    share = w / w.sum()
    if average == "micro_batches":  # rows i and i + 4; numbers 2 and 3 weigh 0 + 5 and 0 + 0
        means = np.add(w[:4], w[4:])
        share = w / np.tile(np.where(means > 0, means, 1), 2) / 3
    costs = (1 - x) ** 2 + (-2 - x) ** 2
    assert float(sums.total) == pytest.approx((share * costs).sum(), rel=1e-6)
    wanted = (share * 2 * (1 - x)).sum()
    assert float(gradients["connector/bias"]) == pytest.approx(wanted, rel=1e-6)
    assert float(sums.counts["tokens"]) == 12


def test_rows_that_do_not_split_and_unknown_averages_are_refused():
    with pytest.raises(ValueError, match="8 rows cannot be split into 3 equal micro-batches"):
        loss_and_gradients(squares, MASTERS, {}, ROWS, micro_batches=3)
    with pytest.raises(ValueError, match="unknown average 'rows'; known: tokens, micro_batches"):
        loss_and_gradients(squares, MASTERS, {}, ROWS, average="rows")


def test_gradient_norms_are_told_for_all_and_for_each_part():
    optimizer = optax.sgd(0.1)
    _, metrics = make_step(squares, optimizer)(init_state(MASTERS, optimizer), {}, ROWS)
    mean = (ROWS["x"] * ROWS["w"]).sum() / ROWS["w"].sum()
    norms = {"connector": abs(2 * (1 - mean)), "decoder": abs(2 * (-2 - mean))}
    for part, norm in norms.items():
        assert float(metrics[f"grad_norm/{part}"]) == pytest.approx(norm, rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(np.hypot(*norms.values()), rel=1e-6)
    assert float(metrics["tokens"]) == 12


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_updates_below_a_bfloat16_step_add_up_in_float32_masters(micro_batches):
    seen = []

    def loss(params, batch):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return squares(params, batch)

    optimizer = optax.sgd(1e-5)
    # Given as bfloat16, as a saved model is; above 1 its next number is 1 + 1/128.
    state = init_state({p: jnp.bfloat16(leaf) for p, leaf in MASTERS.items()}, optimizer)
    step = make_step(loss, optimizer, micro_batches=micro_batches, compute_dtype=jnp.bfloat16)
    for _ in range(20):
        state, metrics = step(state, {}, ROWS)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert all(leaf.dtype == jnp.float32 for leaf in state.trainable.values())
    mean = (ROWS["x"] * ROWS["w"]).sum() / ROWS["w"].sum()
    moved = float(state.trainable["connector/bias"]) - 1
    assert moved == pytest.approx(20 * 1e-5 * 2 * (mean - 1), rel=2e-2) and moved < 1 / 256
    assert metrics["grad_norm"].dtype == jnp.float32


def test_step_with_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    optimizer = optax.adam(0.1)
    step = make_step(squares, optimizer)
    state, _ = step(init_state(MASTERS, optimizer), {}, ROWS)
    before = jax.tree.map(np.array, state)
    after, metrics = step(state, {}, {**ROWS, "x": ROWS["x"] * np.float32("nan")})
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    again, _ = step(after, {}, ROWS)
    assert int(again.step) == 2


def test_batch_with_nothing_to_learn_has_loss_and_gradients_zero():
    idle = {**ROWS, "w": ROWS["w"] * 0}
    for average in ("tokens", "micro_batches"):
        sums, gradients = loss_and_gradients(
            squares, MASTERS, {}, idle, micro_batches=2, average=average
        )
        assert float(sums.total) == 0 and not any(map(float, gradients.values()))
