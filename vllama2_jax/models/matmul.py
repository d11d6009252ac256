"""The product of dense layers: equal to XLA's own, and on CPU in the shape that XLA runs fast.

Pass `dense_dot` to `flax.linen.Dense(dot_general=dense_dot)`: same parameters, same numbers. XLA's
CPU backend hands products of two matrices to its fast kernels; the backward pass of a product with
a three-dimensional operand contracts two axes at once and takes a slow path. Rows are therefore
flattened there first. On other platforms the product stays as it is, since flattening would merge
axes that are sharded apart. Measured in docs/decisions/convolutions.md.
"""

import functools
import math

import jax
from jax import lax


def dense_dot(lhs: jax.Array, rhs: jax.Array, dimension_numbers, precision=None, **options):
    """`jax.lax.dot_general` without batch axes, for a dense layer's activations and kernel.

    The platform is the one the program is lowered for.

    Args:
      lhs: [..., *contracted]; the contracted axes come last.
      rhs: [*contracted, ...]; they come first.
      dimension_numbers: as `flax.linen.Dense` and `DenseGeneral` give them.
      precision: of the product.
      **options: of `dot_general`.

    Returns:
      [..., ...] of both sides' other axes.
    """
    (left, right), _ = dimension_numbers
    count = len(left)
    ordered = tuple(left) == tuple(range(lhs.ndim - count, lhs.ndim))
    if lhs.ndim - count < 2 or not ordered or tuple(right) != tuple(range(count)):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)
    rows, columns = lhs.shape[:-count], rhs.shape[count:]
    width = math.prod(lhs.shape[-count:])

    def as_given(lhs, rhs):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)

    def flattened(lhs, rhs):
        product = lax.dot_general(
            lhs.reshape(-1, width),
            rhs.reshape(width, -1),
            (((1,), (0,)), ((), ())),
            precision,
            **options,
        )
        return product.reshape(*rows, *columns)

    # The backward pass shall get the operands as they came. Otherwise they come out of the choice
    # of a platform, as new arrays, and a scan over layers stacks every kernel a second time.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chosen(lhs, rhs):
        return lax.platform_dependent(lhs, rhs, cpu=flattened, default=as_given)

    return chosen(lhs, rhs)
