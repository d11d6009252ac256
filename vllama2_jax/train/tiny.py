"""The shapes of `tiny`, and how a decoder as narrow as its own begins."""

import math

import jax

from vllama2_jax.data.toybox_tokenizer import VOCAB_SIZE
from vllama2_jax.models.config import ConnectorConfig, DecoderConfig, ViTConfig, VLlama2Config

TINY = VLlama2Config(
    name="tiny",
    vision=ViTConfig(
        image_size=64,
        patch_size=8,
        width=96,
        mlp_dim=256,
        num_layers=3,
        num_heads=3,
        activation="gelu_tanh",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    connector=ConnectorConfig(
        kind="stc_connector_v35", in_dim=96, out_dim=160, sampler="conv", depth=1
    ),
    decoder=DecoderConfig(
        family="qwen2",
        vocab_size=VOCAB_SIZE,
        width=160,
        mlp_dim=448,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=True,
        max_positions=2048,
    ),
    num_frames=8,
)


_EMBEDDING_STD = 0.5


def widen_decoder(decoder: dict, config: DecoderConfig) -> dict:
    """Initial values for a narrow decoder.

    The published 0.02 suits widths of thousands, where it is about 1 / sqrt(fan_in). At a width of
    160 it makes every matrix shrink its input fourfold, and what media say is hardly heard.
    """

    def scale(path, leaf):
        *_, module, name = (key.key for key in path)
        if name == "embedding":
            return leaf * (_EMBEDDING_STD / leaf.std())
        if name != "kernel":
            return leaf
        fan_in = {"out": config.num_heads * config.head_dim, "down": config.mlp_dim}
        std = fan_in.get(module, config.width) ** -0.5
        if module in fan_in:  # the residual stream adds up two of them per layer
            std /= math.sqrt(2 * config.num_layers)
        return leaf * (std / leaf.std())

    return jax.tree_util.tree_map_with_path(scale, decoder)
