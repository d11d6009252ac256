"""Kernels in 8 and 4 bits against the definitions of their formats, in NumPy."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.models.grouped_matmul import grouped_matmul
from vllama2_jax.models.quantized import (
    NF4_VALUES,
    block_size,
    dequantize,
    multiply_quantized,
    quantize,
)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.02)


def int8_by_definition(matrix):
    """One step per output, 127 of them up to the largest |w|."""
    step = np.abs(matrix).max(0) / np.float32(127)
    return np.rint(matrix / step) * step


def nf4_by_definition(matrix, block):
    """QLoRA, section 3: the nearest value in every block of an output's inputs, one by one."""
    values = np.array(NF4_VALUES, np.float32)
    out = np.empty_like(matrix)
    tops = np.stack([np.abs(rows).max(0) for rows in np.split(matrix, len(matrix) // block)])
    mean = tops.mean(dtype=np.float64)
    flat = tops.ravel() - mean
    for start in range(0, len(flat), 256):
        group = flat[start : start + 256]
        step = np.abs(group).max() / 127
        flat[start : start + 256] = np.rint(group / step) * step
    stored = (flat + mean).reshape(tops.shape)
    for row, column in np.ndindex(matrix.shape):
        share = matrix[row, column] / tops[row // block, column]
        nearest = values[np.abs(values - share).argmin()]
        out[row, column] = nearest * stored[row // block, column]
    return out


def error(found, matrix):
    """Root of the mean squared error, over the weights' own."""
    return float(np.sqrt(((np.asarray(found, np.float64) - matrix) ** 2).mean()) / matrix.std())


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # Equation 4 with the offset of the released code: the mean of 1 - 1/32 and 1 - 1/30.
    quantile, offset = statistics.NormalDist().inv_cdf, (31 / 32 + 29 / 30) / 2
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*lower, 0.0, *upper])) / max(upper)
    np.testing.assert_allclose(NF4_VALUES, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("shape", [(192, 100), (128, 3), (40, 7)])
def test_numbers_are_those_of_the_definition(kind, shape):
    matrix = gaussian(*shape)
    if kind == "int8":
        expected = int8_by_definition(matrix)
    else:
        expected = nf4_by_definition(matrix, 40 if shape[0] == 40 else 64)
    found = dequantize(quantize(jnp.array(matrix), kind), jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(matrix).max())


@pytest.mark.parametrize("kind, most", [("int8", 0.01), ("nf4", 0.1)])
def test_error_on_normal_weights_is_small(kind, most):
    matrix = gaussian(1024, 256)
    assert most / 2 < error(dequantize(quantize(matrix, kind), jnp.float32), matrix) < most


def test_double_quantisation_hardly_adds_to_the_error():
    matrix = gaussian(1024, 256)
    values, blocks = np.array(NF4_VALUES, np.float32), matrix.reshape(16, 64, 256)
    top = np.abs(blocks).max(1, keepdims=True)
    nearest = values[np.abs(values - (blocks / top)[..., None]).argmin(-1)]
    once = error((nearest * top).reshape(matrix.shape), matrix)
    assert error(dequantize(quantize(matrix, "nf4"), jnp.float32), matrix) < 1.01 * once


@pytest.mark.parametrize("kind, bits", [("int8", 8.01), ("nf4", 4.13)])
def test_bits_of_a_weight(kind, bits):
    """QLoRA, section 3: double quantisation takes the constants from 0.5 bits to 0.127."""
    parts = jax.eval_shape(
        lambda w: quantize(w, kind), jax.ShapeDtypeStruct((4096,) * 2, "float32")
    )
    size = sum(part.size * part.dtype.itemsize for part in parts.values())
    assert 8 * size / 4096**2 == pytest.approx(bits, abs=0.005)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_stacks_are_quantised_matrix_by_matrix(kind):
    stack = gaussian(2, 3, 64, 10) * np.float32([[[[1]]], [[[5]]]])
    together = quantize(jnp.array(stack), kind)
    for place in np.ndindex(2, 3):
        alone = quantize(jnp.array(stack[place]), kind)
        for part, array in alone.items():
            np.testing.assert_allclose(together[part][place], array, rtol=1e-6)
    whole = dequantize(together, jnp.bfloat16)
    assert whole.shape == stack.shape and whole.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zeros(kind):
    matrix = gaussian(128, 5)
    matrix[:, 2] = 0
    matrix[64:, 3] = 0
    found = np.asarray(dequantize(quantize(jnp.array(matrix), kind), jnp.float32))
    assert not found[:, 2].any() and not found[64:, 3].any() and np.isfinite(found).all()
    assert not np.asarray(dequantize(quantize(jnp.zeros((64, 4)), kind), jnp.float32)).any()


@pytest.mark.parametrize(
    "inputs, size", [(4096, 64), (18944, 64), (29568, 64), (160, 40), (16, 16), (74, 2)]
)
def test_blocks_have_64_inputs_or_fewer(inputs, size):
    assert block_size(inputs) == size


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
def test_experts_multiply_by_quantised_kernels_and_pass_gradients_on(backend):
    shape, sizes = (3, 64, 10), jnp.array([5, 0, 9])
    x, parts = jnp.array(gaussian(14, 64)), quantize(jnp.array(gaussian(*shape)), "nf4")

    def product(x, kernel):
        return grouped_matmul(x, kernel, sizes, backend)

    @jax.jit
    def run(x):
        return multiply_quantized(product, x, parts, shape, jnp.float32)

    found, backward = jax.vjp(run, x)
    kernels = np.asarray(dequantize(parts, jnp.float32))[np.repeat(np.arange(3), sizes)]
    np.testing.assert_allclose(found, np.einsum("mi,mio->mo", x, kernels), atol=1e-6)
    cotangent = gaussian(14, 10, seed=1)
    (gradient,) = backward(cotangent)
    np.testing.assert_allclose(gradient, np.einsum("mo,mio->mi", cotangent, kernels), atol=1e-6)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="33 inputs do not fit nf4"):
        quantize(jnp.ones((33, 4)), "nf4")
    with pytest.raises(ValueError, match="unknown quantisation 'fp4'; known: int8, nf4"):
        quantize(jnp.ones((64, 4)), "fp4")
