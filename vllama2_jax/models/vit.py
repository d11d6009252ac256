"""CLIP and SigLIP image towers, read at one of their hidden layers.

The original reads `hidden_states[-2]`: no last block, no final norm. Only the blocks in front of
that state exist here. Formulas: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), as
transformers' CLIPVisionModel and SiglipVisionModel compute them.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.models import splash
from vllama2_jax.models.activations import gelu_tanh, quick_gelu
from vllama2_jax.models.axes import constrain, divisible, per_device
from vllama2_jax.models.config import ViTConfig
from vllama2_jax.models.convolution import convolve
from vllama2_jax.models.matmul import dense_dot
from vllama2_jax.models.remat import rematerialised


def normalise(frames: jax.Array, config: ViTConfig) -> jax.Array:
    """Pixels to what the tower takes: one float32 affine per value.

    The pixel nearest to the mean is subtracted first (exactly, both are small integers), so that
    the product is no larger than the result and rounds no worse.

    Args:
      frames: uint8 [..., S, S, 3].
      config: gives mean and standard deviation per colour.

    Returns:
      float32 [..., S, S, 3]; (pixel / 255 - mean) / std, within one unit in the last place (of the
      largest magnitude that a pixel can take) of the NumPy reference.
    """
    mean, std = (
        np.asarray(values, np.float32).astype(np.float64)
        for values in (config.image_mean, config.image_std)
    )
    centre = np.round(255 * mean)
    scale, bias = 1 / (255 * std), (centre / 255 - mean) / std
    centre, scale, bias = (value.astype(np.float32) for value in (centre, scale, bias))
    return (frames.astype(jnp.float32) - centre) * scale + bias


# Measured best for 577 tokens of 64 (4 x 577 x 577 float32 logits are 5 MB).
_HEADS_IN_CACHE = 4

_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


def _init(init, *names):
    return nn.with_logical_partitioning(init, names)


_kernel = nn.initializers.lecun_normal()
_zeros = nn.initializers.zeros
_ones = nn.initializers.ones


def _layer_norm(config, dtype, param_dtype, name):
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        scale_init=_init(_ones, "norm"),
        bias_init=_init(_zeros, "norm"),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head self-attention of all tokens to all, with biases."""

    config: ViTConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    backend: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, L, W] -> [N, L, W]."""
        heads, head_dim = self.config.num_heads, self.config.head_dim
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def project(name):
            return nn.DenseGeneral(
                (heads, head_dim),
                dot_general=dense_dot,
                kernel_init=_init(_kernel, "embed", "heads", "head_dim"),
                bias_init=_init(_zeros, "heads", "head_dim"),
                name=name,
                **common,
            )(x)

        out = attend_all(*map(project, ("query", "key", "value")), backend=self.backend)
        return nn.DenseGeneral(
            self.config.width,
            dot_general=dense_dot,
            axis=(-2, -1),
            kernel_init=_init(_kernel, "heads", "head_dim", "embed"),
            bias_init=_init(_zeros, "embed"),
            name="out",
            **common,
        )(out)


def attend_all(
    query: jax.Array, key: jax.Array, value: jax.Array, *, backend: str = "xla"
) -> jax.Array:
    """Attention without a mask; logits and softmax in float32.

    Args:
      query: [N, L, H, D].
      key: [N, L, H, D].
      value: [N, L, H, D].
      backend: a key of `attention.BACKENDS`. "xla" takes a few heads at a time on CPU.

    Returns:
      [N, L, H, D].

    Raises:
      ValueError: for an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(_BACKENDS)}")
    names = (divisible("images", len(query)), None, None, None)
    return per_device(_BACKENDS[backend], (names,) * 3, names)(query, key, value)


def _attend_xla(query, key, value):
    whole = jax.nn.dot_product_attention
    return jax.lax.platform_dependent(query, key, value, cpu=_attend_in_cache, default=whole)


def _attend_splash(query, key, value):
    ones = jnp.ones(query.shape[:2], jnp.int32)
    return splash.attend(query, key, value, ones, ones, causal=False, window=None)


def _attend_cudnn(query, key, value):
    if query.dtype == jnp.float32:  # which cuDNN does not take
        return _attend_xla(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


_BACKENDS = {"xla": _attend_xla, "splash": _attend_splash, "cudnn": _attend_cudnn}


def _attend_in_cache(query, key, value):
    """A few heads of one image at a time, so that their logits stay in a CPU core's cache.

    The softmax's division waits until the weights have met the values: it is then over D columns
    and not over L.
    """
    images, length, heads, head_dim = query.shape
    group = math.gcd(heads, _HEADS_IN_CACHE)

    def split(x):
        x = x.reshape(images, length, heads // group, group, head_dim)
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, group, length, head_dim)

    def attend(qkv):
        query, key, value = qkv
        # Scaled in float32: in bfloat16 the factor itself would be off, and every logit with it.
        query = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
        logits = jnp.einsum("hqd,hkd->hqk", query, key, preferred_element_type=jnp.float32)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.einsum(
            "hqk,hkd->hqd",
            weights.astype(value.dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        return (out / weights.sum(-1, keepdims=True)).astype(value.dtype)

    out = jax.lax.map(attend, (split(query), split(key), split(value)))
    out = out.reshape(images, heads // group, group, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)


class Mlp(nn.Module):
    """Two dense layers around the tower's activation."""

    config: ViTConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, L, W] -> [N, L, W]."""
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.Dense(
            self.config.mlp_dim,
            dot_general=dense_dot,
            kernel_init=_init(_kernel, "embed", "mlp"),
            bias_init=_init(_zeros, "mlp"),
            name="fc1",
            **common,
        )(x)
        return nn.Dense(
            self.config.width,
            dot_general=dense_dot,
            kernel_init=_init(_kernel, "mlp", "embed"),
            bias_init=_init(_zeros, "embed"),
            name="fc2",
            **common,
        )(_ACTIVATIONS[self.config.activation](x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    config: ViTConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attention_backend: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """[N, L, W] -> ([N, L, W], None), as `nn.scan` wants it."""
        parts = (self.config, self.dtype, self.param_dtype)
        attention = Attention(*parts, self.attention_backend, name="attention")
        x = x + attention(_layer_norm(*parts, "norm1")(x))
        x = x + Mlp(*parts, name="mlp")(_layer_norm(*parts, "norm2")(x))
        return constrain(x, "images", None, None), None


class VisionTower(nn.Module):
    """Frames to patch features.

    Attributes:
      config: the shapes.
      dtype: of activations and matmuls; norms and softmax are float32.
      param_dtype: of the parameters that `init` makes.
      remat: what the backward pass keeps of a block, a name in `remat.REMAT_POLICIES`.
      attention_backend: see `attend_all`.
    """

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention_backend: str = "xla"

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        """The selected hidden state of every patch.

        Args:
          frames: float [N, S, S, 3], normalised (see `normalise`).

        Returns:
          [N, num_patches, width] in `dtype`, row-major over the grid, without the class token.
        """
        config = self.config
        x = nn.Conv(
            config.width,
            (config.patch_size,) * 2,
            strides=(config.patch_size,) * 2,
            padding="VALID",
            use_bias=config.patch_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_init(_kernel, "conv_height", "conv_width", "colour", "embed"),
            bias_init=_init(_zeros, "embed"),
            conv_general_dilated=convolve,
            name="patch_embed",
        )(frames.astype(self.dtype))
        x = x.reshape(x.shape[0], config.num_patches, config.width)
        normal = nn.initializers.normal(config.width**-0.5)
        if config.class_token:
            token = self.param(
                "class_embed", _init(normal, "embed"), (config.width,), self.param_dtype
            )
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, config.width))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.param(
            "position_embed",
            _init(normal, "patches", "embed"),
            (x.shape[1], config.width),
            self.param_dtype,
        ).astype(self.dtype)
        if config.pre_norm:
            x = _layer_norm(config, self.dtype, self.param_dtype, "pre_norm")(x)
        if config.num_blocks_used:
            blocks = nn.scan(
                rematerialised(Block, self.remat, scanned=True),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=config.num_blocks_used,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            parts = (config, self.dtype, self.param_dtype, self.attention_backend)
            x, _ = blocks(*parts, name="blocks")(x)
        return x[:, 1:] if config.class_token else x
