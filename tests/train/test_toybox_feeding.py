"""Batches of Toybox: rows of clips and bare questions whose supervised tokens are the answers."""

import dataclasses
import itertools

import numpy as np
import pytest

from vllama2_jax.checkpoints.card import read_card
from vllama2_jax.configs import build, parse
from vllama2_jax.data.toybox.source import ToyboxSource
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.feeding import make_feeding
from vllama2_jax.weights import TINY

ROWS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY / "tokenizer")


@pytest.fixture(scope="module")
def feeding(tokenizer, tmp_path_factory):
    """What `tiny_video_sft` reads, in small numbers."""
    data = build(parse(["config:tiny_video_sft"])).data
    sources = tuple(dataclasses.replace(s, records=s.records // 1000) for s in data.sources)
    return make_feeding(
        dataclasses.replace(data, sources=sources),
        read_card(TINY),
        tokenizer,
        rows=ROWS,
        seed=0,
        index_folder=tmp_path_factory.mktemp("index"),
        epochs=1,
    )


@pytest.fixture(scope="module")
def batches(feeding):
    return list(feeding.batches(0))


def _segments(batch, row):
    """(segment number, ids of its text, ids that are learnt) of one row."""
    for number in range(1, batch.segment_ids[row].max() + 1):
        inside = batch.segment_ids[row] == number
        text = inside & (batch.media_index[row] < 0)
        learnt = inside & (batch.target_weights[row] > 0)
        yield number, np.asarray(batch.tokens[row][text]), np.asarray(batch.targets[row][learnt])


def test_supervised_tokens_are_answers_and_their_ends(batches, tokenizer):
    for batch, row in itertools.product(batches, range(ROWS)):
        for _, tokens, targets in _segments(batch, row):
            text = tokenizer.decode(list(tokens), skip_special=False)
            answers = [turn.split("<|im_end|>")[0] for turn in text.split("assistant\n")[1:]]
            wanted = "".join(f"{answer}<|im_end|>\n" for answer in answers)
            assert answers and tokenizer.decode(list(targets), skip_special=False) == wanted


def test_every_row_holds_one_video_and_some_a_bare_question_beside_it(feeding, batches):
    rows, segments = 0, 0
    for batch in batches:
        assert batch.frames.shape == (ROWS, 8, 64, 64, 3) and batch.frames.dtype == np.uint8
        for row in np.flatnonzero(np.asarray(batch.clip_mask)[:, 0]):
            slots = np.asarray(batch.media_index[row])
            np.testing.assert_array_equal(slots[slots >= 0], np.arange(64))
            assert len(set(np.asarray(batch.segment_ids[row])[slots >= 0])) == 1
            rows, segments = rows + 1, segments + int(batch.segment_ids[row].max())
    assert (rows, segments) == (27, 36)
    assert feeding.datasets == ("clips", "bare")


def test_frames_are_those_of_the_records_that_are_asked_about(feeding, batches):
    step, source, seen = feeding.schedule[1], ToyboxSource(27, "clips", told=0.4), 0
    for row, places in enumerate(step.rows):
        for number in (number for source_number, number in places if source_number == 0):
            expected = source.frames(number, 64)
            np.testing.assert_array_equal(batches[1].frames[row], expected)
            seen += 1
    assert seen


@pytest.mark.parametrize(
    "recipe",
    [
        "tiny_video_pretrain",
        "tiny_video_sft",
        "tiny_audio_pretrain",
        "tiny_audio_sft",
        "tiny_av_joint",
    ],
)
def test_rows_are_long_enough_for_all_that_is_said(recipe, tokenizer, tmp_path):
    """Nothing is cut: a record has the slots that it would have in rows without end."""
    data = build(parse([f"config:{recipe}"])).data
    sources = tuple(dataclasses.replace(s, records=2000) for s in data.sources)
    data = dataclasses.replace(data, sources=sources)
    made = make_feeding(
        data,
        read_card(TINY),
        tokenizer,
        rows=ROWS,
        seed=0,
        index_folder=tmp_path,
        steps=1,
    )
    form = made.feed.assembler.record_format
    assert form.max_length == data.max_length
    for source in made.feed.assembler.sources:
        for record in (source[number] for number in range(2000)):
            seen = record.media is not None and record.media.seen
            heard = record.media is not None and record.media.kind in ("audio", "av")
            text, limit = form.text_tokens(record), form.limit(int(seen), int(heard))
            assert text + (record.media is not None) <= limit
