"""The smallest networks that have all the parts; for tests that need no released format."""

import dataclasses

from vllama2_jax.models.config import (
    AudioConnectorConfig,
    BeatsConfig,
    ConnectorConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
)
from vllama2_jax.models.zoo import ZOO

MINIATURE = VLlama2Config(
    name="test",
    vision=ViTConfig(
        image_size=8,
        patch_size=2,
        width=8,
        mlp_dim=16,
        num_layers=2,
        num_heads=2,
        activation="gelu_tanh",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    connector=ConnectorConfig("stc_connector_v35", in_dim=8, out_dim=16, sampler="conv", depth=1),
    decoder=DecoderConfig(
        family="qwen2",
        vocab_size=32,
        width=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    num_frames=2,
)

# It hears a second at a time.
HEARING = dataclasses.replace(
    MINIATURE,
    audio=BeatsConfig(
        patch_size=16,
        patch_width=8,
        width=8,
        mlp_dim=16,
        num_layers=4,
        num_heads=2,
        seconds=1.0,
        conv_window=8,
        conv_groups=2,
        num_buckets=16,
        max_distance=40,
        layer_drop=0.5,
    ),
    audio_connector=AudioConnectorConfig("mlp2x_gelu", in_dim=8, out_dim=16),
)

_TINY = ZOO["tiny"]
SEEING_TINY = dataclasses.replace(_TINY, audio=None, audio_connector=None)
# The zoo's `tiny` with fewer and narrower layers: it takes the same media and the same tokens.
NARROW_TINY = dataclasses.replace(
    _TINY,
    vision=dataclasses.replace(_TINY.vision, width=24, mlp_dim=48),
    connector=dataclasses.replace(_TINY.connector, in_dim=24, out_dim=32),
    decoder=dataclasses.replace(_TINY.decoder, width=32, mlp_dim=64, num_layers=1),
    audio=dataclasses.replace(_TINY.audio, patch_width=16, width=24, mlp_dim=48, num_layers=1),
    audio_connector=AudioConnectorConfig("mlp2x_gelu", in_dim=24, out_dim=32),
)
