"""The whole model against an independent PyTorch one, through files in the released layout."""

import jax
import numpy as np
import pytest

import vllama2_jax as vl

torch = pytest.importorskip("torch")
from oracle import write_miniature  # noqa: E402

MESSAGES = [
    {"role": "user", "content": "What is shown in the video?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And then?"},
]
PAIRS = [
    ("mistral", "clip", "stc_connector"),
    ("mixtral", "clip", "stc_connector"),
    ("qwen2", "siglip", "stc_connector_v35"),
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "+".join(pair))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    oracle = write_miniature(folder, *request.param)
    with jax.default_matmul_precision("highest"):
        yield oracle, vl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4, 45, 60, 3), np.uint8)


def relative_error(ours, reference):
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def test_media_tokens_equal_the_reference(pair, frames):
    oracle, model = pair
    assert relative_error(model.encode(frames), oracle.encode(frames).numpy()) <= 2e-5


def test_logits_of_the_whole_prompt_equal_the_reference(pair, frames):
    oracle, model = pair
    ours = model.logits(frames, MESSAGES)
    assert ours.dtype == np.float32
    assert relative_error(ours, oracle.logits(frames, MESSAGES)) <= 1e-4


def test_text_alone_equals_the_reference(pair):
    oracle, model = pair
    assert relative_error(model.logits(None, MESSAGES), oracle.logits(None, MESSAGES)) <= 1e-4


def test_greedy_tokens_equal_the_reference(pair, frames):
    oracle, model = pair
    ours = model.generate(frames, MESSAGES, max_new_tokens=32, stop=False)
    assert ours == oracle.greedy(frames, MESSAGES, 32)
