"""Stage 2, step 1: audio-language pre-training (paper, section 3.3 and Table 4).

Only the audio projector trains, on captions of sounds. The paper calls it a linear layer, the
released model has two; the default is what was released, `linear_projector` what was written.
"""

import fiddle as fdl

from vllama2_jax.configs.base import DATA_ROOT, base, paper_sources, train_only
from vllama2_jax.data.paper_mixtures import AUDIO_PRETRAIN
from vllama2_jax.train.config import RANDOM, TrainConfig


def audio_pretrain() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2.1-7B-AV on WavCaps."""
    config = base("audio_pretrain")
    config.start.model = "2.1-7B-16F"
    config.start.hearing = "2.1-7B-AV"
    config.start.audio = f"{DATA_ROOT}/BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"
    config.start.audio_connector = RANDOM
    config.rules = train_only("audio_connector/.*")
    config.data.sources = paper_sources(AUDIO_PRETRAIN, "audio_pretrain")
    config.data.style = "audio_plain"
    config.optimizer.learning_rate = 1e-3
    config.rows = 1024
    config.epochs = 1
    return config


def linear_projector(config: fdl.Config[TrainConfig]) -> None:
    """The audio projector of the paper's text: one linear layer."""
    config.start.audio_connector_kind = "linear"
