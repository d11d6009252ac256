"""What a training example supervises: conversations, and the plain captions of pre-training.

An `Example` holds ids with placeholders, as `prompt.tokenize` gives them, and says of each id
whether predicting it is trained. `supervise` turns it into the arrays of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllama2_jax.text.chat import ChatTemplate, Message, TemplateError, render, split_system
from vllama2_jax.text.prompt import PLACEHOLDERS, expand, tokenize
from vllama2_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """A training example before its media have slots.

    Attributes:
      ids: placeholders are negative.
      supervised: whether the model is trained to predict that id; as long as `ids`.
    """

    ids: list[int]
    supervised: list[bool]


class Supervised(NamedTuple):
    """The arrays of a row, all [L].

    Attributes:
      tokens: int32; 0 in the slots of media.
      targets: int32; the id that each position predicts, 0 where none is trained.
      target_weights: float32; 1 where it is trained, else 0.
      media_index: int32; -1 for text, else the index into the row's table of media tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    target_weights: np.ndarray
    media_index: np.ndarray


def place_media_tag(messages: Sequence[Message], tag: str) -> list[Message]:
    """Move the placeholder to the front of every turn that has it (the original's SFT data rule).

    All occurrences in the turn are removed, the rest is stripped, and the tag and a line break go
    in front. A tag in two turns stays in two, which then need media each.

    Args:
      messages: of any role.
      tag: "<video>", "<image>" or "<audio>".
    """
    placed = []
    for message in messages:
        if tag in message["content"]:
            rest = message["content"].replace(tag, "").strip()
            message = {**message, "content": f"{tag}\n{rest}".strip()}
        placed.append(message)
    return placed


def sft_example(
    messages: Sequence[Message], template: str | ChatTemplate, tokenizer: Tokenizer
) -> Example:
    """A conversation of which every answer and its end markers are supervised.

    The whole text is tokenized once. Of each turn, the ids up to the length of "history, question,
    cue" are not supervised; what follows is, up to the end of the turn: for Qwen2 that includes
    `<|im_end|>` and the line break behind it (the original's `preprocess`).

    Args:
      messages: pairs of user and assistant, behind at most one system turn.
      template: as in `render`.
      tokenizer: its ids.

    Raises:
      TemplateError: if the messages do not pair up or the template refuses them.
    """
    messages = list(messages)
    system, turns = split_system(messages)
    if turns[-1]["role"] != "assistant":
        raise TemplateError("a training conversation must end with an answer; this one does not")
    first = 0 if system is None else 1
    whole = render(messages, template, add_generation_prompt=False)
    ids = tokenize(whole, tokenizer)
    supervised = [False] * len(ids)
    for answer in range(first + 1, len(messages), 2):
        prompt = render(messages[:answer], template, add_generation_prompt=True)
        if not whole.startswith(prompt):
            raise TemplateError(
                "the chat template renders earlier turns differently once later ones follow, so "
                "answers cannot be told from prompts; train with another template"
            )
        begin = len(tokenize(prompt, tokenizer))
        end = len(ids)
        if answer + 1 < len(messages):
            history = render(messages[: answer + 1], template, add_generation_prompt=False)
            end = min(end, len(tokenize(history, tokenizer)))
        supervised[begin:end] = [token >= 0 for token in ids[begin:end]]
    return Example(ids, supervised)


def plain_example(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """Connector pre-training as the original's main branch does it.

    One question with its placeholder, a space, and the answer, without template, begin or end; all
    but the placeholder is supervised, the question too.

    Raises:
      TemplateError: unless there is one question with a placeholder, and its answer.
    """
    question, answer = _one_pair(messages)
    ids = tokenize(f"{question} {answer}", tokenizer)
    return Example(ids, [token >= 0 for token in ids])


def audio_plain_example(
    messages: Sequence[Message], template: str | ChatTemplate, tokenizer: Tokenizer
) -> Example:
    """Connector pre-training as the original's audio-visual branch does it.

    The question is reduced to its placeholder, the chat template is applied, and the answer with
    its end markers is supervised.

    Raises:
      TemplateError: unless there is one question with a placeholder, and its answer.
    """
    question, answer = _one_pair(messages)
    tag = next(tag for tag in PLACEHOLDERS if tag in question)
    bare = [{"role": "user", "content": tag}, {"role": "assistant", "content": answer}]
    return sft_example(bare, template, tokenizer)


def truncate(example: Example, max_length: int, *, strict: bool = True) -> Example:
    """Cut the ids at `max_length`, a placeholder counting as one, as the original does.

    Args:
      example: before its media have slots; the row may be longer than `max_length` by theirs.
      max_length: of ids (the original's `model_max_length`, 2,048).
      strict: refuse a cut that takes a placeholder away, which would leave its media without a
        slot, or every supervised id. The original cuts those too, silently.

    Raises:
      ValueError: for a cut that `strict` refuses.
    """
    kept = Example(example.ids[:max_length], example.supervised[:max_length])
    if strict and len(kept.ids) < len(example.ids):
        if any(token < 0 for token in example.ids[max_length:]):
            lost = "a media placeholder"
        elif any(example.supervised) and not any(kept.supervised):
            lost = "every supervised token"
        else:
            return kept
        raise ValueError(
            f"cutting {len(example.ids)} tokens at {max_length} would lose {lost}; "
            "raise the limit or leave the example out"
        )
    return kept


def supervise(example: Example, num_media_tokens: int | list[int]) -> Supervised:
    """The arrays of a row: media get their slots, and targets are shifted by one.

    The last media slot in front of a supervised id predicts it; the last position predicts nothing.

    Args:
      example: its ids and what is supervised.
      num_media_tokens: as in `expand`.

    Raises:
      ValueError: if placeholders and media do not pair up.
    """
    tokens, media_index = expand(example.ids, num_media_tokens)
    trained = np.zeros(len(tokens), bool)
    text = media_index < 0
    trained[text] = [
        s for token, s in zip(example.ids, example.supervised, strict=True) if token >= 0
    ]
    weights = np.zeros(len(tokens), np.float32)
    weights[:-1] = trained[1:]
    targets = np.zeros(len(tokens), np.int32)
    targets[:-1] = np.where(trained[1:], tokens[1:], 0)
    return Supervised(tokens, targets, weights, media_index)


def _one_pair(messages: Sequence[Message]) -> tuple[str, str]:
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise TemplateError(f"a plain example is one question and its answer; found {roles}")
    question, answer = (message["content"] for message in messages)
    if not any(tag in question for tag in PLACEHOLDERS):
        raise TemplateError(
            f"a plain example's question needs a placeholder ({', '.join(PLACEHOLDERS)}); "
            f"it is {question[:80]!r}"
        )
    return question, answer
