"""Toybox's own SentencePiece tokenizer: its words, some everyday English, and bytes."""

import io
from pathlib import Path

import numpy as np
import sentencepiece

from vllama2_jax.data.toybox.families import FAMILIES, sample_scene
from vllama2_jax.data.toybox.questions import ask_about, describe

VOCAB_SIZE = 640  # that of the zoo's `tiny`
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# In front, so that their ids (0 is the unknown piece) are 1, 2, 3, 4 whatever the rest is.
_SYMBOLS = (END_OF_TEXT, TURN_START, TURN_END, "\n")
_SCENES = 4000

# What stands in every prompt is worth a piece of its own.
_TEMPLATE = ["system", "user", "assistant", "You are a helpful assistant."] * 1000
_ASCII = ["".join(map(chr, range(33, 127)))] * 20
_ENGLISH = """You are a helpful assistant.
Hello! Please tell me what you can see in this video. Describe the image and say what happens.
Is there a person, a man, a woman, a child, a dog, a cat, a car, a ball, a house or a tree?
Yes, there is. No, there are not any. I do not know that, but this is where it was before.
When does it start, and why? Who has been here, and how long will they stay with us?
Can we see more than one of them at the same time? Is it larger or smaller, fast or slow?
The first, the second, the third and the last frame; the beginning, the middle and the end.
On the top, at the bottom, to the left of, to the right of, above, below, between, behind, near.
It moves, goes, comes, turns, stops, appears, disappears, falls, jumps, rolls and runs away.
Thank you, that is good. What about the other side? Which of these answers would be best?"""


def train_tokenizer(path: str | Path) -> None:
    """Write the tokenizer's `.model` file; the same bytes every time.

    BPE over Toybox's questions, answers and descriptions of training scenes. White space is kept as
    it is, and a line break is a piece of its own, as chat templates need it.
    """
    rng = np.random.default_rng(0)
    lines = _TEMPLATE + _ASCII + _ENGLISH.splitlines() * 20
    for number in range(_SCENES):
        scene = sample_scene(rng, "train", FAMILIES[number % len(FAMILIES)])
        lines.append(describe(scene))
        for question in ask_about(scene, rng):
            lines += [question.text, question.answer]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=list(_SYMBOLS),
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())
