"""Frozen kernels in 8 or 4 bits, made numbers again where a layer multiplies by them.

int8: w = q * scale, with one scale for each output, the largest |w| of its inputs over 127.

nf4: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, section 3). Runs of 64
inputs of an output, a block, share their largest |w|; a code is the nearest of 16 values of w over
it. These constants, less their mean, are int8 in turn, 256 to a float32 scale: 4.127 bits a weight.
Blocks are those of bitsandbytes, which cuts PyTorch's [out, in] row by row. It keeps the constants
as 8-bit floats and their mean, too; here they are evenly spaced.
"""

import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# What replaces `kernel`: the parameters `kernel_nf4`, `kernel_nf4_absmax` and so on.
STORED_AS = {"int8": ("int8", "int8_scale"), "nf4": ("nf4", "nf4_absmax", "nf4_scale", "nf4_mean")}

# QLoRA, appendix E: quantiles of the normal distribution over the largest of them, 0 among them.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BLOCK, _CONSTANTS = 64, 256


def quantize(matrix: jax.Array, kind: str) -> dict[str, jax.Array]:
    """A matrix as the parts that stand for it.

    Args:
      matrix: float [..., in, out].
      kind: "int8" or "nf4".

    Returns:
      int8: `int8` int8 [..., in, out] and `int8_scale` float32 [..., out].
      nf4: `nf4` uint8 [..., blocks, block / 2, out], two codes a byte: the low four bits are of the
      block's first half; `nf4_absmax` int8 [..., blocks, out]; `nf4_scale` float32 [..., groups];
      `nf4_mean` float32 [...]. A block has 64 inputs, or fewer where 64 does not divide them.

    Raises:
      ValueError: for an unknown kind, or an odd number of inputs.
    """
    if kind not in STORED_AS:
        raise ValueError(f"unknown quantisation {kind!r}; known: {', '.join(STORED_AS)}")
    matrix = matrix.astype(jnp.float32)
    return _to_int8(matrix) if kind == "int8" else _to_nf4(matrix)


def dequantize(parts: dict[str, jax.Array], dtype) -> jax.Array:
    """The matrix [..., in, out] in `dtype` that `quantize` took apart; computed in float32."""
    if "int8" in parts:
        return (parts["int8"] * parts["int8_scale"][..., None, :]).astype(dtype)
    packed = parts["nf4"]
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2)
    matrix = jnp.asarray(NF4_VALUES, jnp.float32)[codes] * _absmax(parts)[..., None, :]
    return matrix.reshape(*packed.shape[:-3], -1, packed.shape[-1]).astype(dtype)


def quantized_parts(module: nn.Module, name: str) -> dict[str, jax.Array] | None:
    """What stands for the parameter `name` of a bound module; None if that is not quantised."""
    for kind, parts in STORED_AS.items():
        if module.has_variable("params", f"{name}_{kind}"):
            return {part: module.get_variable("params", f"{name}_{part}") for part in parts}
    return None


def quantized_names(names: tuple, leading: int, inputs: int) -> dict[str, tuple]:
    """Logical names of the axes of every part that can stand for a kernel, from the kernel's.

    A quantised kernel is a matrix: several input or output axes are one, split as the first was.

    Args:
      names: of the kernel's axes.
      leading: axes of stacks, see `lora.kernel_axes`.
      inputs: input axes, likewise.
    """
    stack, into, out = names[:leading], names[leading], names[leading + inputs]
    return {
        "int8": (*stack, into, out),
        "int8_scale": (*stack, out),
        "nf4": (*stack, into, None, out),
        "nf4_absmax": (*stack, into, out),
        "nf4_scale": (*stack, None),
        "nf4_mean": stack,
    }


def with_own_constants(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parts of which every piece can be dequantised by itself, whatever axes they are cut along.

    Those of nf4 share a scale between 256 neighbours; here `nf4_absmax` is float32 and needs none.
    """
    if "nf4" not in parts:
        return parts
    return {"nf4": parts["nf4"], "nf4_absmax": _absmax(parts)}


def multiply_quantized(
    product: Callable, x: jax.Array, parts: dict, shape: tuple[int, ...] | None, dtype
) -> jax.Array:
    """`product(x, kernel)` with the kernel that `parts` stand for, as an array of `shape`.

    Without one it stays the matrix [..., in, out] that was quantised. The backward pass dequantises
    again. Otherwise every kernel would wait for it at full size.
    """

    def run(x, parts):
        kernel = dequantize(parts, dtype)
        return product(x, kernel if shape is None else kernel.reshape(shape))

    return jax.checkpoint(run)(x, parts)


def block_size(inputs: int) -> int:
    """Inputs of a block: 64, or the largest even number below that divides them.

    Raises:
      ValueError: if there is none.
    """
    sizes = [size for size in range(2, _BLOCK + 1, 2) if inputs % size == 0]
    if not sizes:
        raise ValueError(f"{inputs} inputs do not fit nf4, which packs two a byte; use int8")
    return sizes[-1]


def _to_int8(matrix):
    scale = jnp.abs(matrix).max(-2) / 127
    codes = jnp.round(matrix / _nonzero(scale)[..., None, :])
    return {"int8": codes.astype(jnp.int8), "int8_scale": scale}


def _to_nf4(matrix):
    *leading, inputs, outputs = matrix.shape
    block = block_size(inputs)
    blocks = matrix.reshape(*leading, inputs // block, block, outputs)
    absmax = jnp.abs(blocks).max(-2)
    share = blocks / _nonzero(absmax)[..., None, :]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(NF4_VALUES)]
    low, high = jnp.split(sum((share > m).astype(jnp.uint8) for m in middles), 2, axis=-2)

    constants = absmax.reshape(*leading, -1)
    mean = constants.mean(-1)
    groups = _grouped(constants - mean[..., None])
    scale = jnp.abs(groups).max(-1) / 127
    codes = jnp.round(groups / _nonzero(scale)[..., None]).astype(jnp.int8)
    codes = codes.reshape(*leading, -1)[..., : constants.shape[-1]].reshape(absmax.shape)
    return {"nf4": low | (high << 4), "nf4_absmax": codes, "nf4_scale": scale, "nf4_mean": mean}


def _absmax(parts):
    """The constants [..., blocks, out] of nf4, float32."""
    codes = parts["nf4_absmax"]
    if "nf4_scale" not in parts:
        return codes
    flat = codes.reshape(*codes.shape[:-2], -1)
    scale = jnp.repeat(parts["nf4_scale"], _CONSTANTS, axis=-1)[..., : flat.shape[-1]]
    return (flat * scale + parts["nf4_mean"][..., None]).reshape(codes.shape)


def _grouped(constants):
    """[..., groups, 256] of [..., N], filled up with zeros."""
    missing = -constants.shape[-1] % _CONSTANTS
    padding = [(0, 0)] * (constants.ndim - 1) + [(0, missing)]
    return jnp.pad(constants, padding).reshape(*constants.shape[:-1], -1, _CONSTANTS)


def _nonzero(divisor):
    return jnp.where(divisor > 0, divisor, 1)
