"""The audio tower against speechbrain's BEATs."""

import dataclasses
import functools

import audio_oracle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.convert.tables import audio_ignored, audio_rows
from vllama2_jax.models.beats import (
    Beats,
    attend_gated,
    by_distance,
    distance_buckets,
    normalise_bank,
)
from vllama2_jax.models.config import BeatsConfig

SMALL = BeatsConfig(
    patch_size=16,
    patch_width=24,
    width=32,
    mlp_dim=48,
    num_layers=3,
    num_heads=4,
    seconds=3.32,  # 330 frames: 20 patches and a rest; distances go beyond the exact buckets
    conv_window=16,
    conv_groups=4,
    num_buckets=32,
    max_distance=60,
)
CONFIGS = {
    "small": SMALL,
    "one width": dataclasses.replace(SMALL, patch_width=32, patch_bias=True),
    "without deep norm": dataclasses.replace(SMALL, deep_norm=False),
    "an odd window": dataclasses.replace(SMALL, conv_window=15),
    "published buckets": dataclasses.replace(
        SMALL, num_buckets=320, max_distance=800, seconds=20.0, conv_window=128
    ),
}


def abstract(config):
    bank = jnp.zeros((1, config.num_frames, config.num_bins))
    boxed = jax.eval_shape(Beats(config).init, jax.random.key(0), bank)
    return flatten(nn.meta.unbox(boxed)["params"])


def parameters(config, tensors):
    """Released tensors as parameters, by the import's own table."""
    shapes = {f"audio/{path}": leaf.shape for path, leaf in abstract(config).items()}
    rows = list(audio_rows(config, "", "audio"))
    ignored = audio_ignored(config, "")
    assert {row.source for row in rows} == {n for n in tensors if not n.startswith(ignored)}
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    assert {row.target for row in rows} == set(params)
    for row in rows:
        assert tensors[row.source].shape == row.shape
        part = params[row.target]
        part[row.index] = row.to_parameter(tensors[row.source], part[row.index].shape)
    return unflatten(params)["audio"]


@functools.cache
def both(name):
    config = CONFIGS[name]
    network = audio_oracle.speechbrain_beats(config)
    return config, network, parameters(config, audio_oracle.released_names(network))


def banks(config, count=2):
    shape = (count, config.num_frames, config.num_bins)
    return np.random.default_rng(1).normal(15, 6, shape).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_equal_speechbrains(name):
    config, network, params = both(name)
    bank = banks(config)
    with jax.default_matmul_precision("highest"):
        ours = Beats(config).apply({"params": params}, normalise_bank(bank, config))
    with torch.no_grad():
        reference = audio_oracle.run_beats(network, (bank - 15.41663) / (2 * 6.55582)).numpy()
    assert ours.shape == (2, config.num_tokens, config.width)
    assert np.abs(ours - reference).max() <= 2e-5


def test_gradients_equal_speechbrains():
    """With the decay that a gradient undergoes at each layer."""
    config, network, params = both("small")
    bank = (banks(config) - 15.41663) / np.float32(2 * 6.55582)
    weight = np.random.default_rng(2).normal(size=(2, config.num_tokens, config.width))
    weight = weight.astype(np.float32)
    network.zero_grad()
    (audio_oracle.run_beats(network, bank) * torch.from_numpy(weight)).sum().backward()
    gradients = dict.fromkeys(audio_oracle.released_names(network))
    learnt = dict(network.named_parameters())
    for released, name in zip(gradients, network.state_dict(), strict=True):
        if name in learnt and learnt[name].grad is not None:  # aliases have none
            gradients[released] = learnt[name].grad.numpy()
    used = [row.source for row in audio_rows(config, "", "audio")]
    expected = flatten(parameters(config, {name: gradients[name] for name in used}))

    def loss(params):
        return jnp.sum(Beats(config).apply({"params": params}, bank) * weight)

    with jax.default_matmul_precision("highest"):
        ours = flatten(jax.grad(loss)(params))
    for path, grad in ours.items():
        # A key's bias moves all logits of a query alike, so its gradient is rounding alone.
        scale = np.abs(expected[path]).max() + 0.01
        assert np.abs(grad - expected[path]).max() <= 1e-4 * scale, path


def test_dropped_layers_are_left_out():
    config, _, params = both("small")
    bank = normalise_bank(banks(config, 1), config)
    kept = dataclasses.replace(config, num_layers=2)
    fewer = {**params, "blocks": jax.tree.map(lambda x: x[[0, 2]], params["blocks"])}
    # The weight of what bypasses a layer follows the number of all layers.
    reference = _with_weight(kept, config.residual_weight)
    ours = Beats(config).apply({"params": params}, bank, jnp.asarray([[True, False, True]]))
    np.testing.assert_allclose(ours, Beats(reference).apply({"params": fewer}, bank), atol=1e-5)


def _with_weight(config, weight):
    class Weighted(type(config)):
        residual_weight = weight

    return Weighted(**dataclasses.asdict(config))


@pytest.mark.parametrize("name", ["small", "published buckets"])
def test_buckets_of_distances_equal_speechbrains(name):
    config, network, _ = both(name)
    attention = network.encoder.layers[0].self_attn
    length = 1496
    positions = torch.arange(length)
    reference = attention._relative_positions_bucket(
        positions[None] - positions[:, None], bidirectional=True
    )
    ours = by_distance(jnp.asarray(distance_buckets(length, config))[None], length)
    np.testing.assert_array_equal(ours[0], reference.numpy())


def test_buckets_of_the_published_tower_are_those_of_the_original():
    config = CONFIGS["published buckets"]
    buckets = distance_buckets(1496, config)
    found = {distance: int(buckets[distance]) for distance in (-1, 1, -80, -100, -160, -400, 0)}
    assert found == {-1: 1, 1: 161, -80: 80, -100: 87, -160: 104, -400: 135, 0: 0}
    assert (buckets[[800, 1400]] == 319).all() and (buckets[[-800, -1400]] == 159).all()


def test_cpu_attention_equals_the_one_of_other_platforms():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 11, 3, 8)).astype(np.float32) for _ in range(3))
    gate = rng.normal(size=(2, 11, 3)).astype(np.float32)
    bias = rng.normal(size=(3, 11, 11)).astype(np.float32)
    ours = attend_gated(*map(jnp.asarray, (q, k, v, gate, bias)))
    scaled = gate.transpose(0, 2, 1)[..., None] * bias
    reference = jax.nn.dot_product_attention(q, k, v, bias=scaled)
    np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_every_parameter_names_its_axes():
    bank = jnp.zeros((1, SMALL.num_frames, SMALL.num_bins))
    boxed = jax.eval_shape(Beats(SMALL).init, jax.random.key(0), bank)["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_published_tower_has_the_released_number_of_parameters():
    from vllama2_jax.models.zoo import BEATS_ITER3

    classifier = 527 * 768 + 527
    sizes = [leaf.size for leaf in abstract(BEATS_ITER3).values()]
    assert sum(sizes) + classifier == 90_717_055
    assert BEATS_ITER3.num_tokens == 1496
