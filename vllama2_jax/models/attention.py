"""Attention over positions and segments, one function for every decoder."""

import jax
import jax.numpy as jnp

BACKENDS = ("xla", "cudnn")

# Large and negative, yet finite: a row that may see nothing becomes uniform instead of NaN.
_MASKED = -1e30


def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    *,
    window: int | None = None,
    causal: bool = True,
) -> jax.Array:
    """Which key each query may see.

    Args:
      q_positions: int32 [B, L].
      kv_positions: int32 [B, S].
      q_segments: int32 [B, L]; 0 is padding.
      kv_segments: int32 [B, S]; 0 is padding or an empty cache slot.
      window: a query sees only the last `window` positions, its own included.
      causal: a query does not see later positions.

    Returns:
      bool [B, L, S].
    """
    ahead = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments[:, None, :] != 0)
    if causal:
        mask &= ahead >= 0
    if window is not None:
        mask &= ahead < window
    return mask


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None = None,
    causal: bool = True,
    aligned: bool = False,
    backend: str | None = None,
) -> jax.Array:
    """Softmax attention with grouped key-value heads, scaled by 1 / sqrt(D).

    A query sees a key if both lie in the same nonzero segment, and position and window allow it
    (see `visible`). Rows that see nothing give finite, meaningless numbers. Consecutive query
    heads share a key-value head. The softmax runs in float32.

    Args:
      q: [B, L, H, D].
      k: [B, S, KV, D], H a multiple of KV.
      v: [B, S, KV, D].
      q_positions: int32 [B, L].
      kv_positions: int32 [B, S].
      q_segments: int32 [B, L].
      kv_segments: int32 [B, S].
      window: sliding window, or None.
      causal: hide later positions.
      aligned: queries and keys are the same tokens in the same slots (S == L), and within a
        segment positions ascend with the slot; then causal attention skips the upper triangle.
      backend: "xla" (default) or "cudnn" (GPU, float16 or bfloat16).

    Returns:
      [B, L, H, D] in the dtype of `v`.

    Raises:
      ValueError: for an unknown backend or heads that do not divide.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly; "
            "num_heads must be a multiple of num_kv_heads"
        )
    if aligned and q.shape[1] != k.shape[1]:
        raise ValueError(f"aligned attention needs as many keys as queries, not {k.shape[1]}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
    mask = visible(q_positions, kv_positions, q_segments, kv_segments, window=window, causal=causal)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    if aligned and causal:
        return _attend_triangle(q, k, v, mask)
    return _attend_dense(q, k, v, mask)


def _attend_triangle(q, k, v, mask):
    """Dense attention in at most 8 chunks of queries, each over the keys up to its own end."""
    length = q.shape[1]
    chunk = max(256, -(-length // (8 * 128)) * 128)
    outputs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        outputs.append(
            _attend_dense(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _attend_dense(q, k, v, mask):
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("blkgd,bskd->bkgls", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Dividing the D-wide output is cheaper than dividing the S-wide weights.
    total = weights.sum(axis=-1)
    out = jnp.einsum(
        "bkgls,bskd->bkgld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / total[..., None]).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)
