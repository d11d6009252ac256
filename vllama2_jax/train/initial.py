"""How a model as narrow as `tiny` begins; wide models that begin from nothing do not need it."""

import math

import flax.linen as nn
import jax

from vllama2_jax.models.config import BeatsConfig, DecoderConfig, VLlama2Config
from vllama2_jax.models.vllama2 import init_params

_EMBEDDING_STD = 0.5
# With the usual 0.02 the way of a motion is not learnt in minutes, or not at all.
_POSITION_STD = 0.5


def initial_params(config: VLlama2Config, seed: int) -> dict:
    """Random parameters for a narrow model, a nested dict of float32 arrays."""
    params = nn.meta.unbox(init_params(config, jax.random.key(seed)))
    params["vision"]["position_embed"] = _with_std(
        params["vision"]["position_embed"], _POSITION_STD
    )
    params["decoder"] = widen_decoder(params["decoder"], config.decoder)
    if config.audio:
        params["audio"] = widen_beats(params["audio"], config.audio)
    return params


def widen_beats(tower: dict, config: BeatsConfig) -> dict:
    """Initial values for a narrow audio tower: matrices that keep their input's size."""
    fan_in = {
        "patch_embed": config.patch_size**2,
        "patch_project": config.patch_width,
        "fc2": config.mlp_dim,
    }

    def scale(path, leaf):
        names = [key.key for key in path]
        if names[-1] != "kernel" or names[-2] in ("conv", "gate"):
            return leaf
        return _with_std(leaf, fan_in.get(names[-2], config.width) ** -0.5)

    return jax.tree_util.tree_map_with_path(scale, tower)


def widen_decoder(decoder: dict, config: DecoderConfig) -> dict:
    """Initial values for a narrow decoder.

    The published 0.02 suits widths of thousands, where it is about 1 / sqrt(fan_in). At a width of
    160 it makes every matrix shrink its input fourfold, and what media say is hardly heard.
    """

    def scale(path, leaf):
        *_, module, name = (key.key for key in path)
        if name == "embedding":
            return _with_std(leaf, _EMBEDDING_STD)
        if name != "kernel":
            return leaf
        fan_in = {"out": config.num_heads * config.head_dim, "down": config.mlp_dim}
        std = fan_in.get(module, config.width) ** -0.5
        if module in fan_in:  # the residual stream adds up two of them per layer
            std /= math.sqrt(2 * config.num_layers)
        return _with_std(leaf, std)

    return jax.tree_util.tree_map_with_path(scale, decoder)


def _with_std(leaf: jax.Array, std: float) -> jax.Array:
    return leaf * (std / leaf.std())
