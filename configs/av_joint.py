"""Stage 3: audio-video joint training (paper, section 3.3 and Table 4).

Both projectors and the language model train; both towers stay frozen. Of four samples two are
audio-video, one audio, one video.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, source, train_only
from vllama2_jax.data.paper_mixtures import AV_JOINT
from vllama2_jax.train.config import TrainConfig


def av_joint() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2.1-7B-AV, behind the two audio steps."""
    config = base("av_joint")
    config.start.model = "runs/audio_sft"
    config.rules = train_only("connector/.*", "audio_connector/.*", "decoder/.*")
    # No shares: an epoch reads the first source once, the others as the turns ask.
    config.data.sources = (
        source(AV_JOINT.rows[0].name, "av_joint"),
        source("audio", "av_joint"),
        source("video", "av_joint"),
    )
    config.data.mix = "joint"
    config.optimizer.learning_rate = 2e-5
    config.rows = 128
    config.epochs = 2
    return config


def released_scripts(config: fdl.Config[TrainConfig]) -> None:
    """As scripts/custom/va_joint.sh has it: BEATs trains, too, and lists are shuffled once."""
    config.rules = train_only("connector/.*", "audio_connector/.*", "decoder/.*", "audio/.*")
    config.data.shuffled_once = True
