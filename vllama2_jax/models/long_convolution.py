"""Grouped convolutions with wide windows: on CPU through Fourier transforms of pieces.

Pass `convolve_long` to `flax.linen.Conv(conv_general_dilated=convolve_long)`: same parameters, same
numbers to rounding. Measured in docs/decisions/hearing.md.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vllama2_jax.models.axes import layout_in_force

# A transform of so many places per window: a piece then gives three windows' worth of outputs, and
# the transforms of the kernel, which has a row per pair of channels, stay short.
_PLACES_PER_WINDOW = 4


def convolve_long(
    inputs: jax.Array,
    kernel: jax.Array,
    strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` over one axis with stride 1, overlap-saved on CPU.

    The platform is the one the program is lowered for, not the default backend.

    Args:
      inputs: [N, L, I].
      kernel: [window, I / groups, O].
      strides: (1,).
      padding: ((low, high),) zeros.
      lhs_dilation: none.
      rhs_dilation: none.
      dimension_numbers: channels last, as `flax.linen.Conv` gives them.
      feature_group_count: groups of channels.
      precision: of the products.

    Returns:
      [N, L', O].
    """

    def xla(inputs, kernel):
        return lax.conv_general_dilated(
            inputs,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )

    def by_pieces(inputs, kernel):
        (pads,) = padding
        inputs = jnp.pad(inputs, ((0, 0), pads, (0, 0)))
        return overlap_save(inputs, kernel, feature_group_count, precision)

    if layout_in_force():  # XLA splits no Fourier transform over devices
        return xla(inputs, kernel)
    return lax.platform_dependent(inputs, kernel, cpu=by_pieces, default=xla)


def overlap_save(inputs: jax.Array, kernel: jax.Array, groups: int, precision=None) -> jax.Array:
    """The places of a correlation where the window lies inside the inputs.

    Args:
      inputs: [N, L, I].
      kernel: [window, I / groups, O].
      groups: of channels.
      precision: of the products.

    Returns:
      [N, L - window + 1, O] in the dtype of the inputs; transforms are in float32.
    """
    batch, length, _ = inputs.shape
    window, fan_in, features = kernel.shape
    places = _PLACES_PER_WINDOW * window
    fresh = places - window + 1  # outputs of a piece that wrap around nothing
    wanted = length - window + 1
    pieces = -(-wanted // fresh)
    needed = (pieces - 1) * fresh + places
    x = jnp.pad(inputs.astype(jnp.float32), ((0, 0), (0, max(0, needed - length)), (0, 0)))
    x = jnp.stack([x[:, i * fresh : i * fresh + places] for i in range(pieces)], axis=1)
    # Transforms run along the last axis; a correlation multiplies by the conjugate.
    x = jnp.fft.rfft(jnp.moveaxis(x, 2, -1))  # [N, pieces, I, frequencies]
    w = jnp.fft.rfft(jnp.moveaxis(kernel.astype(jnp.float32), 0, -1), places).conj()
    x = x.reshape(batch * pieces, groups, fan_in, -1)
    w = w.reshape(fan_in, groups, features // groups, -1)
    out = jnp.einsum("pgif,igof->pgof", x, w, precision=precision)
    out = jnp.fft.irfft(out, places)[..., :fresh].reshape(batch, pieces, features, fresh)
    out = out.transpose(0, 1, 3, 2).reshape(batch, pieces * fresh, features)
    return out[:, :wanted].astype(inputs.dtype)
