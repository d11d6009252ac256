"""`video_pretrain` in miniature: the connector alone trains, on captions of Toybox's clips."""

import fiddle as fdl

from vllama2_jax.configs import tiny
from vllama2_jax.configs.base import train_only
from vllama2_jax.train.config import TrainConfig


def tiny_video_pretrain() -> fdl.Config[TrainConfig]:
    """`tiny` between its schooling and `tiny_video_sft`."""
    config = tiny.tiny("tiny_video_pretrain")
    config.start.model = tiny.START
    config.rules = train_only("connector/.*")
    config.data.sources = (tiny.toybox("captions", 3600, "captions"),)
    config.data.style = "plain"
    tiny.row_length(config, 96)
    config.validation.sources = (tiny.toybox("heldout", 240, "captions", split="heldout"),)
    # The connector comes taught: 150 steps at the recipe's 1e-3 undo what it tells of directions.
    config.optimizer.learning_rate = 1e-4
    return config
