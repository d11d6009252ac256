"""The rewritten convolutions against XLA's own, forward and backward."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.models.convolution import convolve

# name -> (input, features, window, strides, padding, groups)
CASES = {
    "depthwise 3x3": ((2, 6, 7, 40), 40, (3, 3), (1, 1), 1, 40),
    "depthwise 3x3 valid": ((2, 6, 7, 8), 8, (3, 3), (1, 1), "VALID", 8),
    "depthwise 1d": ((2, 9, 8), 8, (4,), (1,), "SAME", 8),
    "conv3d padded": ((2, 8, 6, 7, 5), 9, (2, 2, 2), (2, 2, 2), 1, 1),
    "conv3d with remainder": ((1, 9, 7, 7, 5), 9, (2, 2, 2), (2, 2, 2), 0, 1),
    "conv3d over space only": ((1, 4, 6, 6, 5), 9, (1, 2, 2), (1, 2, 2), (1, 1, 1), 1),
    "patches": ((2, 28, 28, 3), 16, (7, 7), (7, 7), "VALID", 1),
    "patches with remainder": ((2, 31, 31, 3), 16, (7, 7), (7, 7), "VALID", 1),
    "overlapping windows": ((2, 9, 9, 4), 6, (3, 3), (2, 2), 1, 1),
    "grouped": ((2, 9, 9, 8), 8, (3, 3), (1, 1), 1, 4),
}


def layer(case, **options):
    shape, features, window, strides, padding, groups = CASES[case]
    module = nn.Conv(
        features,
        window,
        strides,
        padding,
        feature_group_count=groups,
        precision="highest",
        **options,
    )
    return module, jax.random.normal(jax.random.key(1), shape)


def relative(ours, reference):
    return np.abs(np.asarray(ours) - np.asarray(reference)).max() / np.abs(reference).max()


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_xla(case):
    plain, inputs = layer(case)
    ours, _ = layer(case, conv_general_dilated=convolve)
    params = jax.jit(plain.init)(jax.random.key(0), inputs)

    def value_and_gradients(module):
        def loss(params, inputs):
            outputs = module.apply(params, inputs)
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, inputs)

    (grads, outputs), (expected_grads, expected) = (
        value_and_gradients(ours),
        value_and_gradients(plain),
    )
    assert relative(outputs, expected) <= 1e-6
    assert len(jax.tree.leaves(grads)) == 3
    for leaf, expected_leaf in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert relative(leaf, expected_leaf) <= 1e-5


@pytest.mark.parametrize(
    ("case", "rewritten"),
    [("depthwise 3x3", True), ("conv3d padded", True), ("patches", True), ("grouped", False)],
)
def test_only_cpu_avoids_xla_convolution(case, rewritten):
    module, inputs = layer(case, conv_general_dilated=convolve)
    params = module.init(jax.random.key(0), inputs)

    def text(platform):
        lowered = jax.jit(module.apply).trace(params, inputs).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    assert ("stablehlo.convolution" not in text("cpu")) == rewritten
    assert "stablehlo.convolution" in text("tpu")


def test_bfloat16_depthwise_accumulates_in_float32():
    module, inputs = layer("depthwise 3x3", conv_general_dilated=convolve, dtype=jnp.bfloat16)
    exact, _ = layer("depthwise 3x3")
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), exact.init(jax.random.key(0), inputs)
    )
    inputs = inputs.astype(jnp.bfloat16)
    ours = module.apply(params, inputs)
    assert ours.dtype == jnp.bfloat16
    expected = exact.apply(params, inputs.astype(jnp.float32)) + 0.0
    assert relative(ours.astype(jnp.float32), expected) <= 2**-8
