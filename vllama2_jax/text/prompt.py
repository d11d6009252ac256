"""Placeholders of media in a prompt: from text to ids, and from ids to slots."""

import re
from typing import NamedTuple

import numpy as np

from vllama2_jax.text.tokenizer import Tokenizer

# The original's own strings and ids (its `constants.py`).
IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
PLACEHOLDERS = {IMAGE: -200, VIDEO: -201, AUDIO: -202}

_SPLIT = re.compile("(" + "|".join(map(re.escape, PLACEHOLDERS)) + ")")


class Spliced(NamedTuple):
    """A prompt with a slot for every token that the decoder sees.

    Attributes:
      tokens: int32 [L]; 0 in the slots of media.
      media_index: int32 [L]; -1 for text, else the index into the row's table of media tokens.
    """

    tokens: np.ndarray
    media_index: np.ndarray


def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered prompt, placeholders as their negative ids.

    Each stretch between placeholders is encoded by itself, as the original's
    `tokenizer_multimodal_token` does: with SentencePiece each gets its own prefix space.
    """
    ids: list[int] = []
    for stretch in _SPLIT.split(text):
        if stretch in PLACEHOLDERS:
            ids.append(PLACEHOLDERS[stretch])
        elif stretch:
            ids += tokenizer.encode(stretch)
    return ids


def expand(ids: list[int], num_media_tokens: int | list[int]) -> Spliced:
    """Give every placeholder its slots.

    Args:
      ids: of `tokenize`.
      num_media_tokens: slots per placeholder, from left to right; one number is for each of them.
        0 alone says that there are no media. Slots count on through the row: the second
        placeholder's media tokens lie behind the first's.

    Raises:
      ValueError: if placeholders and media do not pair up.
    """
    places = [i for i, token in enumerate(ids) if token < 0]
    if isinstance(num_media_tokens, int):
        slots = [num_media_tokens] * (len(places) if num_media_tokens else 0)
    else:
        slots = list(num_media_tokens)
    if len(places) != len(slots):
        raise ValueError(
            f"the prompt has {len(places)} media placeholder(s) ({', '.join(PLACEHOLDERS)}) but "
            f"there are media for {len(slots)}; each needs one, and a question cannot hold more"
        )
    if min(slots, default=1) < 1:
        raise ValueError(f"a placeholder needs at least one media token; got {slots}")
    counts = np.ones(len(ids), np.int64)
    counts[places] = slots
    tokens = np.repeat(np.asarray(ids, np.int32), counts)
    is_media = tokens < 0
    media_index = np.where(is_media, np.cumsum(is_media) - 1, -1).astype(np.int32)
    return Spliced(np.where(is_media, 0, tokens).astype(np.int32), media_index)
