"""Activation functions, each as its network was trained with it."""

import math

import jax


def gelu(x: jax.Array) -> jax.Array:
    """GELU, exact; through erf, which is cheaper than the erfc of `jax.nn.gelu`."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """SigLIP's approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)
