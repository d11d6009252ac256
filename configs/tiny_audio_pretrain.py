"""`audio_pretrain` in miniature: the audio connector alone trains, on captions of sounds."""

import fiddle as fdl

from vllama2_jax.configs import tiny
from vllama2_jax.configs.base import train_only
from vllama2_jax.train.config import TrainConfig


def tiny_audio_pretrain() -> fdl.Config[TrainConfig]:
    """`tiny` with ears, between its schooling in hearing and `tiny_audio_sft`."""
    config = tiny.tiny("tiny_audio_pretrain")
    config.start.model = tiny.EARS
    config.rules = train_only("audio_connector/.*")
    config.data.sources = (tiny.toybox("captions", 3600, "captions", media="audio"),)
    config.data.style = "audio_plain"
    tiny.row_length(config, 128)
    config.validation.sources = (
        tiny.toybox("heldout", 240, "captions", media="audio", split="heldout"),
    )
    config.optimizer.learning_rate = 1e-3
    return config
