"""Convolutions equal to XLA's own, without XLA's slow CPU paths.

Pass `convolve` to `flax.linen.Conv(conv_general_dilated=convolve)`: same parameters, same numbers.
On CPU, two shapes of convolution that XLA runs as slow generic loops are written as what they are:
a matmul (windows that do not overlap) and nine shifted multiplies (depthwise 3x3). Everywhere else
XLA's own convolution runs. Measured in docs/decisions/convolutions.md.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

# For one spatial rank: the dimension numbers that flax.linen.Conv asks for (channels last).
_CHANNELS_LAST = {
    rank: lax.ConvDimensionNumbers(
        (0, rank + 1, *range(1, rank + 1)),
        (rank + 1, rank, *range(rank)),
        (0, rank + 1, *range(1, rank + 1)),
    )
    for rank in (1, 2, 3)
}


def convolve(
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
    """`jax.lax.conv_general_dilated`, rewritten on CPU where a rewriting is equal and faster.

    The platform is the one the program is lowered for, not the default backend, so a program
    compiled on a CPU for a TPU keeps XLA's convolution.

    Args:
      inputs: [N, *spatial, I].
      kernel: [*window, I / groups, O].
      strides: one per spatial axis.
      padding: (low, high) zeros per spatial axis, or "SAME" or "VALID".
      lhs_dilation: as in `conv_general_dilated`.
      rhs_dilation: as in `conv_general_dilated`.
      dimension_numbers: as `flax.linen.Conv` gives them; channels last, else XLA's own runs.
      feature_group_count: groups of channels.
      precision: of the matmul.

    Returns:
      [N, *spatial', O], the same to rounding on every platform.
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

    window, (fan_in, features) = kernel.shape[:-2], kernel.shape[-2:]
    strides = tuple(strides)
    channels_last = dimension_numbers == _CHANNELS_LAST.get(len(window))
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if not channels_last or dilated or inputs.dtype != kernel.dtype:
        return xla(inputs, kernel)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:-1], window, strides, padding)
    depthwise = feature_group_count == features == inputs.shape[-1] and fan_in == 1
    overlap = all(max(pads) < size for pads, size in zip(padding, window, strict=True))
    if feature_group_count == 1 and window == strides:

        def rewritten(inputs, kernel):
            return patch_matmul(inputs, kernel, padding, precision)

    elif depthwise and overlap and set(strides) == {1}:

        def rewritten(inputs, kernel):
            return shifted_multiplies(inputs, kernel, padding)

    else:
        return xla(inputs, kernel)
    return lax.platform_dependent(inputs, kernel, cpu=rewritten, default=xla)


def patch_matmul(inputs: jax.Array, kernel: jax.Array, padding, precision=None) -> jax.Array:
    """A convolution whose stride is its window: cut into patches, then one matmul.

    Args:
      inputs: [N, *spatial, I].
      kernel: [*window, I, O].
      padding: (low, high) zeros per spatial axis; what does not fill a last window is left out.
      precision: of the matmul.

    Returns:
      [N, *spatial', O].
    """
    window, (channels, features) = kernel.shape[:-2], kernel.shape[-2:]
    patches = cut_windows(inputs, window, padding)
    rank = len(window)
    batch, counts = patches.shape[0], patches.shape[1 : 1 + rank]
    rows = patches.reshape(batch * math.prod(counts), math.prod(window) * channels)
    out = jnp.matmul(rows, kernel.reshape(-1, features), precision=precision)
    return out.reshape(batch, *counts, features)


def cut_windows(inputs: jax.Array, window, padding) -> jax.Array:
    """Windows that touch but do not overlap.

    Args:
      inputs: [N, *spatial, C].
      window: size per spatial axis.
      padding: (low, high) zeros per spatial axis.

    Returns:
      [N, *counts, *window, C]; a remainder at the far end of an axis is left out.
    """
    rank = len(window)
    if any(low or high for low, high in padding):
        inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    counts = [size // step for size, step in zip(inputs.shape[1:-1], window, strict=True)]
    whole = tuple(slice(count * step) for count, step in zip(counts, window, strict=True))
    inputs = inputs[(slice(None), *whole)]
    split = [part for pair in zip(counts, window, strict=True) for part in pair]
    inputs = inputs.reshape(inputs.shape[0], *split, inputs.shape[-1])
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return inputs.transpose(order)


def shifted_multiplies(inputs: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    """A depthwise convolution of stride 1: one multiply-add of the whole image per kernel tap.

    Reverse-mode differentiable; its derivative is written out, because that of the loop over images
    takes about twice as long.

    Args:
      inputs: [N, *spatial, C].
      kernel: [*window, 1, C].
      padding: (low, high) zeros per spatial axis.

    Returns:
      [N, *spatial', C], accumulated in float32.
    """
    return _depthwise(inputs, kernel, tuple((low, high) for low, high in padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(inputs, kernel, padding):
    def one_image(image):
        taps = _taps(jnp.pad(image, (*padding, (0, 0))), kernel.shape[:-2])
        weights = kernel.reshape(-1, kernel.shape[-1])
        total = sum(
            tap.astype(jnp.float32) * weight for tap, weight in zip(taps, weights, strict=True)
        )
        return total.astype(inputs.dtype)

    # A loop over images ends XLA's fusion here: fused into the LayerNorm that follows, the taps
    # would be computed once for its mean, once for its variance and once more for its output.
    return lax.map(one_image, inputs)


def _depthwise_forward(inputs, kernel, padding):
    return _depthwise(inputs, kernel, padding), (inputs, kernel)


def _depthwise_backward(padding, saved, grad):
    inputs, kernel = saved
    window, rank = kernel.shape[:-2], kernel.ndim - 2
    mirrored = tuple(
        (size - 1 - low, size - 1 - high) for size, (low, high) in zip(window, padding, strict=True)
    )
    inputs_grad = _depthwise(grad, jnp.flip(kernel, range(rank)), mirrored)
    padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    taps = jax.vmap(lambda image: _taps(image, window), out_axes=0)(padded)
    pixels = tuple(range(rank + 1))
    kernel_grad = jnp.stack([jnp.sum(tap.astype(jnp.float32) * grad, axis=pixels) for tap in taps])
    return inputs_grad, kernel_grad.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _taps(image, window):
    """Every tap's view of a padded image [*spatial, C], in the kernel's row-major order."""
    sizes = [size - step + 1 for size, step in zip(image.shape[:-1], window, strict=True)]
    return [
        image[tuple(slice(at, at + size) for at, size in zip(starts, sizes, strict=True))]
        for starts in itertools.product(*(range(step) for step in window))
    ]
