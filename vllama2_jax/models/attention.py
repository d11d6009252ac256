"""Attention over positions and segments, one function for every decoder."""

import functools

import jax
import jax.numpy as jnp

from vllama2_jax.models import splash
from vllama2_jax.models.axes import divisible, layout_in_force, per_device
from vllama2_jax.models.row_slices import WHOLE, Slices, shared_heads

# Large and negative, yet finite: a row that may see nothing becomes uniform instead of NaN.
_MASKED = -1e30

# So many queries at a time meet the keys in XLA, or an eighth of the row where that is fewer.
_PIECE = 256


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
    (see `visible`). Padding gives zeros. Consecutive query heads share a key-value head. The
    softmax runs in float32.

    Under a layout, rows, slots and heads of aligned attention lie on the devices that it says, as
    far as their mesh axes divide them. Other attention (over a cache) is XLA's to split.

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
        segment positions rise by one with the slot; then kernels may go by slots, and causal
        attention skips the upper triangle.
      backend: of aligned attention: "xla" (default), "splash" (TPU) or "cudnn" (GPU). Other
        attention runs in XLA, and so does float32, which cuDNN does not take.

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
    backend = backend or "xla"
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
    if aligned:
        kernel = functools.partial(BACKENDS[backend], causal=causal, window=window)
        out = _attend_within_rows(kernel, q, k, v, q_positions, q_segments, causal and not window)
    else:
        where = (q_positions, kv_positions, q_segments, kv_segments)
        out = _attend_dense(q, k, v, visible(*where, window=window, causal=causal))
    return jnp.where((q_segments != 0)[..., None, None], out, 0)


def _attend_within_rows(kernel, q, k, v, positions, segments, triangular):
    """`kernel` on every device for its own rows, slots and heads.

    Args:
      kernel: one of `BACKENDS`.
      q, k, v, positions, segments: as of `attend`.
      triangular: whether late queries have more work than early ones.
    """
    layout = layout_in_force()
    if layout is None:
        return kernel(q, k, v, positions, positions, segments, segments, slices=WHOLE)

    rows, slots, heads = map(divisible, ("batch", "length", "heads"), q.shape)
    slices = Slices(layout.axes(slots), layout.size(slots), balanced=triangular)

    def local(q, k, v, positions, segments):
        k, v, kv_positions, kv_segments = map(slices.gather, (k, v, positions, segments))
        q, positions, segments = map(slices.exchange, (q, positions, segments))
        where = (positions, kv_positions, segments, kv_segments)
        return slices.exchange(kernel(q, k, v, *where, slices=slices))

    k, v = (shared_heads(x, layout.size(heads)) for x in (k, v))
    token, head = (rows, slots), (rows, slots, heads, None)
    return per_device(local, (head, head, head, token, token), head)(q, k, v, positions, segments)


def _attend_xla(q, k, v, *where, causal, window, slices):
    """XLA's: chunks of queries, each over the keys up to its own end where that is known."""
    length = q.shape[1]
    triangle = causal and slices.count == 1
    chunk = -(-length // (8 * _PIECE)) * _PIECE if triangle else length
    q_positions, kv_positions, q_segments, kv_segments = where
    outputs = []
    for start in range(0, length, chunk):
        own = slice(start, min(start + chunk, length))
        seen = slice(0, own.stop if triangle else k.shape[1])
        outputs.append(
            _attend_in_pieces(
                *(x[:, own] for x in (q, q_positions, q_segments)),
                *(x[:, seen] for x in (k, v, kv_positions, kv_segments)),
                causal=causal,
                window=window,
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _attend_in_pieces(
    q, q_positions, q_segments, k, v, kv_positions, kv_segments, *, causal, window
):
    """A piece of the queries at a time; the backward pass computes a piece's weights again."""

    def attend_piece(q, positions, segments):
        where = (positions, kv_positions, segments, kv_segments)
        return _attend_dense(q, k, v, visible(*where, causal=causal, window=window))

    queries = (q, q_positions, q_segments)
    length = q.shape[1]
    count = -(-length // _PIECE)
    if count == 1:
        return attend_piece(*queries)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * _PIECE - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, _PIECE, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(attend_piece, prevent_cse=False)
    out = jax.lax.map(lambda piece: one(*piece), tuple(map(split, queries)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :length]


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


def _attend_cudnn(q, k, v, *where, causal, window, slices):
    """cuDNN's: it knows no segments, so it gets a mask, which it adds to the logits."""
    if q.dtype == jnp.float32:
        return _attend_xla(q, k, v, *where, causal=causal, window=window, slices=slices)
    mask = visible(*where, window=window, causal=causal)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask[:, None],
        is_causal=causal and slices.count == 1,  # again, so that it skips the upper triangle
        implementation="cudnn",
    )


def _attend_splash(q, k, v, *where, causal, window, slices):
    """A TPU's: by slots instead of positions, and padding sees padding."""
    *_, q_segments, kv_segments = where
    return splash.attend(
        q, k, v, q_segments, kv_segments, causal=causal, window=window, slices=slices
    )


BACKENDS = {"xla": _attend_xla, "splash": _attend_splash, "cudnn": _attend_cudnn}
