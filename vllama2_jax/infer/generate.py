"""Drive the compiled programs: batch the prompts, make room, run, read the tokens back."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.infer.buckets import bucket
from vllama2_jax.infer.programs import Generation, Programs, Prompt
from vllama2_jax.infer.sampling import Sampler, Sampling
from vllama2_jax.models.cache import KVCache
from vllama2_jax.text import Spliced, StreamDecoder, Tokenizer

# Room for new tokens is made in steps: most answers are short, and every slot costs attention. The
# first is the same for every request, so that a prompt's bucket alone decides which programs run.
_FIRST_ROOM = 256
# Ids that end an answer have so many slots at least, so that other ids are not other programs.
STOP_SLOTS = 4
# Tokens between two looks of a stream: few enough to read along, enough to hide the round trip.
STREAM_STEP = 4


def room_for(new_tokens: int) -> int:
    """Slots that a cache has behind a prompt when so many tokens have been generated.

    While it grows, the one before is there too.
    """
    room = _FIRST_ROOM
    while room < new_tokens:
        room *= 2
    return room


@dataclasses.dataclass(frozen=True)
class Request:
    """One row to generate from.

    Attributes:
      spliced: its slots.
      media: [tokens, W] of the connector, or None for text alone.
    """

    spliced: Spliced
    media: jax.Array | None = None


class Decoding:
    """Rows being generated: the device's state and what the host knows of it."""

    def __init__(self, generator: "Generator", state: Generation, sampler, stop_ids, max_new: int):
        """Wrap the state behind a prefill; see `Generator.begin`."""
        self._generator, self._sampler, self._stop_ids = generator, sampler, stop_ids
        self.max_new = max_new
        self._enter(state)

    @property
    def finished(self) -> bool:
        """Whether every row has stopped or is full."""
        return self.count >= self.max_new or bool(self._done.all())

    def advance(self, steps: int | None = None) -> None:
        """Generate `steps` more tokens, or all that are left."""
        target = self.max_new if steps is None else min(self.count + steps, self.max_new)
        while self.count < target and not self.finished:
            room = self.state.tokens.shape[1]
            if self.count >= room:
                room *= 2
                self._make_room(room)
            self._enter(
                self._generator.decode(self.state, self._sampler, self._stop_ids, min(target, room))
            )

    def tokens(self) -> list[list[int]]:
        """The new ids of each row so far, its stop id included."""
        return [
            row[:length].tolist() for row, length in zip(self._tokens, self._lengths, strict=True)
        ]

    def stream(self, step: int | None = STREAM_STEP) -> Iterator[list[int]]:
        """Yield the newest ids of a single row, `step` at a time (None: all in one)."""
        shown = 0
        while True:
            (row,) = self.tokens()
            yield row[shown:]
            shown = len(row)
            if self.finished:
                return
            self.advance(step)

    def text(self, tokenizer: Tokenizer, step: int | None = STREAM_STEP) -> Iterator[str]:
        """Yield the text of a single row in pieces; `step` as in `stream`."""
        decoder = StreamDecoder(tokenizer)
        for ids in self.stream(step):
            for token in ids:
                if piece := decoder.push(token):
                    yield piece
        if piece := decoder.flush():
            yield piece

    def _enter(self, state: Generation) -> None:
        """Take a new state over, and what the host needs of it in one transfer."""
        self.state = state
        # Copies: the state's own buffers are given to the next call of the decode loop.
        count, self._done, self._lengths, self._tokens = map(
            np.array, jax.device_get((state.count, state.done, state.lengths, state.tokens))
        )
        self.count = int(count)

    def _make_room(self, room: int) -> None:
        more = room - self.state.tokens.shape[1]
        self.state = self.state.replace(
            tokens=jnp.pad(self.state.tokens, ((0, 0), (0, more))),
            cache=self.state.cache.grow(more),
        )


class Generator:
    """A network, its parameters and the programs that run it."""

    def __init__(self, programs: Programs, params):
        """Bind parameters (decoder layers unstacked) to compiled programs."""
        self.programs, self.params = programs, params

    def begin(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_ids: Sequence[int],
        max_new: int,
        cache: KVCache | None = None,
        start: int = 0,
    ) -> Decoding:
        """Prefill the rows and choose each one's first token.

        Args:
          requests: the rows; unequal lengths give the same numbers as one by one.
          sampling: how to choose.
          stop_ids: ids that end a row; empty for none.
          max_new: tokens per row at most, at least 1.
          cache: of one row, to go on behind; its first `start` positions are the conversation so
            far, and `requests` holds the rest.
          start: the rotary position of the first new slot.
        """
        prompt, media = pack(requests, self.programs.config.decoder.width, start)
        self._warn_beyond_training(start + max(len(r.spliced.tokens) for r in requests))
        length, room = prompt.tokens.shape[1], _FIRST_ROOM
        if cache is None:
            cache = self.programs.new_cache(len(requests), length + room)
        else:
            short = int(cache.end) + length + room - cache.capacity
            if short > 0:
                cache = cache.grow(bucket(cache.capacity + short) - cache.capacity)
        logits, cache = self.programs.prefill(self.params, prompt, media, cache)
        positions = jnp.asarray([start + len(r.spliced.tokens) for r in requests], jnp.int32)
        keys = jnp.repeat(jax.random.key(sampling.seed)[None], len(requests))
        sampler = Sampler.create(sampling)
        stops = jnp.full((max(STOP_SLOTS, len(stop_ids)),), -1, jnp.int32)
        if stop_ids:
            stops = stops.at[: len(stop_ids)].set(jnp.asarray(stop_ids, jnp.int32))
        state = self.programs.start(logits, cache, positions, keys, sampler, stops, room=room)
        return Decoding(self, state, sampler, stops, max_new)

    def _warn_beyond_training(self, length: int) -> None:
        limit = self.programs.config.decoder.max_positions
        if length > limit:
            warnings.warn(
                f"a prompt of {length} tokens is longer than the {limit} that the model was made "
                "for; its answer may be poor (ask about fewer frames, or a shorter conversation)",
                stacklevel=3,
            )

    def decode(self, state, sampler, stop_ids, until: int) -> Generation:
        """Run the decode loop up to `until` tokens per row."""
        return self.programs.decode(self.params, state, sampler, stop_ids, jnp.int32(until))

    def logits(self, request: Request) -> np.ndarray:
        """float32 [L, V] of one row's slots."""
        prompt, media = pack([request], self.programs.config.decoder.width)
        logits = self.programs.logits(self.params, prompt, media)
        return np.asarray(logits[0, : len(request.spliced.tokens)])


def pack(
    requests: Sequence[Request], width: int, start: int = 0
) -> tuple[Prompt, jax.Array | None]:
    """Rows of unequal length as one bucket, padded on the right.

    Returns:
      the prompt, int32 [B, L], and media [B, M, width] (None if no row has any).
    """
    length = bucket(max(len(r.spliced.tokens) for r in requests))

    def rows(values, fill):
        table = np.full((len(requests), length), fill, np.int32)
        for row, value in zip(table, values, strict=True):
            row[: len(value)] = value
        return jnp.asarray(table)

    lengths = [len(r.spliced.tokens) for r in requests]
    prompt = Prompt(
        tokens=rows([r.spliced.tokens for r in requests], 0),
        positions=rows([start + np.arange(n) for n in lengths], 0),
        segment_ids=rows([np.ones(n) for n in lengths], 0),
        media_index=rows([r.spliced.media_index for r in requests], -1),
    )
    tokens = [r.media for r in requests if r.media is not None]
    if not tokens:
        return prompt, None
    most = max(len(t) for t in tokens)
    empty = jnp.zeros((most, width), tokens[0].dtype)
    padded = [
        empty if r.media is None else jnp.pad(r.media, ((0, most - len(r.media)), (0, 0)))
        for r in requests
    ]
    return prompt, jnp.stack(padded)
