"""The loss against torch and plain formulas, and that logits never stand in memory whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature import MINIATURE

from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params
from vllama2_jax.train.loss import (
    LossConfig,
    LossSums,
    batch_loss,
    chunked_cross_entropy,
    cross_entropy,
)

ROWS, LENGTH, WIDTH, VOCAB = 3, 23, 8, 50


@pytest.fixture(scope="module")
def problem():
    """Hidden states, head, targets and weights; targets are not ids where the weight is 0."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    weights = (rng.random((ROWS, LENGTH)) < 0.4) * rng.uniform(0.5, 2, (ROWS, LENGTH))
    weights[:, 8:16] = 0  # a video, say
    targets = np.where(weights > 0, rng.integers(VOCAB, size=(ROWS, LENGTH)), -100)
    return hidden, kernel, targets.astype(np.int32), weights.astype(np.float32)


def project(head, rows):
    return rows @ head["kernel"]


def chunked(kernel, hidden, targets, weights, chunk, z_loss=0.0):
    """The chunked loss and (log Z)^2 as one scalar."""
    losses, squares = chunked_cross_entropy(
        project, {"kernel": kernel}, hidden, targets, weights, chunk
    )
    return ((losses + z_loss * squares) * weights).sum()


def by_torch(hidden, kernel, targets, weights, z_loss):
    """(scalar, gradient of the kernel, gradient of the hidden states) in float64."""
    torch = pytest.importorskip("torch")
    hidden, kernel = (torch.tensor(x).double().requires_grad_() for x in (hidden, kernel))
    logits = (hidden @ kernel).reshape(-1, VOCAB)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets).long().reshape(-1), reduction="none"
    )
    losses = losses + z_loss * torch.logsumexp(logits, -1) ** 2
    total = (losses * torch.tensor(weights).double().reshape(-1)).sum()
    total.backward()
    return total.item(), kernel.grad.numpy(), hidden.grad.numpy()


def test_cross_entropy_equals_torch_over_supervised_tokens(problem):
    hidden, kernel, targets, weights = problem
    total, count = cross_entropy(jnp.asarray(hidden @ kernel), targets, jnp.asarray(weights))
    assert float(total) == pytest.approx(by_torch(hidden, kernel, targets, weights, 0)[0], rel=1e-6)
    assert float(count) == pytest.approx(weights.sum(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [4, 23, None])
def test_chunked_loss_and_gradients_equal_torch(problem, chunk, z_loss):
    hidden, kernel, targets, weights = problem
    loss = functools.partial(chunked, chunk=chunk, z_loss=z_loss)
    evaluate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = evaluate(kernel, hidden, targets, weights)
    wanted, *wanted_gradients = by_torch(hidden, kernel, targets, weights, z_loss)
    assert float(value) == pytest.approx(wanted, rel=1e-6)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


def test_weights_of_zero_give_zero_and_no_gradient(problem):
    hidden, kernel, targets, weights = problem
    for chunk in (4, None):
        loss = functools.partial(chunked, chunk=chunk, z_loss=0.1)
        evaluate = jax.jit(jax.value_and_grad(loss))
        value, gradient = evaluate(kernel, hidden, targets * 0 - 100, weights * 0)
        assert float(value) == 0 and not np.asarray(gradient).any()


def test_chunks_without_supervised_slots_are_not_projected(problem):
    hidden, kernel, targets, weights = problem
    spoiled = hidden.copy()
    spoiled[:, 8:16] = np.nan
    evaluate = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk=4)))
    value, gradient = evaluate(kernel, spoiled, targets, weights)
    wanted, wanted_gradient = evaluate(kernel, hidden, targets, weights)
    assert float(value) == float(wanted)
    np.testing.assert_array_equal(gradient, wanted_gradient)


def largest_array(function, *args):
    """Elements of the largest array in a function's program, loops and branches included."""

    def is_program(value):
        return hasattr(value, "eqns")  # of a loop, a branch or a rematerialised part

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (np.prod(var.aval.shape, dtype=int) for var in equation.outvars)
            for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
                if is_program(value):
                    yield from walk(getattr(value, "jaxpr", value))

    return max(walk(jax.make_jaxpr(function)(*args).jaxpr))


def test_logits_and_their_gradient_never_stand_in_memory_whole(problem):
    hidden, kernel, targets, weights = problem

    def largest(chunk):
        loss = functools.partial(chunked, chunk=chunk)
        return largest_array(jax.grad(loss, argnums=(0, 1)), kernel, hidden, targets, weights)

    assert largest(None) == ROWS * LENGTH * VOCAB
    assert largest(4) == ROWS * 4 * VOCAB


def test_gradients_of_a_bfloat16_head_add_up_in_float32():
    """1,024 chunks that each add 1/1024: in bfloat16 the sum would stop at a quarter."""
    hidden = np.ones((1, 2048, 1), np.float32)
    targets, weights = np.zeros((1, 2048), np.int32), np.full((1, 2048), 2 / 2048, np.float32)
    kernel = jnp.zeros((1, 2), jnp.bfloat16)
    gradient = jax.jit(jax.grad(functools.partial(chunked, chunk=2)))(
        kernel, hidden, targets, weights
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[-1, 1]])


def test_means_add_up_over_parts_of_a_batch_and_nothing_has_mean_zero():
    def sums(*values):
        total, weight, part, count = map(jnp.float32, values)
        return LossSums(total, weight, {"part": part}, {"tokens": count})

    whole = jax.tree.map(jnp.add, sums(6, 2, 4, 9), sums(3, 1, 2, 1)).mean()
    assert (whole.total, whole.weight, whole.parts["part"]) == (3, 1, 2)
    assert whole.counts["tokens"] == 10
    nothing = sums(0, 0, 0, 5).mean()
    assert (nothing.total, nothing.weight, nothing.parts["part"]) == (0, 0, 0)
    assert nothing.counts["tokens"] == 5


@pytest.mark.parametrize(
    "arguments", [{"chunk": 0}, {"z_loss": -1e-4}, {"load_balancing": -0.02}], ids=str
)
def test_loss_refuses_what_cannot_be_meant(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LossConfig(**arguments)


def rows_of_text(segments):
    rng = np.random.default_rng(1)
    segments = np.asarray(segments, np.int32)
    return Batch(
        tokens=rng.integers(32, size=segments.shape, dtype=np.int32),
        positions=np.tile(np.arange(segments.shape[1], dtype=np.int32), (len(segments), 1)),
        segment_ids=segments,
        media_index=np.full_like(segments, -1),
        frames=None,
        clip_frames=None,
        clip_mask=None,
        targets=rng.integers(32, size=segments.shape, dtype=np.int32),
        target_weights=(segments > 0).astype(np.float32),
    )


def test_batch_of_padding_alone_has_loss_zero_with_every_part_on():
    decoder = dataclasses.replace(
        MINIATURE.decoder, family="mixtral", num_experts=4, qkv_bias=False, num_layers=1
    )
    config = dataclasses.replace(MINIATURE, decoder=decoder)
    model = VLlama2(config, moe_backend="ragged_dot")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32), abstract_params(config)
    )
    loss = LossConfig(chunk=6, z_loss=1e-4, load_balancing=0.02)

    @jax.jit
    def evaluate(decoder, batch):
        def total(decoder):
            sums = batch_loss(model, {**params, "decoder": decoder}, batch, loss).mean()
            return sums.total, sums

        return jax.grad(total, has_aux=True)(decoder)

    gradients, sums = evaluate(params["decoder"], rows_of_text([[0] * 10, [0] * 10]))
    assert float(sums.total) == 0 and float(sums.counts["tokens"]) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
    gradients, sums = evaluate(params["decoder"], rows_of_text([[1] * 4 + [0] * 6, [0] * 10]))
    parts = {name: float(value) for name, value in sums.parts.items()}
    wanted = parts["cross_entropy"] + 1e-4 * parts["z_loss"] + 0.02 * parts["load_balancing"]
    assert float(sums.total) == pytest.approx(wanted, rel=1e-6)
    assert 1.5 < parts["load_balancing"] < 3 and float(sums.counts["tokens"]) == 4


def test_load_balancing_of_a_dense_decoder_is_refused():
    batch = rows_of_text([[1] * 4])
    params = abstract_params(MINIATURE)
    loss = functools.partial(batch_loss, VLlama2(MINIATURE), config=LossConfig(load_balancing=0.02))
    with pytest.raises(ValueError, match="without experts has no router logits"):
        jax.eval_shape(loss, params, batch)
