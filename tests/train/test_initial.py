"""How `tiny` begins: small enough for the package, wide enough to learn in minutes."""

import jax
import numpy as np
import pytest

from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train.initial import initial_params


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
