"""Splash attention, JAX's flash kernel for TPUs, dressed for `attention.attend`.

The kernel takes one row, heads first, unscaled, in whole blocks, and skips blocks that a mask known
at trace time leaves empty. What depends on data (segments, padding) it masks inside the blocks.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from vllama2_jax.models.row_slices import WHOLE, Slices

_LANES = 128  # blocks are multiples of it
_BLOCK = 512  # about so many queries and keys in a block


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    *,
    causal: bool,
    window: int | None,
    slices: Slices = WHOLE,
) -> jax.Array:
    """Attention of rows to themselves; segments attend to their own tokens, padding to padding.

    Args:
      q: [B, L, H, D]; where rows are split, those queries that `slices.slots` names.
      k: [B, S, KV, D], of whole rows: S = slices.count * L.
      v: [B, S, KV, D].
      q_segments: int32 [B, L].
      kv_segments: int32 [B, S].
      causal: hide later slots.
      window: a query sees only the last `window` slots, its own included; None: all.
      slices: how rows are split.

    Returns:
      [B, L, H, D] in the dtype of `v`; logits and softmax in float32.
    """
    length, num_slots = q.shape[1], k.shape[1]
    if not causal and (window is None or window >= num_slots):
        kernel = _kernel(WHOLE, length, num_slots, q.shape[2], False, None)
    else:
        kernel = _kernel(slices, length, num_slots, q.shape[2], causal, window)
        if slices.count > 1:
            kernel = _of_slice(kernel, slices)
    # Scaled in float32: in bfloat16 the factor itself would be off, and every logit with it.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, q_segments = (_pad(x, _blocks(length)[1]) for x in (q, q_segments))
    k, v, kv_segments = (_pad(x, _blocks(num_slots)[1]) for x in (k, v, kv_segments))

    def row(q, k, v, q_segments, kv_segments):
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        segments = kernels.SegmentIds(q_segments, kv_segments)
        return kernel(q, k, v, segment_ids=segments).swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, q_segments, kv_segments)[:, :length].astype(v.dtype)


def _blocks(length):
    """The size of a block, and `length` rounded up to whole blocks."""
    count = max(1, round(length / _BLOCK))
    size = -(-length // (count * _LANES)) * _LANES
    return size, count * size


def _pad(x, length):
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


@functools.lru_cache(maxsize=64)
def _kernel(slices, length, num_slots, num_heads, causal, window):
    """The kernel with the masks of all slices, one below the other, as NumPy arrays."""
    block_q, padded = _blocks(length)
    block_kv, padded_slots = _blocks(num_slots)
    shape = (slices.count * padded, padded_slots)
    if causal or window is not None:
        left = None if window is None else window - 1
        mask = masks.LocalMask(shape, (left, 0 if causal else None), offset=0)
        # Padding stands for the last slot in front of it, which sees no block of its own.
        slots = np.pad(slices.slots(length), [(0, 0), (0, padded - length)], mode="edge")
        mask.q_sequence = slots.reshape(-1)
    else:
        mask = masks.FullMask(shape)
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    def make():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * num_heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=slices.count,
        )
        return jax.tree.map(np.asarray, kernel)

    # Tables are made by JAX, and would be part of what is being traced here, where the cache must
    # not keep them. Another thread traces nothing; `jax.ensure_compile_time_eval` is not enough
    # inside of a scan of layers that are not computed again.
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        return apart.submit(make).result()


def _of_slice(kernel, slices):
    """The kernel with the masks of this device's slice alone."""

    def cut(table):
        axis = min(1, table.ndim - 1)  # tables are [1, blocks of queries, blocks of keys]
        size = table.shape[axis] // slices.count
        return jax.lax.dynamic_slice_in_dim(table, slices.index() * size, size, axis)

    return jax.tree.map(cut, kernel)
