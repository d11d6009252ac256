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
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import (
    batch_loss,
    cross_entropy,
    init_state,
    loss_and_gradients,
    make_step,
)
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition

RULES = (Rule("vision/.*", "freeze"), Rule("connector/.*", "train"), Rule(".*", "train", 0.5))
MODEL = VLlama2(MINIATURE)
LOSS = functools.partial(batch_loss, MODEL)
COMPILED_LOSS = jax.jit(LOSS)


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(lambda: init_params(MINIATURE, jax.random.key(0)))())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows, length, media = 3, 12, MINIATURE.num_media_tokens()
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


@pytest.fixture(scope="module")
def training(params):
    """(a function that makes the first state, the frozen parameters, the compiled step)."""
    assigned = assign_rules(RULES, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(OptimizerConfig(3e-2, steps=60, warmup_steps=3), assigned)
    step = make_step(LOSS, optimizer)
    return lambda: init_state(trainable, optimizer), frozen, step


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
    evaluate = jax.jit(functools.partial(loss_and_gradients, LOSS))
    loss, gradients = evaluate(trainable, frozen, batch)
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
    assert float(loss) > 0


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
