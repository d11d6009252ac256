"""Streaming: pieces never break a character and add up to the whole text."""

import numpy as np
import pytest

from vllama2_jax.text import StreamDecoder

TOKENIZERS = ["llama", "llama_json", "chatml_model", "qwen2", "mistral"]
TEXT = "  A naïve 日本語 😀👩‍👩‍👧 answer.\n\nDone 🎬"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def _stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


def test_pieces_are_whole_characters(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = _stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert sum(bool(piece) for piece in pieces) > 3


def test_special_tokens_are_left_out(tokenizer):
    end = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    ids = [*tokenizer.encode("Yes, there is."), tokenizer.eos_id, *tokenizer.encode("A cat")]
    assert end not in "".join(_stream(tokenizer, ids))
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_any_ids_stream_to_their_decoded_text(tokenizer):
    rng = np.random.default_rng(0)
    hard = sorted(tokenizer.byte_ids) or list(range(256))
    for length in (1, 2, 3, 5, 8, 40, 200):
        for share in (0.0, 0.5, 0.9):
            ids = rng.integers(0, tokenizer.vocab_size, length)
            ids = np.where(rng.random(length) < share, rng.choice(hard, length), ids).tolist()
            assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_later_bytes_cannot_spoil_what_is_out(llama_json):
    # The decoder takes a run of bytes as a whole: one bad byte makes all of it U+FFFD.
    run = [llama_json.encode("日")[1:], [3 + 0xE6], llama_json.encode("a")]
    ids = [token for part in run for token in part]
    assert llama_json.decode(run[0]) == "日"
    assert llama_json.decode(ids) == "\ufffd" * 4 + " a"
    assert "".join(_stream(llama_json, ids)) == llama_json.decode(ids)


def test_half_a_character_waits_for_the_rest_and_flush_gives_it_up(tokenizer):
    ids = tokenizer.encode("a 🎬")
    if len(tokenizer.encode("🎬")) < 3:
        pytest.skip("one token holds the whole character in this vocabulary")
    decoder = StreamDecoder(tokenizer)
    shown = "".join(decoder.push(token) for token in ids[:-1])
    assert shown.strip() == "a"
    assert (shown + decoder.flush()).startswith("a \ufffd")


def test_work_per_token_does_not_grow_with_the_answer(qwen2, monkeypatch):
    seen = []
    decode = qwen2.decode
    monkeypatch.setattr(qwen2, "decode", lambda ids: seen.append(len(ids)) or decode(ids))
    _stream(qwen2, qwen2.encode("A red ball rolls to the left. " * 100))
    assert max(seen) < 10
