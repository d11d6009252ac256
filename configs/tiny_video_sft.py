"""`video_sft` in miniature: connector and decoder train, on conversations about Toybox's clips.

Some clips are told in words, not asked about: a sentence names all that a clip shows, an answer one
thing of it. Bare questions stand beside a third of the clips. Without them the decoder forgets to
name one of the two things when it sees neither; beside every clip they teach it to guess at orders
that it could see (docs/results/tiny.md).
"""

import fiddle as fdl

from vllama2_jax.configs import tiny
from vllama2_jax.configs.base import train_only
from vllama2_jax.train.config import TrainConfig


def tiny_video_sft() -> fdl.Config[TrainConfig]:
    """`tiny` behind `tiny_video_pretrain`."""
    config = tiny.tiny("tiny_video_sft")
    config.start.model = tiny.PRETRAINED
    config.rules = train_only("connector/.*", "decoder/.*")
    config.data.sources = (
        tiny.toybox("clips", 27_000, "clips", told=0.4),
        tiny.toybox("bare", 9_000, "bare"),
    )
    tiny.row_length(config, 148)  # all that is asked of a clip, or less with a bare question
    config.validation.sources = (tiny.toybox("heldout", 224, "questions", split="heldout"),)
    config.validation.accuracy = True
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_ratio = 0.02
    return config
