"""Supervised targets: masks by hand, from the original's rules."""

import numpy as np
import pytest

from vllama2_jax.text import (
    ChatTemplate,
    Example,
    TemplateError,
    audio_plain_example,
    place_media_tag,
    plain_example,
    sft_example,
    supervise,
    tokenize,
    truncate,
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TWO = [user("<video>\nQ1"), assistant("A1"), user("Q2"), assistant("A2")]


def _spans(example, tokenizer):
    """The supervised stretches, as text with special tokens."""
    spans, current = [], []
    for token, on in zip([*example.ids, 0], [*example.supervised, False], strict=True):
        if on:
            current.append(token)
        elif current:
            spans.append(tokenizer.decode(current, skip_special=False))
            current = []
    return spans


def test_mistral_conversation_supervises_answers_and_their_ends(mistral):
    example = sft_example(TWO, "mistral", mistral)
    assert example.ids == [
        *(1, 733, 16289, 28793, 28705, -201, 28705, 13, 28824, 28740, 733, 28748, 16289, 28793),
        *(28741, 28740, 2),
        *(733, 16289, 28793, 1186, 28750, 733, 28748, 16289, 28793),
        *(28741, 28750, 2),
    ]
    assert example.supervised == [False] * 14 + [True] * 3 + [False] * 9 + [True] * 3


def test_chatml_conversation_supervises_the_line_break_behind_an_answer_too(qwen2):
    example = sft_example(TWO, "chatml", qwen2)
    assert _spans(example, qwen2) == ["A1<|im_end|>\n", "A2<|im_end|>\n"]
    assert example.ids.count(-201) == 1


@pytest.mark.parametrize(
    "template, ends",
    [("vicuna", ["A1</s>", "A2</s>"]), ("llama2", ["A1 </s>", "A2 </s>"])],
)
def test_llama_conversations_supervise_answers_and_their_ends(llama, template, ends):
    spans = _spans(sft_example(TWO, template, llama), llama)
    assert [span.strip() for span in spans] == ends


def test_three_turns_behind_a_system_turn(qwen2):
    messages = [
        {"role": "system", "content": "S"},
        *TWO,
        user("What is shown?"),
        assistant("A red ball.\n\nIt rolls."),
    ]
    example = sft_example(messages, "chatml", qwen2)
    last = "A red ball.\n\nIt rolls.<|im_end|>\n"
    assert _spans(example, qwen2) == ["A1<|im_end|>\n", "A2<|im_end|>\n", last]


def test_checkpoint_template_gives_the_same_example(qwen2):
    own = ChatTemplate(qwen2.chat_template)
    assert sft_example(TWO, own, qwen2) == sft_example(TWO, "chatml", qwen2)


def test_template_that_rewrites_history_cannot_be_trained_with(qwen2):
    own = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateError, match="earlier turns differently"):
        sft_example(TWO, own, qwen2)


def test_token_across_the_border_of_an_answer_counts_as_prompt(mistral):
    # "])" is one token: the prompt's length in tokens covers it, as in the original.
    example = sft_example([user("Q"), assistant(") no")], "mistral", mistral)
    assert 2803 in example.ids
    assert _spans(example, mistral) == ["no</s>"]


def test_unpaired_conversations_are_refused(qwen2):
    for wrong in (TWO[:1], TWO[:3], TWO[1:], []):
        with pytest.raises(TemplateError):
            sft_example(wrong, "chatml", qwen2)


def test_plain_supervises_all_but_the_placeholder(qwen2):
    example = plain_example([user("<video>\nWhat"), assistant("A cat.")], qwen2)
    assert example.ids == [-201, *qwen2.encode("\nWhat A cat.")]
    assert example.supervised == [False] + [True] * (len(example.ids) - 1)


def test_audio_plain_supervises_the_answer_behind_the_bare_placeholder(qwen2):
    messages = [user("<audio>\nDescribe the sound."), assistant("A cat.")]
    example = audio_plain_example(messages, "chatml", qwen2)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<audio><|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    assert example.ids == tokenize(text, qwen2)
    assert _spans(example, qwen2) == ["A cat.<|im_end|>\n"]


def test_plain_examples_need_one_question_with_media(qwen2):
    for wrong in (TWO, [user("Q"), assistant("A")], TWO[:1]):
        with pytest.raises(TemplateError, match="plain example"):
            plain_example(wrong, qwen2)
        with pytest.raises(TemplateError, match="plain example"):
            audio_plain_example(wrong, "chatml", qwen2)


@pytest.mark.parametrize(
    "before, after",
    [
        ("What is this?\n<video>", "<video>\nWhat is this?"),
        ("<video>What <video>is this? ", "<video>\nWhat is this?"),
        (" <video> ", "<video>"),
        ("No media here. ", "No media here. "),
        ("<image> and <video>", "<video>\n<image> and"),
    ],
)
def test_media_tag_moves_to_the_front_of_its_turn(before, after):
    assert place_media_tag([user(before)], "<video>") == [user(after)]


def test_media_tag_is_placed_in_every_turn_that_has_it():
    placed = place_media_tag([user("a<video>"), assistant("b<video>"), user("c")], "<video>")
    assert placed == [user("<video>\na"), assistant("<video>\nb"), user("c")]


def test_rows_predict_the_next_token_across_media():
    example = Example([7, -201, 8, 9, 10], [False, False, True, False, True])
    row = supervise(example, 3)
    assert row.tokens.tolist() == [7, 0, 0, 0, 8, 9, 10]
    assert row.media_index.tolist() == [-1, 0, 1, 2, -1, -1, -1]
    # The last media slot predicts 8; 9 predicts 10; nothing follows 10.
    assert row.targets.tolist() == [0, 0, 0, 8, 0, 10, 0]
    assert row.target_weights.tolist() == [0, 0, 0, 1, 0, 1, 0]
    assert [a.dtype for a in row] == [np.int32, np.int32, np.float32, np.int32]


def test_rows_equal_the_originals_shifted_labels(qwen2):
    """Labels as the original builds them (-100 where ignored), shifted as its loss does."""
    example = sft_example(TWO, "chatml", qwen2)
    place, slots = example.ids.index(-201), 5
    labels = [t if s else -100 for t, s in zip(example.ids, example.supervised, strict=True)]
    labels[place : place + 1] = [-100] * slots
    shifted = [*labels[1:], -100]
    row = supervise(example, slots)
    assert [t if w else -100 for t, w in zip(row.targets, row.target_weights, strict=True)] == (
        shifted
    )
    assert row.target_weights.sum() == sum(example.supervised)


def test_rows_without_media_and_without_media_for_a_placeholder():
    row = supervise(Example([3, 4], [False, True]), 0)
    assert row.targets.tolist() == [4, 0]
    with pytest.raises(ValueError, match="placeholder"):
        supervise(Example([3, -201], [False, False]), 0)


def test_truncation_counts_a_placeholder_as_one():
    example = Example([1, -201, 5, 6, 7], [False, False, True, True, True])
    assert truncate(example, 5) == example
    cut = truncate(example, 4)
    assert cut == Example([1, -201, 5, 6], [False, False, True, True])
    assert len(supervise(cut, 100).tokens) == 103


def test_truncation_that_spoils_an_example_is_refused_unless_asked_for():
    example = Example([1, -201, 5, 6], [False, False, False, True])
    with pytest.raises(ValueError, match="every supervised token"):
        truncate(example, 3)
    with pytest.raises(ValueError, match="a media placeholder"):
        truncate(example, 1)
    assert truncate(example, 1, strict=False) == Example([1], [False])
