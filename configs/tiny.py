"""What the miniatures of the recipe share: Toybox, `tiny`, and ways of training narrow networks.

They follow the schooling (`python -m vllama2_jax.train.schooling`), which stands for trained towers
and a trained language model. docs/tiny.md tells the whole.
"""

import fiddle as fdl

from vllama2_jax.configs import base
from vllama2_jax.train.config import ToyboxConfig, TrainConfig

# What each step begins with: the schooling, or the step before it.
START, PRETRAINED = "runs/tiny_start", "runs/tiny_video_pretrain"
EARS, HEARD, HEARS = "runs/tiny_ears", "runs/tiny_audio_pretrain", "runs/tiny_audio_sft"


def tiny(name: str) -> fdl.Config[TrainConfig]:
    """A run of `tiny` without data, rules and learning rate."""
    config = base.base(name)
    config.start.narrow = True
    config.data.square_pad = False  # Toybox's frames are squares
    config.data.max_tokens = 512
    config.data.packing = True
    config.data.workers = 0
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0
    config.rows = 24
    config.dtype = "float32"
    config.remat = "none"
    return config


def row_length(config: fdl.Config[TrainConfig], slots: int) -> None:
    """Rows of one length."""
    config.data.max_length, config.data.buckets = slots, (slots,)


def toybox(name: str, records: int, kind: str, **how) -> fdl.Config[ToyboxConfig]:
    """Records of Toybox, each read once in an epoch."""
    return fdl.Config(ToyboxConfig, name, records, kind, **how)
