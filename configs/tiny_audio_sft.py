"""`audio_sft` in miniature: audio tower and connector train, on questions about Toybox's sounds."""

import fiddle as fdl

from vllama2_jax.configs import tiny
from vllama2_jax.configs.base import train_only
from vllama2_jax.train.config import TrainConfig


def tiny_audio_sft() -> fdl.Config[TrainConfig]:
    """`tiny` behind `tiny_audio_pretrain`."""
    config = tiny.tiny("tiny_audio_sft")
    config.start.model = tiny.HEARD
    config.rules = train_only("audio/.*", "audio_connector/.*")
    config.data.sources = (tiny.toybox("sounds", 6000, "clips", media="audio", told=0.4),)
    tiny.row_length(config, 136)
    config.validation.sources = (
        tiny.toybox("heldout", 250, "questions", media="audio", split="heldout"),
    )
    config.validation.accuracy = True
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_ratio = 0.04
    return config
