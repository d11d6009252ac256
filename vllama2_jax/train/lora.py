"""LoRA and QLoRA: put adapters beside the kernels that rules name, and merge them again.

    params = adapt(params, rules, key)        # behind it, train as always
    assigned = assign_rules(rules, params)
    ...
    params = merge(combine(state.trainable, frozen), jnp.bfloat16)

The method and what it leaves out: docs/decisions/lora.md.
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp

from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.models.lora import LORA_A, LORA_B, LORA_SCALE, kernel_axes, kernel_path
from vllama2_jax.models.quantized import STORED_AS, dequantize, quantize
from vllama2_jax.train.trainable import assign_rules


def adapt(params: dict, rules, key: jax.Array) -> dict:
    """Add adapters to the kernels of lora rules, and quantise these kernels if the rules say so.

    A begins uniform within 1 / sqrt(inputs) and B at zero, as in `peft`: new adapters change no
    number. What an adapter begins with depends on the key and its path alone. Without lora rules
    nothing changes. Give the parameters the dtype that they shall have first; adapters are float32.

    Args:
      params: nested dict of arrays, the decoder's layers stacked or not.
      rules: as `assign_rules` takes them.
      key: of the random numbers.

    Returns:
      A new tree, which shares the arrays that did not change.

    Raises:
      ValueError: as `assign_rules` does, for adapters that are there already, or for kernels whose
        shapes cannot be quantised.
    """
    assigned, adapted = assign_rules(rules, params), {}
    for path, leaf in flatten(params).items():
        rule = assigned[path]
        if path != kernel_path(path):
            raise ValueError(f"{path}: the parameters have adapters already; merge them first")
        if rule.action != "lora":
            adapted[path] = leaf
            continue
        leading, inputs = kernel_axes(path)
        stack, into = leaf.shape[:leading], leaf.shape[leading : leading + inputs]
        out = leaf.shape[leading + inputs :]
        if rule.quantize:
            matrices = (*stack, math.prod(into), math.prod(out))
            for part, array in _quantized(leaf, matrices, rule.quantize).items():
                adapted[f"{path}_{part}"] = array
        else:
            adapted[path] = leaf
        bound = 1 / math.sqrt(math.prod(into))
        adapted[path + LORA_A] = jax.random.uniform(
            jax.random.fold_in(key, zlib.crc32(path.encode())),
            (*stack, *into, rule.rank),
            minval=-bound,
            maxval=bound,
        )
        adapted[path + LORA_B] = jnp.zeros((*stack, rule.rank, *out))
        adapted[path + LORA_SCALE] = jnp.full(stack, rule.alpha / rule.rank)
    return unflatten(adapted)


def merge(params: dict, dtype=None) -> dict:
    """Fold adapters into their kernels, W + scale A B, so that nothing of `adapt` is left.

    A quantised kernel W is what its parts stand for, since that is what the adapters were trained
    beside. Sums are float32.

    Args:
      params: nested dict of arrays, for example of `combine`.
      dtype: of the merged kernels; None keeps theirs, and is float32 for quantised ones.
        All other arrays stay as they are.
    """
    flat, merged = flatten(params), {}
    for path, leaf in flat.items():
        kernel = kernel_path(path)
        if kernel + LORA_A not in flat:
            merged[path] = leaf
        elif kernel not in merged:
            adapter = tuple(flat[kernel + suffix] for suffix in (LORA_A, LORA_B, LORA_SCALE))
            merged[kernel] = _merged(_base(flat, kernel), adapter, dtype)
    return unflatten(merged)


def _base(flat, kernel):
    """A kernel, or the parts that stand for it."""
    if kernel in flat:
        return flat[kernel]
    return next(
        {part: flat[f"{kernel}_{part}"] for part in parts}
        for kind, parts in STORED_AS.items()
        if f"{kernel}_{kind}" in flat
    )


# Both go through a stack matrix by matrix: its float32 copy would be twice the weights themselves.


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(kernel, matrices: tuple[int, ...], kind: str) -> dict[str, jax.Array]:
    """Parts of a kernel whose shape as matrices is [..., in, out]."""
    *stack, inputs, outputs = matrices
    parts = jax.lax.map(functools.partial(quantize, kind=kind), kernel.reshape(-1, inputs, outputs))
    return {part: array.reshape(*stack, *array.shape[1:]) for part, array in parts.items()}


@functools.partial(jax.jit, static_argnums=2)
def _merged(base, adapter, dtype) -> jax.Array:
    """W + scale A B; `base` is W or its parts, `adapter` is A, B and the scale."""
    a, b, scale = adapter
    shape = (*a.shape[scale.ndim : -1], *b.shape[scale.ndim + 1 :])

    def add(leaves):
        base, (a, b, scale) = leaves
        rank = len(b)
        change = jnp.matmul(a.reshape(-1, rank), b.reshape(rank, -1), precision="highest")
        if isinstance(base, dict):
            base = dequantize(base, jnp.float32)
        kernel = base.astype(jnp.float32).reshape(shape) + scale * change.reshape(shape)
        return kernel.astype(dtype or base.dtype)

    one_by_one = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[scale.ndim :]), (base, (a, b, scale))
    )
    return jax.lax.map(add, one_by_one).reshape(*scale.shape, *shape)
