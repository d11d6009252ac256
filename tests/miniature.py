"""The smallest network that has all the parts; for tests that need no released format."""

from vllama2_jax.models.config import ConnectorConfig, DecoderConfig, ViTConfig, VLlama2Config

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
