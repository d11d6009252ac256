"""Rows sorted by group times each group's own matrix."""

import jax
import jax.numpy as jnp

BACKENDS = ("blocks", "ragged_dot")

# Rows per block: large enough for a full-speed matrix product, small enough that the last,
# partly filled block of each group wastes little.
_BLOCK = 128


def grouped_matmul(x: jax.Array, weights, group_sizes: jax.Array, backend: str) -> jax.Array:
    """`out[i] = x[i] @ weights[group of i]`, where rows are sorted by group.

    Args:
      x: [M, in].
      weights: [G, in, out], or a list of G arrays [in, out].
      group_sizes: int32 [G], summing to M.
      backend: "blocks" (dense products over blocks of rows, as many as each group needs; CPU), or
        "ragged_dot" (`jax.lax.ragged_dot`, which XLA on CPU and CUDA expands G-fold).

    Returns:
      [M, out] in the dtype of `x`.

    Raises:
      ValueError: for an unknown backend.
    """
    if backend == "ragged_dot":
        stacked = jnp.stack(weights) if isinstance(weights, list) else weights
        return jax.lax.ragged_dot(x, stacked, group_sizes.astype(jnp.int32))
    if backend == "blocks":
        return _blocks(x, tuple(weights[g] for g in range(len(weights))), group_sizes)
    raise ValueError(f"unknown grouped matmul backend {backend!r}; known: {', '.join(BACKENDS)}")


def _block_rows(x):
    return min(_BLOCK, x.shape[0])


def _starts(group_sizes):
    return jnp.concatenate([jnp.zeros(1, group_sizes.dtype), jnp.cumsum(group_sizes)])


def _over_blocks(rows, first, last, body, init):
    """Run body(start of block, carry) over blocks of `rows` rows from row first up to last."""
    count = (last - first + rows - 1) // rows
    return jax.lax.fori_loop(0, count, lambda i, carry: body(first + i * rows, carry), init)


def _multiply(x, weights, group_sizes):
    rows, starts = _block_rows(x), _starts(group_sizes)
    padded = jnp.pad(x, ((0, rows), (0, 0)))
    out = jnp.zeros((len(padded), weights[0].shape[1]), x.dtype)
    for g, weight in enumerate(weights):

        def body(start, out, weight=weight):
            # A group's last block runs into the next group, which then overwrites that part.
            block = jax.lax.dynamic_slice_in_dim(padded, start, rows) @ weight
            return jax.lax.dynamic_update_slice_in_dim(out, block, start, 0)

        out = _over_blocks(rows, starts[g], starts[g + 1], body, out)
    return out[: len(x)]


@jax.custom_vjp
def _blocks(x, weights, group_sizes):
    return _multiply(x, weights, group_sizes)


def _forward(x, weights, group_sizes):
    return _multiply(x, weights, group_sizes), (x, weights, group_sizes)


def _backward(residuals, grad):
    """Loops of dynamic length have no derivative of their own in reverse mode."""
    x, weights, group_sizes = residuals
    grad_x = _multiply(grad, tuple(w.T for w in weights), group_sizes)
    rows, starts = _block_rows(x), _starts(group_sizes)
    padded_x, padded_grad = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x, grad))
    grad_weights = []
    for g, weight in enumerate(weights):

        def body(start, total, end=starts[g + 1]):
            inside = (start + jnp.arange(rows) < end)[:, None]
            block = jax.lax.dynamic_slice_in_dim(padded_x, start, rows) * inside
            return total + jax.lax.dot(
                block.T,
                jax.lax.dynamic_slice_in_dim(padded_grad, start, rows),
                preferred_element_type=jnp.float32,
            )

        total = _over_blocks(
            rows, starts[g], starts[g + 1], body, jnp.zeros(weight.shape, jnp.float32)
        )
        grad_weights.append(total.astype(weight.dtype))
    return grad_x, tuple(grad_weights), None


_blocks.defvjp(_forward, _backward)
