"""Rotary position embedding, in the "rotate half" form of Llama, Mistral and Qwen2."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles, computed once per forward pass.

    Args:
      positions: int32 [B, L].
      head_dim: even width of one head.
      theta: base of the geometric series of wavelengths.

    Returns:
      Two float32 arrays [B, L, 1, head_dim / 2].
    """
    # Rounded to float32 twice, as the PyTorch models do: at position 1,000 an inverse frequency
    # that is one ulp off already moves the angle by 1e-4.
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inverse = np.float32(1.0) / (theta**exponents).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `x` [B, L, heads, head_dim]: channel k pairs with channel k + head_dim / 2.

    The rotation is computed in float32; the result has the dtype of `x`.
    """
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
