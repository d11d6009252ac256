"""Changes that suit every recipe: `--config=fiddler:NAME` or `--config=fiddler:NAME(argument)`."""

import fiddle as fdl

from vllama2_jax.train.config import SourceConfig, TrainConfig
from vllama2_jax.train.trainable import Rule

# All linear layers of the language model but lm_head, as the original's `find_all_linear_names`.
LINEAR_LAYERS = r"decoder/layers/(attention/\w+|mlp/\w+|moe/router)/kernel|decoder/layers/moe/\w+"

_CONNECTORS = ("connector/.*", "audio_connector/.*")


def data_root(config: fdl.Config[TrainConfig], root: str) -> None:
    """Read the recipe's files under another folder than `data`, local or gs://."""
    for source in config.data.sources:
        if fdl.get_callable(source) is not SourceConfig:
            raise ValueError(f"{source.name} is made in memory, not read from a folder")
        source.file = f"{root}/{source.file.split('/', 1)[1]}"
        source.media_root = root


def packed(config: fdl.Config[TrainConfig], max_clips: int = 1) -> None:
    """Several records share a row, as far as they fit: less padding, other batches."""
    config.data.packing = True
    config.data.max_clips = max_clips


def lora(config: fdl.Config[TrainConfig], rank: int = 128, alpha: float | None = None) -> None:
    """Adapters on the language model and whole connectors, as scripts/custom/finetune_lora.sh.

    The connectors are those that the recipe trains, or that of pictures. `alpha` is twice the rank
    unless given (the script: 128 and 256). Its dropout of 0.05 is left out, see
    docs/decisions/lora.md.
    """
    alpha = 2 * rank if alpha is None else alpha
    connectors = [
        rule.pattern
        for rule in config.rules
        if rule.action == "train" and rule.pattern in _CONNECTORS
    ]
    config.rules = (
        *(fdl.Config(Rule, pattern, "train") for pattern in connectors or _CONNECTORS[:1]),
        fdl.Config(Rule, LINEAR_LAYERS, "lora", rank=rank, alpha=alpha),
        fdl.Config(Rule, ".*", "freeze"),
    )


def qlora(
    config: fdl.Config[TrainConfig], rank: int = 128, alpha: float | None = None, kind: str = "nf4"
) -> None:
    """`lora` over kernels stored in 4 bits (or "int8"), as scripts/custom/finetune_qlora.sh."""
    lora(config, rank, alpha)
    config.rules[-2].quantize = kind
