"""Placeholders: ids of prompts that the original gave, and slots by hand."""

import numpy as np
import pytest

from vllama2_jax.text import PLACEHOLDERS, expand, inference_messages, render, tokenize


def test_mistral_inference_prompt_has_the_originals_ids(mistral):
    messages = inference_messages("mistral", "What is shown?", "video")
    ids = tokenize(render(messages, "mistral", add_generation_prompt=True), mistral)
    assert len(ids) == 138
    assert ids.index(-201) == 127
    assert ids[:4] == [1, 733, 16289, 28793]
    # Behind the placeholder: a prefix space, the line break, ..., " [/INST]".
    assert ids[128:130] == [28705, 13]
    assert ids[-4:] == [733, 28748, 16289, 28793]


def test_space_in_front_of_a_placeholder_is_a_token_of_its_own(mistral):
    ids = tokenize("<s>[INST] <video>\nQ [/INST]", mistral)
    assert ids == [1, 733, 16289, 28793, 28705, -201, 28705, 13, 28824, 733, 28748, 16289, 28793]


def test_stretches_are_encoded_independently(llama, qwen2):
    for tokenizer in (llama, qwen2):
        ids = tokenize("What<image> is<audio>\nshown<video>", tokenizer)
        parts = [tokenizer.encode(text) for text in ("What", " is", "\nshown")]
        assert ids == [*parts[0], -200, *parts[1], -202, *parts[2], -201]


def test_line_break_behind_a_placeholder_has_no_artefact_in_byte_level_bpe(qwen2):
    assert tokenize("<video>\nQ", qwen2) == [-201, *qwen2.encode("\n"), *qwen2.encode("Q")]


def test_space_between_placeholders_is_kept(llama, qwen2):
    for tokenizer in (llama, qwen2):
        assert tokenize("<image> <image>", tokenizer) == [-200, *tokenizer.encode(" "), -200]


def test_text_without_placeholders_is_encoded_whole(llama):
    assert tokenize("a cat </video>", llama) == llama.encode("a cat </video>")
    assert tokenize("", llama) == []


def test_placeholder_ids_are_the_originals():
    assert PLACEHOLDERS == {"<image>": -200, "<video>": -201, "<audio>": -202}


def test_placeholder_becomes_its_slots():
    spliced = expand([1, 5, 6, -201, 7, 8, 9, 0, 0], 8)
    assert spliced.tokens.dtype == spliced.media_index.dtype == np.int32
    assert spliced.tokens.tolist() == [1, 5, 6] + [0] * 8 + [7, 8, 9, 0, 0]
    assert spliced.media_index.tolist() == [-1] * 3 + list(range(8)) + [-1] * 5


def test_slots_count_on_over_several_media():
    spliced = expand([-200, 4, -201, -202], [2, 3, 1])
    assert spliced.tokens.tolist() == [0, 0, 4, 0, 0, 0, 0]
    assert spliced.media_index.tolist() == [0, 1, -1, 2, 3, 4, 5]
    assert expand([-200, 4, -201], 2).media_index.tolist() == [0, 1, -1, 2, 3]


def test_text_alone_has_no_slots():
    for none in (0, []):
        spliced = expand([3, 4], none)
        assert spliced.tokens.tolist() == [3, 4]
        assert spliced.media_index.tolist() == [-1, -1]
    assert expand([], 0).tokens.shape == (0,)


@pytest.mark.parametrize(
    "ids, count", [([1, -201], 0), ([1, -201, -201], [4]), ([1, 2], [4]), ([1, -201], [4, 4])]
)
def test_placeholders_and_media_must_pair_up(ids, count):
    with pytest.raises(ValueError, match=r"placeholder\(s\).*media for"):
        expand(ids, count)


def test_media_without_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one media token"):
        expand([-201, -201], [3, 0])
