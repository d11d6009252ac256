"""The published models' shapes, by name, and `tiny`.

Sources: the config.json of the base models (Mistral-7B-Instruct-v0.2, Mixtral-8x7B-Instruct-v0.1,
Qwen2-7B/72B-Instruct), the towers' published sizes, and the connector names in the original's
scripts. A released checkpoint's own config.json always wins over this table.
"""

import dataclasses

from vllama2_jax.models.config import (
    AudioConnectorConfig,
    BeatsConfig,
    ConnectorConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

CLIP_L_336 = ViTConfig(
    image_size=336,
    patch_size=14,
    width=1024,
    mlp_dim=4096,
    num_layers=24,
    num_heads=16,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)

SIGLIP_SO400M_384 = ViTConfig(
    image_size=384,
    patch_size=14,
    width=1152,
    mlp_dim=4304,
    num_layers=27,
    num_heads=16,
    activation="gelu_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    image_mean=SIGLIP_MEAN,
    image_std=SIGLIP_STD,
)

TINY_TOWER = ViTConfig(
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
    image_mean=SIGLIP_MEAN,
    image_std=SIGLIP_STD,
)

# Two seconds: as long as Toybox's clips.
TINY_BEATS = BeatsConfig(
    patch_size=16,
    patch_width=64,
    width=96,
    mlp_dim=192,
    num_layers=3,
    num_heads=4,
    seconds=2.0,
    conv_window=64,
    conv_groups=4,
    num_buckets=64,
    max_distance=96,
    layer_drop=0.0,
    gradient_decay=1.0,
)

TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M_384,
}

# BEATs_iter3+ (AS2M), fine-tuned on AudioSet, the second checkpoint of its authors.
BEATS_ITER3 = BeatsConfig(
    patch_size=16,
    patch_width=512,
    width=768,
    mlp_dim=3072,
    num_layers=12,
    num_heads=12,
)

MISTRAL_7B = DecoderConfig(
    family="mistral",
    vocab_size=32000,
    width=4096,
    mlp_dim=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-5,
)

MIXTRAL_8X7B = dataclasses.replace(MISTRAL_7B, family="mixtral", num_experts=8, top_k=2)

QWEN2_7B = DecoderConfig(
    family="qwen2",
    vocab_size=152064,
    width=3584,
    mlp_dim=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
)

QWEN2_72B = dataclasses.replace(
    QWEN2_7B, width=8192, mlp_dim=29568, num_layers=80, num_heads=64, num_kv_heads=8
)

TINY_DECODER = DecoderConfig(
    family="qwen2",
    vocab_size=640,
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
)

# kind -> (sampler, downsample, padding, RegStage depth, read-out layers)
_CONNECTORS = {
    # What the original builds by name (its model/projector.py).
    "stc_connector": ("conv", (2, 2, 2), (1, 1, 1), 4, 2),
    "stc_connector_v35": ("conv", (2, 2, 2), (0, 0, 0), 4, 2),
    "stp_connector": ("pool", (2, 2, 2), (0, 0, 0), 4, 2),
    "spatial_conv": ("conv", (1, 2, 2), (1, 1, 1), 0, 2),
    "spatial_pool": ("pool", (1, 2, 2), (0, 0, 0), 0, 2),
    "mlp2x_gelu": ("mean", (1, 1, 1), (0, 0, 0), 0, 2),
    "linear": ("mean", (1, 1, 1), (0, 0, 0), 0, 1),
    # The nine rows of the paper's Table 1, in its order (zero padding, as its token counts imply).
    "table1_row1": ("pool", (1, 2, 2), (0, 0, 0), 0, 2),
    "table1_row2": ("conv", (1, 2, 2), (0, 0, 0), 0, 2),
    "table1_row3": ("mean", (1, 1, 1), (0, 0, 0), 0, 2),
    "table1_row4": ("pool", (2, 2, 2), (0, 0, 0), 0, 2),
    "table1_row5": ("conv", (2, 2, 2), (0, 0, 0), 0, 2),
    "table1_row6": ("pool", (1, 2, 2), (0, 0, 0), 4, 2),
    "table1_row7": ("conv", (1, 2, 2), (0, 0, 0), 4, 2),
    "table1_row8": ("pool", (2, 2, 2), (0, 0, 0), 4, 2),
    "table1_row9": ("conv", (2, 2, 2), (0, 0, 0), 4, 2),
}

CONNECTOR_KINDS = tuple(_CONNECTORS)


def connector_config(
    kind: str, in_dim: int, out_dim: int, depth: int | None = None
) -> ConnectorConfig:
    """The connector that the original's `mm_projector_type` calls `kind`, or a Table 1 row.

    Args:
      kind: its name.
      in_dim: of the tower's features.
      out_dim: of the decoder.
      depth: blocks per RegStage, for models too small for the published 4.

    Raises:
      ValueError: for an unknown kind, listing the known ones.
    """
    if kind not in _CONNECTORS:
        raise ValueError(f"unknown connector {kind!r}; known: {', '.join(_CONNECTORS)}")
    sampler, downsample, padding, published_depth, mlp_depth = _CONNECTORS[kind]
    return ConnectorConfig(
        kind=kind,
        in_dim=in_dim,
        out_dim=out_dim,
        sampler=sampler,
        downsample=downsample,
        padding=padding,
        depth=published_depth if depth is None else depth,
        mlp_depth=mlp_depth,
    )


def _model(
    name, vision, connector, decoder, num_frames, depth=None, audio=None, audio_connector=None
) -> VLlama2Config:
    return VLlama2Config(
        name=name,
        vision=vision,
        connector=connector_config(connector, vision.width, decoder.width, depth),
        decoder=decoder,
        num_frames=num_frames,
        audio=audio,
        audio_connector=audio and AudioConnectorConfig(audio_connector, audio.width, decoder.width),
    )


ZOO = {
    config.name: config
    for config in (
        _model("2-7B", CLIP_L_336, "stc_connector", MISTRAL_7B, 8),
        _model("2-7B-16F", CLIP_L_336, "stc_connector", MISTRAL_7B, 16),
        _model("2-8x7B", CLIP_L_336, "stc_connector", MIXTRAL_8X7B, 8),
        _model("2-72B", CLIP_L_336, "stc_connector_v35", QWEN2_72B, 8),
        _model("2.1-7B-16F", SIGLIP_SO400M_384, "stc_connector_v35", QWEN2_7B, 16),
        _model(
            "2.1-7B-AV",
            SIGLIP_SO400M_384,
            "stc_connector_v35",
            QWEN2_7B,
            16,
            audio=BEATS_ITER3,
            audio_connector="mlp2x_gelu",
        ),
        _model(
            "tiny",
            TINY_TOWER,
            "stc_connector_v35",
            TINY_DECODER,
            8,
            depth=1,
            audio=TINY_BEATS,
            audio_connector="mlp2x_gelu",
        ),
    )
}


# What published models were made of: the repositories of tower and language model.
PUBLISHED_PARTS = {
    "2-7B": ("openai/clip-vit-large-patch14-336", "mistralai/Mistral-7B-Instruct-v0.2"),
    "2-7B-16F": ("openai/clip-vit-large-patch14-336", "mistralai/Mistral-7B-Instruct-v0.2"),
    "2-8x7B": ("openai/clip-vit-large-patch14-336", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "2-72B": ("openai/clip-vit-large-patch14-336", "Qwen/Qwen2-72B-Instruct"),
    "2.1-7B-16F": ("google/siglip-so400m-patch14-384", "Qwen/Qwen2-7B-Instruct"),
    "2.1-7B-AV": ("google/siglip-so400m-patch14-384", "Qwen/Qwen2-7B-Instruct"),
}


def model_config(name: str) -> VLlama2Config:
    """The shape of a published model; accepts `2-8x7B` and `VideoLLaMA2-8x7B` alike.

    A published model and its `-Base` repository (the connector alone) have one shape.

    Raises:
      ValueError: for an unknown name, listing the known ones.
    """
    short = name.rsplit("/", 1)[-1]
    if short.startswith("VideoLLaMA2"):
        # "VideoLLaMA2-7B" -> "2-7B", "VideoLLaMA2.1-7B-16F" -> "2.1-7B-16F"
        short = short[len("VideoLLaMA") :]
    if short != "tiny-Base":  # `tiny` was never published
        short = short.removesuffix("-Base")
    if short not in ZOO:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(ZOO)}")
    return ZOO[short]
