"""How `tiny` begins: small enough for the package, wide enough to learn in minutes."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.models.vllama2 import abstract_params, init_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train.initial import initial_params, widen_beats


def test_tiny_fits_the_package():
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(ZOO["tiny"]))]
    assert 1.5e6 < sum(sizes) and 2 * sum(sizes) < 8e6


@pytest.fixture(scope="module")
def params():
    def make():
        params = initial_params(ZOO["tiny"], 0)
        decoder = params["decoder"]
        return {
            "position_embed": params["vision"]["position_embed"],
            "embedding": decoder["embed_tokens"]["embedding"],
            **{name: decoder["layers"]["mlp"][name]["kernel"][0] for name in ("gate", "up")},
        }

    return jax.jit(make)()  # so that nothing else is made


@pytest.mark.parametrize("name", ["gate", "up"])
def test_narrow_decoder_starts_with_matrices_that_keep_their_inputs_size(params, name):
    x = np.random.default_rng(0).normal(size=(512, 160)).astype(np.float32)
    assert float((x @ params[name]).std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", ["embedding", "position_embed"])
def test_embeddings_start_wide(params, name):
    assert float(params[name].std()) == pytest.approx(0.5, rel=1e-3)


def test_narrow_audio_tower_starts_with_matrices_that_keep_their_inputs_size():
    """But for its convolution and its gates, which begin as published ones do."""
    config = ZOO["tiny"]

    def make():
        before = nn.meta.unbox(init_params(config, jax.random.key(0)))["audio"]
        return before, widen_beats(before, config.audio)

    before, after = map(flatten, jax.jit(make)())
    widened = {path for path in after if not np.array_equal(after[path], before[path])}
    kernels = {path for path in after if path.endswith("/kernel")}
    assert widened == {path for path in kernels if "conv" not in path and "gate" not in path}
    for path in widened:
        kernel = after[path][0] if path.startswith("blocks/") else after[path]
        # What is summed over: heads as well behind them, and a patch's pixels.
        axes = {"out": 2, "patch_embed": 3}.get(path.split("/")[-2], 1)
        x = np.random.default_rng(0).normal(size=(512, *kernel.shape[:axes]))
        out = np.tensordot(x, kernel, axes=axes)
        assert float(out.std()) == pytest.approx(1.0, rel=0.1), path
