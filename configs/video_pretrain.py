"""Stage 1, step 1: video-language pre-training (paper, section 3.1 and Table 2).

Only the connector trains, on captions, between a tower and a language model that come trained.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, paper_sources, source, train_only
from vllama2_jax.data.paper_mixtures import VIDEO_PRETRAIN
from vllama2_jax.train.config import TrainConfig


def video_pretrain() -> fdl.Config[TrainConfig]:
    """VideoLLaMA2-7B on the paper's mixture."""
    config = base("video_pretrain")
    config.start.model = "2-7B"
    config.start.vision = "openai/clip-vit-large-patch14-336"
    config.start.decoder = "mistralai/Mistral-7B-Instruct-v0.2"
    config.start.connector = "random"
    config.rules = train_only("connector/.*")
    config.data.sources = paper_sources(VIDEO_PRETRAIN, "video_pretrain")
    config.data.style = "plain"
    config.data.square_pad = True  # section 3.1; the scripts do not pad in this step
    config.optimizer.learning_rate = 1e-3
    config.rows = 256
    config.epochs = 1
    return config


def released_scripts(config: fdl.Config[TrainConfig]) -> None:
    """As scripts/vllava/pretrain.sh has it: VideoLLaMA2.1, 16 frames, its data, no padding."""
    config.start.model = "2.1-7B-16F"
    config.start.vision = "google/siglip-so400m-patch14-384"
    config.start.decoder = "Qwen/Qwen2-7B-Instruct"
    config.data.square_pad = False
    quick_start(config)


def quick_start(config: fdl.Config[TrainConfig]) -> None:
    """The original's quick-start data: Valley's 703K videos and LLaVA's 558K images."""
    config.data.sources = (
        source("valley", "videollava_pt", 703_000),
        source("llava_image", "videollava_pt", 558_000),
    )
