"""The language model of Mixtral 8x7B alone, for a comparison with MaxText.

Neither tower nor connector, and weights and moments in bfloat16, as nobody should train.
"""

import fiddle as fdl

from vllama2_jax.configs.base import base, train_only
from vllama2_jax.train.config import TrainConfig


def decoder_only() -> fdl.Config[TrainConfig]:
    """128 rows of 2,048 slots, every layer computed again."""
    config = base("decoder_only")
    config.start.model = "2-8x7B"
    config.rules = train_only("decoder/.*")
    config.data.max_length = 2048
    config.optimizer.learning_rate = 2e-5
    config.masters = "bfloat16"
    config.rows = 128
    config.steps, config.epochs = 100, None
    return config
