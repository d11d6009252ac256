"""Low-rank adapters beside the decoder's kernels (LoRA, Hu et al. 2021).

A kernel that is adapted has three parameters at its side, named after it: `kernel_lora_a`
[..., *in, rank], `kernel_lora_b` [..., rank, *out] and `kernel_lora_scale` [...], alpha / rank. The
layer computes x W + scale (x A) B and never builds W + scale A B. As in Hugging Face's `peft`,
which knows matrices only, A reads all inputs and B writes all outputs, heads and their dimensions
together. Leading axes are those of stacks, layers and experts.
"""

import re

import flax.linen as nn
import jax

from vllama2_jax.models.quantized import STORED_AS

LORA_A, LORA_B, LORA_SCALE = "_lora_a", "_lora_b", "_lora_scale"

_SUFFIXES = (
    LORA_A,
    LORA_B,
    LORA_SCALE,
    *(f"_{part}" for kind in STORED_AS.values() for part in kind),
)
_SUFFIX = re.compile(f"({'|'.join(_SUFFIXES)})$")
_LAYER = r"decoder/(layers|layer_\d+)"
_KERNEL = re.compile(rf"{_LAYER}/((attention|mlp)/\w+|moe/router)/kernel|decoder/lm_head/kernel")
_EXPERTS = re.compile(rf"{_LAYER}/moe/(gate|up|down)")


def kernel_path(path: str) -> str:
    """The path of the kernel that a parameter adapts or is part of; of any other, its own."""
    return _SUFFIX.sub("", path)


def kernel_axes(path: str) -> tuple[int, int] | None:
    """How many leading axes and how many input axes the kernel at a path has.

    Args:
      path: of a parameter of `VLlama2`, for example "decoder/layers/attention/out/kernel", which is
        [layers, heads, head_dim, width]: (1, 2).

    Returns:
      None for what is no kernel of the decoder, or has no adapters (`split_experts`).
    """
    stacked = int("/layers/" in path)
    if _EXPERTS.fullmatch(path):
        return stacked + 1, 1
    if _KERNEL.fullmatch(path):
        return stacked, 2 if "/attention/out/" in path else 1
    return None


def adapter_names(names: tuple, leading: int, inputs: int) -> tuple[tuple, tuple]:
    """Logical names of the axes of A and B, from those of the kernel.

    Args:
      names: of the kernel's axes.
      leading: axes of stacks, as `kernel_axes` counts them.
      inputs: input axes, likewise.
    """
    split = leading + inputs
    return (*names[:split], "lora_rank"), (*names[:leading], "lora_rank", *names[split:])


def low_rank(module: nn.Module, name: str, dtype) -> tuple[jax.Array, jax.Array] | None:
    """(A, scale * B) in `dtype` for the parameter `name` of a bound module; None if not adapted."""
    if not module.has_variable("params", name + LORA_A):
        return None
    a, b, scale = (
        module.get_variable("params", name + suffix) for suffix in (LORA_A, LORA_B, LORA_SCALE)
    )
    scale = scale.reshape(*scale.shape, *[1] * (b.ndim - scale.ndim))
    return a.astype(dtype), (scale * b).astype(dtype)
