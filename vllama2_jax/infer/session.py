"""A conversation about one media input that keeps its keys and values between turns."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from vllama2_jax.infer.generate import STREAM_STEP, Request
from vllama2_jax.models.cache import KVCache
from vllama2_jax.text import Spliced

_EMPTY = Spliced(np.zeros(0, np.int32), np.zeros(0, np.int32))


class Session:
    """Turns of questions and answers over one media input.

    Each turn renders the whole conversation, compares its slots with those in the cache, and feeds
    only what differs: with the usual templates that is the new question alone. Where a template
    rewrites earlier text, the slots from there on are forgotten and fed again.
    """

    def __init__(self, model, media, **media_options):
        """Open a conversation of `model` about `media`; options as in `Model.read_media`."""
        self._model = model
        self._media = model.read_media(media, **media_options)
        self._cache = None
        self._fed = _EMPTY
        self._slots = _EMPTY.tokens  # where in the cache each fed token lies
        self.messages: list[dict[str, str]] = []

    @property
    def media(self):
        """What the conversation is about, as the model read it."""
        return self._media

    def ask(self, question: str, **options) -> str:
        """Ask one more question; options as in `Model.ask`, and so is what it returns."""
        return "".join(self._turn(question, None, **options)).strip()

    def stream(self, question: str, **options) -> Iterator[str]:
        """Ask one more question and yield the answer as it comes.

        A turn counts once its answer is complete: a stream that is abandoned leaves the
        conversation as it was.
        """
        return self._turn(question, STREAM_STEP, **options)

    def _turn(self, question, step, *, max_new_tokens: int | None = None, **sampling):
        model = self._model
        # What can be refused is refused before the cache is touched.
        sampling, limit = model.sampling(**sampling), model.max_new_tokens(max_new_tokens)
        asked = [*self.messages, {"role": "user", "content": question}]
        wanted = model.splice(model.inference_messages(asked, self._media), self._media)
        keep = _common_prefix(self._fed, wanted)
        # The cache is handed over: until the turn is complete, this session holds nothing.
        cache, fed, slots = self._without(keep), self._fed, self._slots
        self._cache, self._fed, self._slots = None, _EMPTY, _EMPTY.tokens
        end = 0 if cache is None else int(cache.end)
        rest = Spliced(wanted.tokens[keep:], wanted.media_index[keep:])
        run = model.generator.begin(
            [Request(rest, self._media.tokens)],
            sampling,
            model.card.generation.stop_ids,
            limit,
            cache=cache,
            start=keep,
        )
        answer = []
        for piece in run.text(model.tokenizer, step):
            answer.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer).strip()}]
        (new,) = run.tokens()
        first_new = int(run.state.cache.end) - (run.count - 1)
        self._fed = Spliced(
            np.concatenate([fed.tokens[:keep], rest.tokens, np.asarray(new[:-1], np.int32)]),
            np.concatenate(
                [fed.media_index[:keep], rest.media_index, np.full(len(new) - 1, -1, np.int32)]
            ),
        )
        self._slots = np.concatenate(
            [
                slots[:keep],
                end + np.arange(len(rest.tokens), dtype=np.int32),
                first_new + np.arange(len(new) - 1, dtype=np.int32),
            ]
        )
        self._cache = run.state.cache

    def _without(self, keep: int) -> KVCache | None:
        """The cache, having forgotten what was fed from slot `keep` of the conversation on."""
        if self._cache is None:
            return None
        segments = self._cache.segments.at[:, jnp.asarray(self._slots[keep:])].set(0)
        return self._cache.replace(segments=segments)


def _common_prefix(fed: Spliced, wanted: Spliced) -> int:
    """Slots that agree from the start; at least one of `wanted` is left to feed."""
    length = min(len(fed.tokens), len(wanted.tokens) - 1)
    differs = (fed.tokens[:length] != wanted.tokens[:length]) | (
        fed.media_index[:length] != wanted.media_index[:length]
    )
    return int(np.argmax(differs)) if differs.any() else length
