"""`av_joint` in miniature: both connectors and the decoder train, on pictures, sound and both.

Of four clips two are about a video with its sound, one about sound, one about a video. Some of the
first are asked about with their pictures or their sound alone, and bare questions stand beside all,
so that the model has met what it can only guess at (see `tiny_video_sft`).
"""

import fiddle as fdl

from vllama2_jax.configs import tiny
from vllama2_jax.configs.base import train_only
from vllama2_jax.train.config import TrainConfig


def tiny_av_joint() -> fdl.Config[TrainConfig]:
    """`tiny` behind `tiny_audio_sft`."""
    config = tiny.tiny("tiny_av_joint")
    config.start.model = tiny.HEARS
    config.rules = train_only("connector/.*", "audio_connector/.*", "decoder/.*")
    config.data.sources = (
        tiny.toybox("av", 16_000, "clips", media="av", told=0.3, withheld=0.3),
        tiny.toybox("audio", 8_000, "clips", media="audio", told=0.3),
        tiny.toybox("video", 8_000, "clips", told=0.3),
        tiny.toybox("bare", 12_000, "bare", media="all"),
    )
    tiny.row_length(config, 264)
    config.validation.sources = tuple(
        tiny.toybox(media, records, "questions", media=media, split="heldout")
        for media, records in (("video", 256), ("audio", 200), ("av", 128))
    )
    config.validation.accuracy = True
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_ratio = 0.02
    return config
