"""Encoding and splicing against loops over rows, clips and slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature import MINIATURE

from vllama2_jax.models.moe import load_balancing_loss
from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params, splice

MIXTURE = dataclasses.replace(
    MINIATURE,
    decoder=dataclasses.replace(MINIATURE.decoder, family="mixtral", qkv_bias=False, num_experts=4),
)
ROWS, CLIPS, FRAMES, STEPS, LENGTH, TOKENS = 3, 2, 3, 2, 14, 4
ONE = np.ones((1, 1), bool)
MODEL = VLlama2(MINIATURE)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(config)
    )


@pytest.fixture(scope="module")
def params():
    return random_params(MINIATURE)


@pytest.fixture(scope="module")
def experts():
    return random_params(MIXTURE)


@pytest.fixture(scope="module")
def batch():
    """Row 0: clip 1 in front of clip 0. Row 1: text. Row 2: a clip, and a slot that is unused."""
    rng = np.random.default_rng(0)
    media_index = np.full((ROWS, LENGTH), -1, np.int32)
    media_index[0, 1:5] = TOKENS + np.arange(TOKENS)
    media_index[0, 7:11] = np.arange(TOKENS)
    media_index[2, 2:6] = np.arange(TOKENS)
    media_index[2, 8:12] = TOKENS + np.arange(TOKENS)
    return Batch(
        tokens=rng.integers(32, size=(ROWS, LENGTH), dtype=np.int32),
        positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        segment_ids=np.ones((ROWS, LENGTH), np.int32),
        media_index=media_index,
        frames=rng.integers(256, size=(ROWS, FRAMES, 8, 8, 3), dtype=np.uint8),
        clip_frames=np.array([[[0, 1], [2, 0]], [[0, 0], [0, 0]], [[2, 1], [0, 1]]], np.int32),
        clip_mask=np.array([[True, True], [False, False], [True, False]]),
    )


@jax.jit
def encode(params, frames, clip_frames, clip_mask):
    return MODEL.apply({"params": params}, frames, clip_frames, clip_mask, method="encode")


def decode_text(model, **options):
    return jax.jit(
        lambda params, *rows: model.apply({"params": params}, *rows, method="decode", **options)
    )


def rows_of(batch, start, stop):
    return [x[start:stop] for x in (batch.tokens, batch.positions, batch.segment_ids)]


@jax.jit
def forward(params, batch):
    return MODEL.apply({"params": params}, batch)


@jax.jit
def decode_embedded(params, x, positions, segments):
    def run(model, *args):
        return model.decoder(*args)[0]

    return MODEL.apply({"params": params}, x, positions, segments, method=run)


@pytest.fixture(scope="module")
def media(params, batch):
    """[B, M, W], made clip by clip from frames that are written out, zeros for unused clips."""
    out = np.zeros((ROWS, CLIPS * TOKENS, MINIATURE.decoder.width), np.float32)
    steps = np.arange(STEPS, dtype=np.int32)[None, None]
    for row in range(ROWS):
        for clip in range(CLIPS):
            if batch.clip_mask[row, clip]:
                frames = np.stack([batch.frames[row, f] for f in batch.clip_frames[row, clip]])
                tokens = encode(params, frames[None], steps, ONE)[0]
                out[row, clip * TOKENS : (clip + 1) * TOKENS] = tokens
    return out


@pytest.fixture(scope="module")
def hidden(params, batch):
    return np.asarray(forward(params, batch))


def spliced(params, batch, media):
    """[B, L, W] by a loop over slots."""
    table = np.asarray(params["decoder"]["embed_tokens"]["embedding"])
    out = np.zeros((ROWS, LENGTH, MINIATURE.decoder.width), np.float32)
    for row in range(ROWS):
        for slot in range(LENGTH):
            index = batch.media_index[row, slot]
            out[row, slot] = table[batch.tokens[row, slot]] if index < 0 else media[row, index]
    return out


def close(ours, reference):
    return np.abs(np.asarray(ours) - reference).max() <= 1e-5 * np.abs(reference).max()


def test_splice_equals_a_loop_over_slots():
    rng = np.random.default_rng(1)
    text = rng.standard_normal((3, 9, 5)).astype(np.float32)
    media = rng.standard_normal((3, 7, 5)).astype(np.float32)
    index = rng.integers(-1, 7, size=(3, 9)).astype(np.int32)
    index[1] = -1
    expected = text.copy()
    for row, slot in np.argwhere(index >= 0):
        expected[row, slot] = media[row, index[row, slot]]
    np.testing.assert_array_equal(splice(text, media, index), expected)
    low = splice(jnp.asarray(text, jnp.bfloat16), media, index)
    assert low.dtype == jnp.bfloat16


def test_clips_of_a_batch_equal_clips_encoded_alone(params, batch, media):
    ours = encode(params, batch.frames, batch.clip_frames, batch.clip_mask)
    assert ours.shape == media.shape
    assert close(ours, media)


def test_unused_clips_give_zeros_and_touch_no_other(params, batch):
    """The last clip of the last row is the only user of frame 0 there."""
    ours = np.asarray(encode(params, batch.frames, batch.clip_frames, batch.clip_mask))
    assert not ours[2, TOKENS:].any() and not ours[1].any()
    assert ours[2, :TOKENS].any()
    frames = batch.frames.copy()
    frames[2, 0] = 255 - frames[2, 0]
    changed = encode(params, frames, batch.clip_frames, batch.clip_mask)
    np.testing.assert_array_equal(changed, ours)
    used = encode(params, frames, batch.clip_frames, np.ones_like(batch.clip_mask))
    assert used[2, TOKENS:].any()


def test_model_decodes_what_loops_splice(params, batch, media, hidden):
    """Several clips, in another order than they are stored, beside a row of text alone."""
    expected = decode_embedded(
        params, spliced(params, batch, media), batch.positions, batch.segment_ids
    )
    assert close(hidden, np.asarray(expected))
    swapped = dataclasses.replace(batch, clip_frames=batch.clip_frames[:, ::-1])
    assert not close(forward(params, swapped)[0], hidden[0]), "the order of clips is seen"


def test_text_row_is_the_same_beside_media_and_alone(params, batch, hidden):
    alone, cache = decode_text(MODEL)(params, *rows_of(batch, 1, 2))
    assert cache is None
    assert close(hidden[1:2], np.asarray(alone))


def test_image_encoded_once_equals_its_frame_repeated(params, batch):
    image = batch.frames[:1, :1]
    once = encode(params, image, np.zeros((1, 1, STEPS), np.int32), ONE)
    steps = np.arange(STEPS, dtype=np.int32)[None, None]
    repeated = encode(params, np.repeat(image, STEPS, axis=1), steps, ONE)
    assert close(once, np.asarray(repeated))


def test_router_logits_reach_the_balancing_loss(experts, batch):
    model = VLlama2(MIXTURE, moe_backend="ragged_dot", remat="full")
    rows = rows_of(batch, 0, ROWS)
    hidden, cache, logits = decode_text(model, with_router_logits=True)(experts, *rows)
    assert hidden.shape == (ROWS, LENGTH, 16) and cache is None
    layers = MINIATURE.decoder.num_layers
    assert logits.shape == (layers, ROWS, LENGTH, 4)
    # 2 when the load is balanced, 4 when every token goes to the same 2 of 4 experts.
    assert 1.5 < float(load_balancing_loss(logits, 2)) < 4
    reference, _ = decode_text(VLlama2(MIXTURE))(experts, *rows)
    assert close(hidden, np.asarray(reference)), "another backend and remat, the same numbers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "flash"}, "unknown attention backend 'flash'"),
        ({"moe_backend": "cutlass"}, "unknown grouped matmul backend 'cutlass'"),
        ({"remat": "sometimes"}, "unknown remat policy 'sometimes'"),
    ],
)
def test_options_reach_the_decoder(experts, batch, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(decode_text(VLlama2(MIXTURE, **options)), experts, *rows_of(batch, 0, ROWS))
