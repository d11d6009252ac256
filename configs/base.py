"""What the five steps of the recipe share.

The paper gives data, models and what trains; learning rates, batches, epochs and precision are
those of the released scripts, its only source for them: AdamW without decay, cosine with 3 % of
warm-up, bfloat16, ids cut at 2,048.
"""

import fiddle as fdl

from vllama2_jax.data.paper_mixtures import PaperMixture
from vllama2_jax.parallel.mesh import MeshConfig
from vllama2_jax.train.config import (
    DataConfig,
    SaveConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
    ValidationConfig,
)
from vllama2_jax.train.loss import LossConfig
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.trainable import Rule

DATA_ROOT = "data"


def base(name: str) -> fdl.Config[TrainConfig]:
    """A run without data, rules and learning rate."""
    return fdl.Config(
        TrainConfig,
        name=name,
        start=fdl.Config(StartConfig),
        data=fdl.Config(DataConfig, sources=()),
        optimizer=fdl.Config(OptimizerConfig),
        loss=fdl.Config(LossConfig),
        remat="full",
        validation=fdl.Config(ValidationConfig),
        save=fdl.Config(SaveConfig),
        mesh=fdl.Config(MeshConfig),
    )


def train_only(*patterns: str) -> tuple[fdl.Config[Rule], ...]:
    """Rules that train the parameters of these patterns and freeze all others."""
    return (
        *(fdl.Config(Rule, pattern, "train") for pattern in patterns),
        fdl.Config(Rule, ".*", "freeze"),
    )


def source(name: str, folder: str, samples: int | None = None) -> fdl.Config[SourceConfig]:
    """A file of records with its media beside it; `samples` of it make an epoch, or all."""
    return fdl.Config(
        SourceConfig, name, f"{DATA_ROOT}/{folder}/{name}.json", media_root=DATA_ROOT, share=samples
    )


def paper_sources(mixture: PaperMixture, folder: str) -> tuple[fdl.Config[SourceConfig], ...]:
    """One source per row of a table.

    Rows that the paper counts together are one file: what of each dataset is in it is not known.
    """
    return tuple(source(row.name, folder, row.used) for row in mixture.rows)
