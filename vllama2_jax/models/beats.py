"""BEATs, the audio tower: a filter bank's patches through a post-norm transformer.

Formulas: Chen et al. 2022 (BEATs), and Chi et al. 2022 (XLM-E) for the gated relative positions, as
the original's `beats/BEATs.py` and `beats/backbone.py` compute them.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.models.activations import gelu
from vllama2_jax.models.axes import constrain, layout_in_force
from vllama2_jax.models.config import BeatsConfig
from vllama2_jax.models.convolution import convolve
from vllama2_jax.models.long_convolution import convolve_long
from vllama2_jax.models.matmul import dense_dot
from vllama2_jax.models.remat import rematerialised

# The gate's dense layer gives so many numbers per head, the halves of which are summed.
_GATE_UNITS = 8

_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros
_ones = nn.initializers.ones


def _init(init, *names):
    return nn.with_logical_partitioning(init, names)


def normalise_bank(audio: jax.Array, config: BeatsConfig) -> jax.Array:
    """A filter bank as the tower takes it: (x - mean) / (2 std), float32 [..., frames, 128]."""
    return (audio.astype(jnp.float32) - config.mean) / (2 * config.std)


def distance_buckets(length: int, config: BeatsConfig) -> np.ndarray:
    """Which of the learnt biases serves a distance.

    Small distances have a bucket each, larger ones share them logarithmically; half of the buckets
    are for keys behind the query. In float32, as the original's.

    Args:
      length: tokens.
      config: gives the number of buckets and the distance from which all share the last.

    Returns:
      int32 [2 * length]: of distance key - query = d at place d, and at d + 2 * length for d < 0.
    """
    half = config.num_buckets // 2
    exact = half // 2
    distance = np.arange(2 * length)
    distance = np.where(distance < length, distance, distance - 2 * length)
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    ratio = np.log(far / np.float32(exact)) / np.float32(math.log(config.max_distance / exact))
    shared = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(shared, half - 1))
    return (bucket + np.where(distance > 0, half, 0)).astype(np.int32)


def by_distance(values: jax.Array, length: int) -> jax.Array:
    """Values of distances, laid out for pairs: [H, 2 L] -> [H, L, L], out[i, j] = values[j - i].

    Each row is the one above, moved by one: repeated, cut, and folded one place short.
    """
    heads = values.shape[0]
    rows = jnp.tile(values, (1, length))[:, : length * (2 * length - 1)]
    return rows.reshape(heads, length, 2 * length - 1)[:, :, :length]


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """x, whose gradient is multiplied by `factor`."""
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)


def attend_gated(query, key, value, gate, bias) -> jax.Array:
    """Attention of all tokens to all, with position biases that each query scales.

    Args:
      query, key, value: [N, L, H, D].
      gate: float32 [N, L, H], factor of a query's biases.
      bias: float32 [H, L, L].

    Returns:
      [N, L, H, D]; logits and softmax in float32.
    """

    def whole(query, key, value, gate, bias):
        scaled = gate.transpose(0, 2, 1)[..., None] * bias
        return jax.nn.dot_product_attention(query, key, value, bias=scaled.astype(query.dtype))

    if layout_in_force():  # one head after the other would be all heads on every device
        return whole(query, key, value, gate, bias)
    return jax.lax.platform_dependent(
        query, key, value, gate, bias, cpu=_attend_by_head, default=whole
    )


def _attend_by_head(query, key, value, gate, bias):
    """A head of one sample at a time; the softmax's division waits until the values are met."""
    samples, length, heads, head_dim = query.shape

    def split(x):
        return jnp.moveaxis(x, 2, 1).reshape(samples * heads, length, *x.shape[3:])

    def attend(head):
        query, key, value, gate, number = head
        query = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
        logits = jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
        logits += gate[:, None] * bias[number]
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(value.dtype)

    numbers = jnp.tile(jnp.arange(heads), samples)
    out = jax.lax.map(attend, (split(query), split(key), split(value), split(gate), numbers))
    return jnp.moveaxis(out.reshape(samples, heads, length, head_dim), 1, 2)


class Attention(nn.Module):
    """Self-attention whose relative position biases are gated by the queries."""

    config: BeatsConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[N, L, W], biases float32 [H, L, L] -> [N, L, W]."""
        heads, head_dim = self.config.num_heads, self.config.head_dim
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dense_dot)

        def project(name):
            return nn.DenseGeneral(
                (heads, head_dim),
                kernel_init=_init(_normal, "embed", "heads", "head_dim"),
                bias_init=_init(_zeros, "heads", "head_dim"),
                name=name,
                **common,
            )(x)

        query = project("query")
        out = attend_gated(query, project("key"), project("value"), self._gate(query), bias)
        return nn.DenseGeneral(
            self.config.width,
            axis=(-2, -1),
            kernel_init=_init(_normal, "heads", "head_dim", "embed"),
            bias_init=_init(_zeros, "embed"),
            name="out",
            **common,
        )(out)

    def _gate(self, query):
        """float32 [N, L, H]: 2 + a (b s - 1), with a and b of the query and s of the head."""
        units = nn.Dense(
            _GATE_UNITS,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_init(_normal, "head_dim", "gate"),
            bias_init=_init(_zeros, "gate"),
            name="gate",
        )(query)
        units = units.reshape(*units.shape[:-1], 2, _GATE_UNITS // 2).sum(-1)
        a, b = jnp.moveaxis(jax.nn.sigmoid(units.astype(jnp.float32)), -1, 0)
        scale = self.param(
            "gate_scale", _init(_ones, "heads"), (self.config.num_heads,), self.param_dtype
        )
        return a * (b * scale.astype(jnp.float32) - 1) + 2


class Block(nn.Module):
    """Post-norm transformer block with deep-norm's weight on what bypasses."""

    config: BeatsConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, keep, bias: jax.Array) -> tuple[jax.Array, None]:
        """[N, L, W] -> ([N, L, W], None), as `nn.scan` wants it.

        Args:
          x: hidden states.
          keep: bool [N], False where layer-drop leaves the block out; None outside training.
          bias: float32 [H, L, L], position biases.
        """
        parts = (self.config, self.dtype, self.param_dtype)
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dense_dot)
        given = x = scale_gradient(x, self.config.gradient_decay)
        weight = self.config.residual_weight
        attended = Attention(*parts, name="attention")(x, bias)
        x = _layer_norm(*parts, "norm1")(x * weight + attended)
        hidden = nn.Dense(
            self.config.mlp_dim,
            kernel_init=_init(_normal, "embed", "mlp"),
            bias_init=_init(_zeros, "mlp"),
            name="fc1",
            **common,
        )(x)
        hidden = nn.Dense(
            self.config.width,
            kernel_init=_init(_normal, "mlp", "embed"),
            bias_init=_init(_zeros, "embed"),
            name="fc2",
            **common,
        )(gelu(hidden))
        x = constrain(_layer_norm(*parts, "norm2")(x * weight + hidden), "images", None, None)
        return (x if keep is None else jnp.where(keep[:, None, None], x, given)), None


class PositionalConvolution(nn.Module):
    """A wide grouped convolution over time, whose kernel has a learnt norm per tap."""

    config: BeatsConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, L, W] -> [N, L, W]."""
        config = self.config
        window = config.conv_window
        scale = self.param("scale", _init(_ones, "conv_time"), (window,), self.param_dtype)

        def normalised(inputs, kernel, *args, **options):
            direction = kernel.astype(jnp.float32)
            squares = jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True)
            direction *= jax.lax.rsqrt(squares + config.conv_norm_eps)
            kernel = direction * scale.astype(jnp.float32)[:, None, None]
            return convolve_long(inputs, kernel.astype(inputs.dtype), *args, **options)

        return nn.Conv(
            config.width,
            (window,),
            padding=[(window // 2, (window - 1) // 2)],
            feature_group_count=config.conv_groups,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_init(_normal, "conv_time", "conv_in", "conv_out"),
            bias_init=_init(_zeros, "conv_out"),
            conv_general_dilated=normalised,
            name="conv",
        )(x)


class Beats(nn.Module):
    """Filter banks to audio features.

    Attributes:
      config: the shapes.
      dtype: of activations and matmuls; norms, gates and softmax are float32.
      param_dtype: of the parameters that `init` makes.
      remat: what the backward pass keeps of a block, a name in `remat.REMAT_POLICIES`.
    """

    config: BeatsConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, audio: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """The last hidden states.

        Args:
          audio: [N, frames, bins], normalised (see `normalise_bank`).
          keep: bool [N, num_layers], False for blocks that layer-drop leaves out; None outside
            training.

        Returns:
          [N, num_tokens, width] in `dtype`, time slowest.
        """
        config = self.config
        parts = (config, self.dtype, self.param_dtype)
        x = nn.Conv(
            config.patch_width,
            (config.patch_size,) * 2,
            strides=(config.patch_size,) * 2,
            padding="VALID",
            use_bias=config.patch_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_init(_normal, "conv_time", "conv_bins", "colour", "patch_embed"),
            bias_init=_init(_zeros, "patch_embed"),
            conv_general_dilated=convolve,
            name="patch_embed",
        )(audio.astype(self.dtype)[..., None])
        x = x.reshape(x.shape[0], -1, config.patch_width)
        x = _layer_norm(*parts, "patch_norm", "patch_embed")(x)
        if config.patch_width != config.width:
            x = nn.Dense(
                config.width,
                dot_general=dense_dot,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=_init(_normal, "patch_embed", "embed"),
                bias_init=_init(_zeros, "embed"),
                name="patch_project",
            )(x)
        x = x + gelu(PositionalConvolution(*parts, name="positions")(x))
        x = _layer_norm(*parts, "norm")(x)
        biases = self.param(
            "distance_bias",
            _init(_normal, "buckets", "heads"),
            (config.num_buckets, config.num_heads),
            self.param_dtype,
        )
        length = x.shape[1]
        bias = biases.astype(jnp.float32)[distance_buckets(length, config)]
        blocks = nn.scan(
            rematerialised(Block, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        keep = None if keep is None else keep.T
        x, _ = blocks(*parts, name="blocks")(x, keep, by_distance(bias.T, length))
        return x


def _layer_norm(config, dtype, param_dtype, name, axis="norm"):
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        scale_init=_init(_ones, axis),
        bias_init=_init(_zeros, axis),
        name=name,
    )
