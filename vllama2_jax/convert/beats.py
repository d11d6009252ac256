"""BEATs' own files: `{"cfg": settings, "model": tensors}`, and the original's `audio_tower.bin`."""

from pathlib import Path

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.convert import tables
from vllama2_jax.convert.tensors import Renamed, TorchFile
from vllama2_jax.models.config import BeatsConfig

# setting of BEATs' cfg -> field of ours
_FIELDS = {
    "input_patch_size": "patch_size",
    "embed_dim": "patch_width",
    "encoder_embed_dim": "width",
    "encoder_ffn_embed_dim": "mlp_dim",
    "encoder_layers": "num_layers",
    "encoder_attention_heads": "num_heads",
    "conv_bias": "patch_bias",
    "conv_pos": "conv_window",
    "conv_pos_groups": "conv_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
    "deep_norm": "deep_norm",
    "encoder_layerdrop": "layer_drop",
    "layer_wise_gradient_decay_ratio": "gradient_decay",
}
# What the network here is, and what a cfg that says nothing means (BEATs.py's BEATsConfig).
_NEEDED = {
    "relative_position_embedding": (True, False),
    "gru_rel_pos": (True, False),
    "layer_norm_first": (False, False),
    "activation_fn": ("gelu", "gelu"),
}
_DEFAULTS = {
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "num_buckets": 320,
    "max_distance": 1280,
    "deep_norm": False,
    "encoder_layerdrop": 0.0,
    "layer_wise_gradient_decay_ratio": 1.0,
}


def open_beats(path: Path) -> tuple[Renamed, dict | None]:
    """The tensors of a BEATs tower under a released checkpoint's names, and its settings.

    Args:
      path: `BEATs_....pt`, or `audio_tower.bin`, which has no settings.

    Raises:
      CheckpointError: if it cannot be read without running what is in it.
    """
    source = TorchFile(path, nested="model")
    settings = source.beside.get("cfg")
    if settings is not None and not isinstance(settings, dict):
        raise CheckpointError(f"{path}: its `cfg` is no dict; get the file from its authors again")

    def rename(name: str) -> str:
        return tables.AUDIO_PREFIX + name.removeprefix(tables.AUDIO_PREFIX)

    return Renamed(source, rename), settings


def beats_config(settings: dict, where: str) -> BeatsConfig:
    """The network that a BEATs file's `cfg` describes.

    Raises:
      CheckpointError: for a setting that is missing, or means a network that is not built here.
    """
    for name, (needed, default) in _NEEDED.items():
        if settings.get(name, default) != needed:
            raise CheckpointError(
                f"{where}: its cfg says {name} {settings.get(name, default)!r}; only {needed!r} "
                "is supported, as in BEATs_iter3+"
            )
    found = {**_DEFAULTS, **settings}
    missing = [name for name in _FIELDS if name not in found]
    if missing:
        raise CheckpointError(f"{where}: its cfg lacks {', '.join(missing)}")
    return BeatsConfig(**{ours: found[theirs] for theirs, ours in _FIELDS.items()})
