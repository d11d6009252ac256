"""The model as its users know it: media and words in, words out."""

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.infer.generate import Decoding, Generator, Request
from vllama2_jax.infer.media import EncodedMedia, encode_media
from vllama2_jax.infer.programs import Programs
from vllama2_jax.infer.sampling import Sampling
from vllama2_jax.infer.session import Session
from vllama2_jax.media import Limits
from vllama2_jax.models.axes import Layout
from vllama2_jax.text import (
    Spliced,
    choose_template,
    expand,
    inference_messages,
    render,
    tokenize,
)

# The original's `mm_infer`: greedy unless asked, then top-p 0.9; 2,048 new tokens at most.
_TOP_P = 0.9
_MAX_NEW_TOKENS = 2048
_BATCH_ROWS = 8


class Model:
    """VideoLLaMA 2 with its parameters, tokenizer and reading rules; made by `vllama2_jax.load`."""

    def __init__(
        self,
        params,
        card: ModelCard,
        tokenizer,
        dtype,
        split_experts: bool = False,
        layout: Layout | None = None,
    ):
        """Put the parts together.

        Args:
          params: nested dict of arrays, decoder layers apart (`unstack_layers`).
          card: the shapes and rules.
          tokenizer: of `text/tokenizer.py`.
          dtype: of activations.
          split_experts: the form of the experts' parameters (see `models/stacking.py`).
          layout: how the parameters lie on several devices; None is one.
        """
        self.card, self.tokenizer = card, tokenizer
        #: Bounds of every read of media; raise them here when an error says so.
        self.limits = Limits()
        self.template = card.template or choose_template(card.config.decoder.family, tokenizer)
        devices = () if layout else list(jax.tree.leaves(params)[0].devices())
        programs = Programs(card.config, dtype, split_experts, layout, devices)
        self.generator = Generator(programs, params)

    @property
    def config(self):
        """The network's shapes (`VLlama2Config`)."""
        return self.card.config

    # What people ask.

    def ask(
        self,
        media,
        question: str,
        modality: str = "auto",
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = _TOP_P,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> str:
        """Answer a question about a video, an image, sound, or nothing but the question itself.

        Args:
          media: a path (video, image, sound, folder of frames), an image (PIL or uint8 [H, W, 3]),
            frames (uint8 [T, H, W, 3], or a list of images or paths; used as given), or None.
          question: what to ask.
          modality: "auto", or "video" / "image" / "audio" / "av" (pictures and sound) / "text" to
            insist. A model that hears takes videos with their sound.
          start, end: seconds of the clip.
          num_frames: how many to look at; the checkpoint's own number by default.
          max_new_tokens: at most so many (2,048 by default).
          temperature: 0 is greedy.
          top_p, top_k: filters of sampling; by default 0.9, which the original passes whatever the
            checkpoint says, and the checkpoint's own k.
          repetition_penalty: the checkpoint's own by default.
          seed: of sampling, and of the stretch that is heard of sound longer than the model takes,
            where the preset chooses it at random.

        Returns:
          the answer, without special tokens and surrounding space.

        Raises:
          MediaError: if the media cannot be read, saying why and what to do.
          ValueError: for options that make no sense.
        """
        run = self._ask(
            self.read_media(media, modality, start, end, num_frames, seed),
            question,
            max_new_tokens,
            self.sampling(temperature, top_p, top_k, repetition_penalty, seed),
        )
        return "".join(run.text(self.tokenizer, step=None)).strip()

    def stream(
        self,
        media,
        question: str,
        modality: str = "auto",
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = _TOP_P,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """`ask`, piece by piece; the pieces joined and stripped are its answer.

        Media are read, and bad input is refused, before this returns.
        """
        run = self._ask(
            self.read_media(media, modality, start, end, num_frames, seed),
            question,
            max_new_tokens,
            self.sampling(temperature, top_p, top_k, repetition_penalty, seed),
        )
        return run.text(self.tokenizer)

    def ask_batch(
        self, pairs: Sequence[tuple], *, max_new_tokens=None, progress=None, **options
    ) -> list[str]:
        """Answer many (media, question) pairs; equal to asking them one by one.

        Pairs are generated eight at a time; files that occur again are read once, and held until
        their last question. The first file that cannot be read ends the call.

        Args:
          pairs: [(media, question), ...].
          max_new_tokens: as in `ask`; the other options too.
          progress: called with (answers done, answers in all).
        """
        media_options, sampling_options = _split(options)
        sampling, limit = self.sampling(**sampling_options), self.max_new_tokens(max_new_tokens)
        keys = [_path_key(media) for media, _ in pairs]
        last_use = {key: number for number, key in enumerate(keys)}
        known: dict[str, EncodedMedia] = {}
        answers: list[str] = []
        for first in range(0, len(pairs), _BATCH_ROWS):
            requests = []
            for number in range(first, min(first + _BATCH_ROWS, len(pairs))):
                (media, question), key = pairs[number], keys[number]
                encoded = known.pop(key, None) or self.read_media(media, **media_options)
                if key is not None and last_use[key] > number:
                    known[key] = encoded
                requests.append(self._request(encoded, question))
            asked = len(requests)
            if first:  # a last batch of fewer rows would be another program
                requests += [requests[-1]] * (_BATCH_ROWS - asked)
            run = self.generator.begin(requests, sampling, self.card.generation.stop_ids, limit)
            run.advance()
            answers += [self.tokenizer.decode(ids).strip() for ids in run.tokens()[:asked]]
            if progress:
                progress(len(answers), len(pairs))
        return answers

    def session(self, media, **media_options) -> Session:
        """Open a conversation that keeps its cache between turns."""
        return Session(self, media, **media_options)

    # What tests and benchmarks measure.

    def generate(
        self, media, messages, max_new_tokens: int | None = None, stop: bool = True, **options
    ) -> list[int]:
        """New ids behind exactly these messages (see `logits`), the stop id included.

        Args:
          media: as in `ask`.
          messages: [{"role", "content"}, ...].
          max_new_tokens: at most so many.
          stop: False ignores stop ids.
          **options: of `ask`.
        """
        media_options, sampling = _split(options)
        encoded = self.read_media(media, **media_options)
        run = self.generator.begin(
            [Request(self.splice(_place_media(messages, encoded), encoded), encoded.tokens)],
            self.sampling(**sampling),
            self.card.generation.stop_ids if stop else (),
            self.max_new_tokens(max_new_tokens),
        )
        run.advance()
        return run.tokens()[0]

    def logits(self, media, messages, **media_options) -> np.ndarray:
        """float32 [L, vocab] of the whole spliced prompt, generation cue included.

        The messages are rendered as they are with the checkpoint's template, the media placeholder
        and a newline in front of the first user turn; no system turn is added.
        """
        encoded = self.read_media(media, **media_options)
        spliced = self.splice(_place_media(messages, encoded), encoded)
        return self.generator.logits(Request(spliced, encoded.tokens))

    def encode(self, media, **media_options) -> np.ndarray:
        """float32 [media_tokens, width]: what the decoder sees of the media."""
        tokens = self.read_media(media, **media_options).tokens
        if tokens is None:
            raise ValueError("there is no media to encode; give a video, an image or sound")
        return np.asarray(tokens, np.float32)

    # The steps in between.

    def read_media(
        self, media, modality="auto", start=None, end=None, num_frames=None, seed=0
    ) -> EncodedMedia:
        """Decode media and run towers and connectors; arguments as in `ask`."""
        return encode_media(
            self.generator,
            self.card,
            self.limits,
            media,
            modality,
            start,
            end,
            num_frames,
            seed,
        )

    def inference_messages(self, messages, media: EncodedMedia):
        """What the original's inference sends for a conversation."""
        return inference_messages(self.config.decoder.family, messages, media.placeholder)

    def splice(self, messages, media: EncodedMedia) -> Spliced:
        """Render, tokenize, and give the media their slots."""
        text = render(messages, self.template, add_generation_prompt=True)
        slots = [] if media.tokens is None else [len(media.tokens)]
        return expand(tokenize(text, self.tokenizer), slots)

    def sampling(
        self,
        temperature: float = 0.0,
        top_p: float = _TOP_P,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> Sampling:
        """Fill what the caller left open from the checkpoint's own defaults."""
        defaults = self.card.generation
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=defaults.top_k if top_k is None else top_k,
            repetition_penalty=(
                defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
            ),
            seed=seed,
        )

    def max_new_tokens(self, asked: int | None) -> int:
        """The caller's limit, or the original's.

        Raises:
          ValueError: below 1.
        """
        if asked is not None and asked < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {asked}")
        return _MAX_NEW_TOKENS if asked is None else asked

    def _request(self, media: EncodedMedia, question: str) -> Request:
        messages = self.inference_messages([{"role": "user", "content": question}], media)
        return Request(self.splice(messages, media), media.tokens)

    def _ask(self, media: EncodedMedia, question: str, limit, sampling: Sampling) -> Decoding:
        return self.generator.begin(
            [self._request(media, question)],
            sampling,
            self.card.generation.stop_ids,
            self.max_new_tokens(limit),
        )


def _place_media(messages, media: EncodedMedia):
    """The placeholder and a newline in front of the first user turn; nothing else is touched."""
    if media.tokens is None:
        return list(messages)
    placed, done = [], False
    for message in messages:
        if message["role"] == "user" and not done:
            message = {**message, "content": f"<{media.placeholder}>\n{message['content']}"}
            done = True
        placed.append(message)
    if not done:
        raise ValueError("media needs a user turn to stand in; the messages have none")
    return placed


def _path_key(media) -> str | None:
    """What tells files apart; None for media in memory."""
    return str(media) if isinstance(media, str | os.PathLike) else None


def _split(options: dict) -> tuple[dict, dict]:
    """Options of media from those of sampling."""
    names = ("modality", "start", "end", "num_frames")
    # A seed is of both: of the stretch that is heard, and of what is drawn.
    media = {name: value for name, value in options.items() if name in (*names, "seed")}
    return media, {name: value for name, value in options.items() if name not in names}
