"""Stage 2, step 2: audio instruction tuning (paper, section 3.3 and Table 4).

Audio tower and audio projector train; the language model stays frozen. Paper and scripts agree.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, paper_sources, train_only
from vllama2_jax.data.paper_mixtures import AUDIO_SFT
from vllama2_jax.train.config import TrainConfig


def audio_sft() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2.1-7B-AV on Table 4's ten datasets."""
    config = base("audio_sft")
    config.start.model = "runs/audio_pretrain"
    config.rules = train_only("audio/.*", "audio_connector/.*")
    config.data.sources = paper_sources(AUDIO_SFT, "audio_sft")
    config.optimizer.learning_rate = 2e-5
    config.rows = 128
    config.epochs = 2
    return config
