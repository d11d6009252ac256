"""Stage 2, step 1: audio-language pre-training (paper, section 3.3 and Table 4).

Only the audio projector trains, on captions of sounds. It runs as soon as the audio branch does.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, paper_sources, train_only
from vllama2_jax.data.paper_mixtures import AUDIO_PRETRAIN
from vllama2_jax.train.config import TrainConfig


def audio_pretrain() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2.1-7B-AV on WavCaps."""
    config = base("audio_pretrain")
    config.start.model = "2.1-7B-16F"  # the audio tower, BEATs, comes with the audio branch
    config.rules = train_only("audio_connector/.*")
    config.data.sources = paper_sources(AUDIO_PRETRAIN, "audio_pretrain")
    config.data.style = "audio_plain"
    config.optimizer.learning_rate = 1e-3
    config.rows = 1024
    config.epochs = 1
    return config
