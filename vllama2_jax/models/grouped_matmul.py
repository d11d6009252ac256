"""Rows sorted by group times each group's own matrix: one function, several kernels.

Every backend is two products without derivatives (`Backend`), of which one rule makes the backward
pass: all treat rows behind the last group alike, and gradients of weights have the weights' dtype.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Backend(NamedTuple):
    """What multiplies.

    Attributes:
      product: (x [M, in], weights, group_sizes int32 [G], transposed) -> [M, out] in the dtype of
        x: each row times its group's matrix, or with `transposed` times its transpose.
      outer: (x [M, in], y [M, out], group_sizes, dtype) -> [G, in, out] in `dtype`: per group the
        sum over its rows of x^T y. Sums are float32.
    """

    product: Callable
    outer: Callable


def grouped_matmul(x: jax.Array, weights, group_sizes: jax.Array, backend: str) -> jax.Array:
    """`out[i] = x[i] @ weights[group of i]`, where rows are sorted by group.

    Args:
      x: [M, in].
      weights: [G, in, out], or a tuple or list of G arrays [in, out].
      group_sizes: int [G], summing to at most M.
      backend: "blocks" (dense products over blocks of rows, as many as each group needs; CPU),
        "megablox" (Pallas; TPU), "tokamax" (Triton; GPU) or "ragged_dot" (`jax.lax.ragged_dot`,
        which XLA on CPU and CUDA expands G-fold).

    Returns:
      [M, out] in the dtype of `x`. Rows behind the last group hold anything, even no numbers, and
      so do their gradients; neither enters what other rows or the weights get.

    Raises:
      ValueError: for an unknown backend.
      ImportError: for "tokamax" where that package is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown grouped matmul backend {backend!r}; known: {', '.join(BACKENDS)}"
        )
    weights = tuple(weights) if isinstance(weights, list) else weights
    return _grouped(x, weights, group_sizes.astype(jnp.int32), backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, weights, group_sizes, backend):
    return BACKENDS[backend].product(x, weights, group_sizes, False)


def _forward(x, weights, group_sizes, backend):
    return _grouped(x, weights, group_sizes, backend), (x, weights, group_sizes)


def _backward(backend, residuals, grad):
    x, weights, group_sizes = residuals
    product, outer = BACKENDS[backend]
    grad_weights = outer(x, grad, group_sizes, weights[0].dtype)
    if isinstance(weights, tuple):
        grad_weights = tuple(grad_weights)
    return product(grad, weights, group_sizes, True), grad_weights, None


_grouped.defvjp(_forward, _backward)


def _stacked(weights):
    return jnp.stack(weights) if isinstance(weights, tuple) else weights


# "ragged_dot"


def _ragged(contracting, grouped):
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if grouped else [],
    )


_TIMES, _TIMES_TRANSPOSED = (_ragged(((1,), (axis,)), True) for axis in (1, 2))
_OUTER = _ragged(((0,), (0,)), False)


def _ragged_product(x, weights, group_sizes, transposed):
    names = _TIMES_TRANSPOSED if transposed else _TIMES
    return jax.lax.ragged_dot_general(x, _stacked(weights), group_sizes, names)


def _ragged_outer(x, y, group_sizes, dtype):
    return jax.lax.ragged_dot_general(
        x, y, group_sizes, _OUTER, preferred_element_type=jnp.float32
    ).astype(dtype)


# "tokamax". It asks the default device whether it can run, also while it compiles for others: it is
# told not to, and which of its kernels to use.


def _triton(x, y, group_sizes, names, dtype):
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        raise ImportError(
            "the grouped matmul backend 'tokamax' needs that package: "
            "pip install 'vllama2_jax[tokamax]'"
        ) from error
    flags.FLAGS.mark_as_parsed()  # or tokamax would read this program's command line
    with tokamax.config.cross_compile(True):
        return tokamax.ragged_dot_general(
            x, y, group_sizes, names, preferred_element_type=dtype, implementation="triton"
        )


def _triton_product(x, weights, group_sizes, transposed):
    names = _TIMES_TRANSPOSED if transposed else _TIMES
    return _triton(x, _stacked(weights), group_sizes, names, x.dtype)


def _triton_outer(x, y, group_sizes, dtype):
    outer = _triton(x, y, group_sizes, _OUTER, dtype)
    # Its loop runs at least once, for an empty group over rows in front of it (tokamax 0.0.12).
    return jnp.where((group_sizes > 0)[:, None, None], outer, 0)


# "megablox"

# Rows, inputs and outputs of a tile. A tile that two groups share is computed twice, so few rows
# waste little: at most (G - 1) * 256 of M. Fewer than about 170 rows would read the weights more
# often than a v5p's memory keeps up with (459 TFLOP/s over 2.77 TB/s). The rest is what 16 MiB of
# its vector memory hold of bfloat16, with two buffers for each operand.
_PRODUCT_TILE, _OUTER_TILE = (256, 1024, 2048), (256, 1024, 1024)


def _tiles(largest, dtype, *sizes):
    """Tiles of about equal size, multiples of the hardware's 128 (of 16 rows), that cover sizes."""
    rows, *others = largest
    limits = (rows, *(2 * limit // jnp.dtype(dtype).itemsize for limit in others))
    tiles = []
    for size, limit, step in zip(sizes, limits, (16, 128, 128), strict=True):
        even = -(-size // -(-size // limit))  # of as many tiles as the limit needs
        tiles.append(-(-even // step) * step)
    return tuple(tiles)


def _fill_up(rows, tile, *arrays):
    """Zeros behind the last row, up to whole tiles."""
    return (jnp.pad(array, ((0, -rows % tile), (0, 0))) for array in arrays)


def _megablox_product(x, weights, group_sizes, transposed):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    weights = _stacked(weights)
    rows, outputs = len(x), weights.shape[1 if transposed else 2]
    tiles = _tiles(_PRODUCT_TILE, x.dtype, rows, x.shape[1], outputs)
    (x,) = _fill_up(rows, tiles[0], x)
    return gmm(x, weights, group_sizes, x.dtype, tiles, transpose_rhs=transposed)[:rows]


def _megablox_outer(x, y, group_sizes, dtype):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = _tiles(_OUTER_TILE, x.dtype, len(x), x.shape[1], y.shape[1])
    x, y = _fill_up(len(x), tiles[0], x, y)
    return tgmm(x.T, y, group_sizes, dtype, tiles)


# "blocks"

# Rows per block: large enough for a full-speed matrix product, small enough that the last,
# partly filled block of each group wastes little.
_BLOCK = 128


def _block_rows(x):
    return min(_BLOCK, x.shape[0])


def _starts(group_sizes):
    return jnp.concatenate([jnp.zeros(1, group_sizes.dtype), jnp.cumsum(group_sizes)])


def _over_blocks(rows, first, last, body, init):
    """Run body(start of block, carry) over blocks of `rows` rows from row first up to last."""
    count = (last - first + rows - 1) // rows
    return jax.lax.fori_loop(0, count, lambda i, carry: body(first + i * rows, carry), init)


def _blocks_product(x, weights, group_sizes, transposed):
    weights = [weights[g].T if transposed else weights[g] for g in range(len(weights))]
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


def _blocks_outer(x, y, group_sizes, dtype):
    rows, starts = _block_rows(x), _starts(group_sizes)
    padded_x, padded_y = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x, y))
    outer = []
    for g in range(len(group_sizes)):

        def body(start, total, end=starts[g + 1]):
            inside = (start + jnp.arange(rows) < end)[:, None]
            left, right = (
                jnp.where(inside, jax.lax.dynamic_slice_in_dim(a, start, rows), 0)
                for a in (padded_x, padded_y)
            )
            return total + jax.lax.dot(left.T, right, preferred_element_type=jnp.float32)

        total = jnp.zeros((x.shape[1], y.shape[1]), jnp.float32)
        outer.append(_over_blocks(rows, starts[g], starts[g + 1], body, total).astype(dtype))
    return jnp.stack(outer)


BACKENDS = {
    "blocks": Backend(_blocks_product, _blocks_outer),
    "ragged_dot": Backend(_ragged_product, _ragged_outer),
    "megablox": Backend(_megablox_product, _megablox_outer),
    "tokamax": Backend(_triton_product, _triton_outer),
}
