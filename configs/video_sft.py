"""Stage 1, step 2: multi-task fine-tuning (paper, section 3.2 and Table 3).

Connector and language model train on conversations; the tower stays frozen.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, paper_sources, source, train_only
from vllama2_jax.data.paper_mixtures import VIDEO_SFT
from vllama2_jax.train.config import TrainConfig


def video_sft() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2-7B on the paper's mixture, behind the released pre-training.

    `--model RUN` begins with a run of `video_pretrain` instead.
    """
    config = base("video_sft")
    config.start.model = "2-7B-Base"
    config.rules = train_only("connector/.*", "decoder/.*")
    config.data.sources = paper_sources(VIDEO_SFT, "video_sft")
    config.optimizer.learning_rate = 2e-5
    config.rows = 128
    config.epochs = 1
    return config


def released_scripts(config: fdl.Config[TrainConfig]) -> None:
    """As scripts/vllava/finetune.sh has it: VideoLLaMA2.1, 16 frames, its data."""
    config.start.model = "2.1-7B-16F-Base"
    quick_start(config)


def quick_start(config: fdl.Config[TrainConfig]) -> None:
    """The original's quick-start data: VideoChatGPT's 100K, LLaVA's 625K images and 40K texts."""
    config.data.sources = (
        source("videochatgpt", "videollava_sft", 100_000),
        source("llava_image", "videollava_sft", 625_000),
        source("llava_text", "videollava_sft", 40_000),
    )
