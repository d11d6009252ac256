"""Choosing tokens, against transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.infer.sampling import Sampler, Sampling, choose

torch = pytest.importorskip("torch")
from transformers import (  # noqa: E402
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 50


def drawn(logits, sampling, seen=None, draws=4000):
    """How often each token is chosen."""
    keys = jax.random.split(jax.random.key(3), draws)
    rows = jnp.broadcast_to(logits, (draws, VOCAB))
    seen = jnp.zeros((draws, VOCAB), bool) if seen is None else jnp.broadcast_to(seen, rows.shape)
    tokens = choose(rows, seen, keys, Sampler.create(sampling))
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / draws


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (
            Sampling(temperature=1.5, top_k=20, top_p=0.8),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
        ),
    ],
    ids=["temperature", "top-k", "top-p", "all"],
)
def test_sampled_frequencies_follow_transformers(logits, sampling, warpers):
    scores = torch.tensor(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    frequency = drawn(logits, sampling)
    assert set(np.flatnonzero(frequency)) <= set(np.flatnonzero(expected))
    # Four standard deviations of a frequency over 4,000 draws.
    assert np.abs(frequency - expected).max() < 4 * 0.5 / np.sqrt(4000)


def test_repetition_penalty_equals_transformers_when_greedy(logits):
    seen_ids = np.argsort(-logits)[[0, 2]]
    reference = RepetitionPenaltyLogitsProcessor(3.0)(
        torch.tensor(seen_ids)[None], torch.tensor(logits)[None]
    )
    seen = np.zeros(VOCAB, bool)
    seen[seen_ids] = True
    frequency = drawn(logits, Sampling(repetition_penalty=3.0), seen, draws=1)
    assert frequency.argmax() == int(reference.argmax())
    assert frequency.argmax() != logits.argmax()


def test_greedy_takes_the_largest(logits):
    assert drawn(logits, Sampling(), draws=1).argmax() == logits.argmax()


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("repetition_penalty", 0)],
)
def test_meaningless_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})
