"""The towers against transformers' CLIPVisionModel and SiglipVisionModel."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.models import vit, zoo
from vllama2_jax.models.config import ViTConfig
from vllama2_jax.models.vit import VisionTower

SMALL = dict(width=48, mlp_dim=96, num_layers=4, num_heads=4, patch_size=7)
CLIP = dataclasses.replace(zoo.CLIP_L_336, image_size=28, **SMALL)
SIGLIP = dataclasses.replace(zoo.SIGLIP_SO400M_384, image_size=31, **SMALL)


def to_ours(state, config: ViTConfig):
    """A torch state_dict (transformers' names, no `vision_model.` prefix) as our tree."""
    state = {
        key.removeprefix("vision_model."): value.detach().numpy() for key, value in state.items()
    }

    def stack(name, shape_fn):
        return np.stack(
            [
                shape_fn(state[f"encoder.layers.{index}.{name}"])
                for index in range(config.num_blocks_used)
            ]
        )

    def norm(name):
        return {
            "scale": stack(f"{name}.weight", lambda w: w),
            "bias": stack(f"{name}.bias", lambda w: w),
        }

    def dense(name, kernel=None, bias=None):
        return {
            "kernel": stack(f"{name}.weight", lambda w: w.T.reshape(kernel or w.T.shape)),
            "bias": stack(f"{name}.bias", lambda w: w.reshape(bias or w.shape)),
        }

    heads = (config.num_heads, config.head_dim)
    split = dict(kernel=(config.width, *heads), bias=heads)
    patch = {"kernel": state["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)}
    if config.patch_bias:
        patch["bias"] = state["embeddings.patch_embedding.bias"]
    params = {
        "patch_embed": patch,
        "position_embed": state["embeddings.position_embedding.weight"],
        "blocks": {
            "norm1": norm("layer_norm1"),
            "norm2": norm("layer_norm2"),
            "attention": {
                "query": dense("self_attn.q_proj", **split),
                "key": dense("self_attn.k_proj", **split),
                "value": dense("self_attn.v_proj", **split),
                "out": dense("self_attn.out_proj", kernel=(*heads, config.width)),
            },
            "mlp": {"fc1": dense("mlp.fc1"), "fc2": dense("mlp.fc2")},
        },
    }
    if config.class_token:
        params["class_embed"] = state["embeddings.class_embedding"]
    if config.pre_norm:
        params["pre_norm"] = {
            "scale": state["pre_layrnorm.weight"],
            "bias": state["pre_layrnorm.bias"],
        }
    return {"params": params}


def oracle(config: ViTConfig):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    kind = "CLIP" if config.class_token else "Siglip"
    model = getattr(transformers, f"{kind}VisionModel")(
        getattr(transformers, f"{kind}VisionConfig")(**sizes)
    ).eval()
    assert not config.class_token or model.config.hidden_act == "quick_gelu"
    with torch.no_grad():
        for parameter in model.parameters():
            # Every bias and scale away from its initial 0 or 1.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("select_layer", [-2, -1, 2])
@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_tower_equals_transformers_hidden_state(config, select_layer):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(config, select_layer=select_layer)
    model = oracle(config)
    frames = np.random.default_rng(0).standard_normal(
        (3, config.image_size, config.image_size, 3), dtype=np.float32
    )
    with torch.no_grad():
        hidden = model(
            torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
        ).hidden_states[select_layer]
    expected = hidden.numpy()[:, 1:] if config.class_token else hidden.numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(VisionTower(config).apply)(to_ours(model.state_dict(), config), frames)
    assert ours.shape == (3, config.num_patches, config.width)
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


def test_published_towers_hold_only_the_blocks_they_run():
    for config, millions in ((zoo.CLIP_L_336, 290.9), (zoo.SIGLIP_SO400M_384, 397.8)):
        shapes = jax.eval_shape(
            VisionTower(config).init,
            jax.random.key(0),
            jnp.zeros((1, config.image_size, config.image_size, 3)),
        )
        leaves = jax.tree.leaves(nn.unbox(shapes))
        assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, abs=0.5)
        assert shapes["params"]["blocks"]["norm1"]["scale"].value.shape[0] == config.num_layers - 1


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_every_tower_parameter_names_all_its_axes(config):
    frames = jnp.zeros((1, config.image_size, config.image_size, 3))
    params = jax.eval_shape(VisionTower(config).init, jax.random.key(0), frames)["params"]
    specs = nn.get_partition_spec(params)
    names = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    shapes = jax.tree.leaves(nn.unbox(params))
    assert len(names) == len(shapes)
    for spec, leaf in zip(names, shapes, strict=True):
        assert len(spec) == leaf.ndim and None not in spec and len(set(spec)) == len(spec)
    for spec in jax.tree.leaves(
        specs["blocks"], is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    ):
        assert spec[0] == "layers"


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_normalise_is_within_one_ulp_of_the_numpy_reference(config):
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 1, 3))
    mean, std = (np.asarray(x, np.float32) for x in (config.image_mean, config.image_std))
    expected = ((pixels * (1 / 255)).astype(np.float32) - mean) / std
    assert expected.dtype == np.float32
    for run in (vit.normalise, jax.jit(vit.normalise, static_argnums=1)):
        ours = np.asarray(run(pixels, config))
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() <= np.spacing(np.abs(expected).max())


def test_remat_changes_neither_values_nor_gradients():
    frames = jax.random.normal(jax.random.key(1), (1, CLIP.image_size, CLIP.image_size, 3))
    params = nn.unbox(jax.jit(VisionTower(CLIP).init)(jax.random.key(0), frames))

    def gradient(remat):
        tower = VisionTower(CLIP, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(tower.apply(p, frames) ** 2)))(params)

    expected = gradient("none")
    full = VisionTower(CLIP, remat="full")
    assert "remat" in str(jax.make_jaxpr(full.apply)(params, frames))
    for ours, leaf in zip(
        jax.tree.leaves(gradient("full")), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max())


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="unknown remat policy 'sometimes'"):
        VisionTower(CLIP, remat="sometimes").init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))


def test_bfloat16_tower_stays_near_float32():
    frames = jax.random.normal(jax.random.key(1), (1, CLIP.image_size, CLIP.image_size, 3))
    params = nn.unbox(jax.jit(VisionTower(CLIP).init)(jax.random.key(0), frames))
    exact = jax.jit(VisionTower(CLIP).apply)(params, frames)
    ours = jax.jit(VisionTower(CLIP, dtype=jnp.bfloat16).apply)(params, frames)
    assert ours.dtype == jnp.bfloat16
    assert np.abs(ours.astype(jnp.float32) - exact).max() <= 0.05 * np.abs(exact).max()


def test_bfloat16_attention_keeps_its_logits_in_float32():
    """Logits up to 100 lie half a unit apart in bfloat16, and their softmax would be far off."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(0, 3, (2, 40, 4, 64)), jnp.bfloat16) for _ in range(3))
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("nqhd,nkhd->nhqk", wide_q, wide_k) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("nhqk,nkhd->nqhd", weights, wide_v)
    ours = np.asarray(jax.jit(vit.attend_all)(q, k, v), np.float64)
    assert np.abs(ours - expected).max() <= 0.006 * np.abs(expected).max()
