"""Batches of Toybox: packed rows whose supervised tokens are the answers."""

import dataclasses

import numpy as np
import pytest

from vllama2_jax.data.toybox_tokenizer import VOCAB_SIZE, train_tokenizer
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.toybox_feed import ToyboxFeed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.fixture
def feed(tokenizer):
    return ToyboxFeed(tokenizer, media_tokens=64, image_size=16, length=160, rows=4, seed=0)


def _segments(batch, row):
    """(segment number, decoded text, decoded supervised targets) of one row."""
    for number in range(1, batch.segment_ids[row].max() + 1):
        inside = batch.segment_ids[row] == number
        text = inside & (batch.media_index[row] < 0)
        learnt = inside & (batch.target_weights[row] > 0)
        yield number, batch.tokens[row][text], batch.targets[row][learnt]


def test_tokenizer_is_reproducible_and_types_anything(tokenizer, tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (
        tokenizer.folder / "tokenizer.model"
    ).read_bytes()
    assert tokenizer.vocab_size == VOCAB_SIZE == ZOO["tiny"].decoder.vocab_size
    for text in ("Which came first, the red circle?", "  Où est 猫?\n\n", "\ttab", "<video>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("What colour is the shape?")) == 6
    (end,) = tokenizer.encode("<|im_end|>")
    assert tokenizer.eos_id == end and end in tokenizer.special_ids


def test_supervised_tokens_are_answers_and_their_ends(feed, tokenizer):
    batch = next(feed.clips())
    for row in range(4):
        for _, tokens, targets in _segments(batch, row):
            text = tokenizer.decode(tokens, skip_special=False)
            answers = [turn.split("<|im_end|>")[0] for turn in text.split("assistant\n")[1:]]
            wanted = "".join(f"{answer}<|im_end|>\n" for answer in answers)
            assert answers and tokenizer.decode(targets, skip_special=False) == wanted


def test_each_clip_row_holds_one_video_in_its_first_segment(feed):
    batch = next(feed.clips())
    assert batch.frames.shape == (4, 8, 16, 16, 3) and batch.frames.dtype == np.uint8
    for row in range(4):
        slots = batch.media_index[row] >= 0
        assert (batch.media_index[row][slots] == np.arange(64)).all()
        assert (batch.segment_ids[row][slots] == 1).all()
        for number in range(1, batch.segment_ids[row].max() + 1):
            inside = batch.segment_ids[row] == number
            assert (batch.positions[row][inside] == np.arange(inside.sum())).all()


def test_text_rows_have_no_media(feed):
    batch = next(feed.text())
    assert batch.frames is None and (batch.media_index == -1).all()
    assert batch.segment_ids.max() > 1


@pytest.mark.parametrize("kind", ["text", "clips"])
def test_batches_are_a_function_of_seed_and_number(tokenizer, kind):
    def third(seed):
        stream = getattr(ToyboxFeed(tokenizer, 64, 16, 192, 2, seed), kind)()
        for _ in range(2):
            next(stream)
        return next(stream)

    again, other = third(1), third(2)
    for name in ("tokens", "targets", "frames"):
        if getattr(again, name) is not None:
            np.testing.assert_array_equal(getattr(third(1), name), getattr(again, name))
    assert (again.tokens != other.tokens).any()


def test_first_example_must_fit_its_row_and_others_are_left_out(feed):
    with pytest.raises(ValueError, match="do not fit a row of 8"):
        next(dataclasses.replace(feed, length=8).text())
    wide, narrow = (next(dataclasses.replace(feed, length=n).text()) for n in (512, 128))
    for row in range(feed.rows):
        whole = wide.tokens[row][wide.segment_ids[row] == 1]
        np.testing.assert_array_equal(narrow.tokens[row][narrow.segment_ids[row] == 1], whole)
    assert wide.segment_ids.max() == 4 > narrow.segment_ids.max() >= 1
