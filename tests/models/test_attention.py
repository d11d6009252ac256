"""Attention against PyTorch's, and the rotary tables against transformers'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_oracle import TINY, hf_config, relative_error
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from transformers.models.mistral.modeling_mistral import (
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from vllama2_jax.models import splash
from vllama2_jax.models.attention import attend
from vllama2_jax.models.rope import apply_rope, rope_tables
from vllama2_jax.models.row_slices import Slices


def inputs(rows, length, slots, heads=6, kv_heads=2, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, dim), *[(rows, slots, kv_heads, dim)] * 2]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def torch_attend(q, k, v, mask):
    """PyTorch's math attention with heads repeated, mask [B, L, S]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (torch.tensor(a).transpose(1, 2) for a in (q, k, v))
    k, v = (a.repeat_interleave(groups, dim=1) for a in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(mask)[:, None]
    )
    return out.transpose(1, 2).numpy()


def packed_mask(positions, segments, window=None, causal=True):
    """The visibility rule as plain loops."""
    rows, length = positions.shape
    mask = np.zeros((rows, length, length), bool)
    for b, i, j in np.ndindex(mask.shape):
        ahead = positions[b, i] - positions[b, j]
        mask[b, i, j] = (
            segments[b, i] == segments[b, j] != 0
            and (not causal or ahead >= 0)
            and (window is None or ahead < window)
        )
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("aligned", [True, False])
def test_attend_equals_torch_on_packed_padded_rows(causal, window, aligned):
    length = 40
    segments = np.array([[1] * 15 + [2] * 20 + [0] * 5, [1] * 40])
    positions = np.array([[*range(15), *range(20), *range(5)], [*range(40)]])
    q, k, v = inputs(2, length, length)
    mask = packed_mask(positions, segments, window, causal)
    out = attend(
        *map(jnp.array, (q, k, v)),
        q_positions=jnp.array(positions),
        kv_positions=jnp.array(positions),
        q_segments=jnp.array(segments),
        kv_segments=jnp.array(segments),
        window=window,
        causal=causal,
        aligned=aligned,
    )
    assert np.isfinite(out).all(), "rows that see nothing stay finite"
    reference = torch_attend(q, k, v, mask | ~mask.any(-1, keepdims=True))
    seen = mask.any(-1)
    assert relative_error(out[seen], reference[seen]) <= 2e-6


def test_long_causal_attention_in_chunks_equals_torch():
    """700 is no multiple of the chunk, and its segments cross chunk borders."""
    length = 700
    segments = np.array([[1] * 300 + [2] * 390 + [0] * 10])
    positions = np.array([[*range(300), *range(390), *range(10)]])
    q, k, v = inputs(1, length, length)
    order = np.arange(length)
    mask = (segments[:, :, None] == segments[:, None]) & (segments[:, None] != 0)
    mask &= order[:, None] >= order[None]
    out = attend(
        *map(jnp.array, (q, k, v)),
        q_positions=jnp.array(positions),
        kv_positions=jnp.array(positions),
        q_segments=jnp.array(segments),
        kv_segments=jnp.array(segments),
        aligned=True,
    )
    real = segments[0] != 0
    assert relative_error(out[:, real], torch_attend(q, k, v, mask)[:, real]) <= 2e-6


def test_rope_equals_transformers_at_far_positions():
    positions = np.array([[0, 1, 5, 1023, 4000, 32767]])
    q, k, _ = inputs(1, 6, 6)
    rotary = MistralRotaryEmbedding(hf_config(TINY))
    cos, sin = rotary(torch.zeros(1), torch.tensor(positions))
    reference = apply_rotary_pos_emb(
        torch.tensor(q).transpose(1, 2), torch.tensor(k).transpose(1, 2), cos, sin
    )
    tables = rope_tables(jnp.array(positions), TINY.head_dim, TINY.rope_theta)
    for ours, theirs in zip((q, k), reference, strict=True):
        rotated = apply_rope(jnp.array(ours), tables)
        assert relative_error(rotated, theirs.transpose(1, 2).numpy()) <= 2e-6


def with_gradients(backend, arrays, cotangent, positions, segments, **how):
    """Attention within rows, and the gradients of queries, keys and values."""

    @jax.jit
    def run(q, k, v, cotangent):
        def attended(q, k, v):
            where = dict(q_positions=positions, kv_positions=positions)
            where |= dict(q_segments=segments, kv_segments=segments)
            return attend(q, k, v, aligned=True, backend=backend, **where, **how)

        out, backward = jax.vjp(attended, q, k, v)
        return out, *backward(cotangent)

    return run(*map(jnp.array, (*arrays, cotangent)))


@pytest.mark.parametrize(
    ("length", "how"),
    [
        (200, dict(causal=True)),
        (200, dict(causal=False)),
        (300, dict(causal=True, window=37)),
    ],
)
def test_splash_equals_xla_on_packed_padded_rows_forward_and_backward(length, how):
    """Interpreted, so that it needs no TPU; no length here is one of its blocks."""
    packed = [90, length - 120, 30]  # two samples, and padding
    segments = jnp.array([np.repeat([1, 2, 0], packed)])
    positions = jnp.array([np.concatenate([np.arange(n) for n in packed])])
    arrays = inputs(1, length, length, heads=4, kv_heads=2, dim=16)
    cotangent = inputs(1, length, length, heads=4, dim=16, seed=1)[0]
    expected = with_gradients("xla", arrays, cotangent, positions, segments, **how)
    with force_tpu_interpret_mode():
        found = with_gradients("splash", arrays, cotangent, positions, segments, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@dataclasses.dataclass(frozen=True)
class OneSlice(Slices):
    """What one of several devices has of each row, without the others."""

    number: int = 0

    def index(self):
        return self.number


@pytest.mark.parametrize(("length", "window"), [(65, None), (66, 40)])
def test_splash_of_every_slice_of_a_row_equals_xla_over_the_whole(length, window):
    """Four slices, whose second halves are exchanged where late queries have more work."""
    count, how = 4, dict(causal=True, window=window)
    segments = np.repeat([1, 2, 0], [100, count * length - 125, 25])[None]
    positions = np.arange(count * length)[None]
    q, k, v = inputs(1, count * length, count * length, heads=2, kv_heads=1, dim=16)
    expected = with_gradients("xla", (q, k, v), q, positions, segments, **how)[0]
    found = np.zeros_like(expected)
    for number in range(count):
        slices = OneSlice(("s",), count, window is None, number)
        own = slices.slots(length)[number]
        arguments = map(jnp.array, (q[:, own], k, v, segments[:, own], segments))
        with force_tpu_interpret_mode():
            found[:, own] = splash.attend(*arguments, slices=slices, **how)
    found[segments == 0] = 0  # where `attend` gives zeros
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on a GPU only")
def test_cudnn_equals_xla():
    segments = jnp.array([[1] * 60 + [2] * 60 + [0] * 8])
    positions = jnp.array([[*range(60), *range(60), *range(8)]])
    q, k, v = (jnp.array(a, jnp.bfloat16) for a in inputs(1, 128, 128, dim=64))
    where = {"q_positions": positions, "kv_positions": positions}
    where |= {"q_segments": segments, "kv_segments": segments}
    a, b = (attend(q, k, v, **where, backend=name)[:, :120] for name in ("xla", "cudnn"))
    assert relative_error(b.astype(jnp.float32), a.astype(jnp.float32)) <= 2e-2


def test_wrong_use_is_one_clear_error():
    q, k, v = map(jnp.array, inputs(1, 4, 5))
    where = {"q_positions": jnp.zeros((1, 4)), "kv_positions": jnp.zeros((1, 5))}
    where |= {"q_segments": jnp.zeros((1, 4)), "kv_segments": jnp.zeros((1, 5))}
    with pytest.raises(ValueError, match="as many keys as queries"):
        attend(q, k, v, **where, aligned=True)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        attend(q, k, v, **where, backend="flash")
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        attend(q[:, :, :5], k, v, **where)
