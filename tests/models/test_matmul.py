"""The dense layers' product against `lax.dot_general`, and the shape it has on each platform."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vllama2_jax.models.matmul import dense_dot

# name -> (activations, kernel, how many axes are contracted)
CASES = {
    "dense": ((2, 5, 8), (8, 6), 1),
    "to heads": ((2, 5, 8), (8, 3, 4), 1),
    "from heads": ((2, 5, 3, 4), (3, 4, 8), 2),
    "matrix": ((5, 8), (8, 6), 1),
    "images": ((2, 3, 5, 8), (8, 6), 1),
}


def operands(case):
    left, right, count = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (left, right)]
    axes = (tuple(range(len(left) - count, len(left))), tuple(range(count)))
    return arrays, (axes, ((), ()))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_dot_general(case):
    arrays, numbers = operands(case)

    def run(dot):
        def loss(lhs, rhs):
            product = dot(lhs, rhs, numbers, precision="highest")
            return jnp.sum(jnp.sin(product)), product

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arrays)

    ours, expected = run(dense_dot), run(lax.dot_general)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
    for leaf, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-5)


def test_contracted_axes_in_another_order_are_left_to_dot_general():
    (lhs, rhs), _ = operands("dense")
    numbers = (((1,), (1,)), ((), ()))
    rhs = np.broadcast_to(rhs.T[:5], (5, 8)).T.copy()  # [8, 5], contracted over its last axis
    np.testing.assert_allclose(
        dense_dot(lhs, rhs, numbers, precision="highest"),
        np.einsum("blw,ol->bwo", lhs, rhs),
        rtol=1e-5,
        atol=1e-5,
    )


def test_output_dtype_is_passed_on():
    (lhs, rhs), numbers = operands("dense")
    low = (jnp.asarray(array, jnp.bfloat16) for array in (lhs, rhs))
    assert dense_dot(*low, numbers, preferred_element_type=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("platform", "ranks"), [("cpu", (2, 2)), ("tpu", (4, 3)), ("cuda", (4, 3))]
)
def test_only_cpu_multiplies_flattened_matrices(platform, ranks):
    arrays, numbers = operands("from heads")
    product = jax.jit(functools.partial(dense_dot, dimension_numbers=numbers))
    text = product.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    ((left, right),) = re.findall(r"dot_general.*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    assert (left.count("x"), right.count("x")) == ranks
