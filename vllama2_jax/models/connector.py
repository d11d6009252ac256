"""Connectors to the decoder: the STC family, plain MLPs, the paper's Table 1, and that of audio.

The STC connector (paper section 2.2, figure 2) is RegStage, a spatial-temporal downsampler,
RegStage, and an MLP. RegStage is the one of timm (`timm.models.regnet`) as the original builds it:
bottleneck ratio 1, groups of one channel, squeeze-and-excitation, LayerNorm over channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vllama2_jax.models.activations import gelu
from vllama2_jax.models.axes import constrain
from vllama2_jax.models.config import AudioConnectorConfig, ConnectorConfig
from vllama2_jax.models.convolution import convolve, cut_windows
from vllama2_jax.models.matmul import dense_dot

# timm replaces the LayerNorm2d it is given by its norm-and-activation class, whose epsilon this is.
_NORM_EPS = 1e-5

_IN_OUT = ("conv_in", "conv_out")


def _uniform(*names):
    """PyTorch's default for convolution and linear kernels: uniform within 1 / sqrt(fan_in)."""
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.with_logical_partitioning(init, names)


def _uniform_bias(fan_in: int, *names):
    """PyTorch's default for biases: uniform within 1 / sqrt(fan_in) of the kernel."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.with_logical_partitioning(init, names)


class _Layers(nn.Module):
    """What the modules below share: dtypes, and layers with names on their axes."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def pointwise(self, x: jax.Array, features: int, name: str) -> jax.Array:
        """A 1x1 convolution without bias, as the matmul that it is."""
        return nn.Dense(
            features,
            dot_general=dense_dot,
            use_bias=False,
            kernel_init=_uniform(*_IN_OUT),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)

    def dense(self, x: jax.Array, features: int, names, name: str) -> jax.Array:
        """A dense layer with bias."""
        return nn.Dense(
            features,
            dot_general=dense_dot,
            kernel_init=_uniform(*names),
            bias_init=_uniform_bias(x.shape[-1], names[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """LayerNorm over channels, per pixel, in float32."""
        return nn.LayerNorm(
            epsilon=_NORM_EPS,
            use_fast_variance=False,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)


class SqueezeExcite(_Layers):
    """Channel gates from the mean over the image (Hu et al. 2018).

    Attributes:
      width: of the reduced representation.
    """

    width: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> the same, gated."""
        gate = x.mean(axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(self.dtype)
        gate = nn.silu(self.dense(gate, self.width, ("conv_in", "squeeze"), "reduce"))
        gate = nn.sigmoid(self.dense(gate, x.shape[-1], ("squeeze", "conv_out"), "expand"))
        return x * gate


class Bottleneck(_Layers):
    """One RegNet-Y block: 1x1, depthwise 3x3, squeeze-and-excitation, 1x1, shortcut.

    Attributes:
      features: output channels.
    """

    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C_in] -> [N, h, w, features]."""
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.silu(self.norm(self.pointwise(x, self.features, "conv1"), "norm1"))
        y = nn.Conv(
            self.features,
            (3, 3),
            padding=1,
            feature_group_count=self.features,
            use_bias=False,
            kernel_init=_uniform("conv_height", "conv_width", "conv_group", "conv_out"),
            conv_general_dilated=convolve,
            name="conv2",
            **common,
        )(y)
        y = nn.silu(self.norm(y, "norm2"))
        # timm reduces from the width of the block's input; Python rounds halves to even.
        y = SqueezeExcite(width=round(x.shape[-1] / 4), name="squeeze", **common)(y)
        y = self.norm(self.pointwise(y, self.features, "conv3"), "norm3")
        if x.shape[-1] != self.features:
            x = self.norm(self.pointwise(x, self.features, "shortcut"), "shortcut_norm")
        return constrain(nn.silu(x + y), "images", None, None, None)


class RegStage(_Layers):
    """`depth` bottlenecks.

    Attributes:
      depth: number of blocks.
      features: output channels.
    """

    depth: int = 0
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C_in] -> [N, h, w, features]."""
        for index in range(self.depth):
            x = Bottleneck(
                features=self.features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"block_{index}",
            )(x)
        return x


class Connector(_Layers):
    """Features of T frames to decoder tokens.

    Where the original's class cannot be built (no RegStage and widths that differ), the first layer
    with parameters maps `in_dim` to `out_dim`: the convolution, or the first read-out layer.

    Attributes:
      config: the shapes; `config.num_tokens(T, grid)` is the number of tokens.
      dtype: of activations and matmuls; norms and means are float32.
      param_dtype: of the parameters that `init` makes.
    """

    config: ConnectorConfig | None = None

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Downsample and project.

        Args:
          features: [B, T, N, in_dim]; N patches of a square grid, row-major.

        Returns:
          [B, num_tokens, out_dim] in `dtype`, time slowest, then rows, then columns.

        Raises:
          ValueError: if N is not a square or T is too short for the sampler's window.
        """
        config = self.config
        batch, steps, patches, width = features.shape
        grid = math.isqrt(patches)
        if grid * grid != patches:
            raise ValueError(f"{config.kind} needs a square grid of patches, got {patches} patches")
        num_tokens = config.num_tokens(steps, grid)
        x = features.astype(self.dtype)
        if config.sampler == "mean":
            x = x.mean(axis=1, dtype=jnp.float32).astype(self.dtype)
        else:
            x = self._stage(x.reshape(batch * steps, grid, grid, width), "stage1")
            x = nn.silu(self._sample(x.reshape(batch, steps, grid, grid, -1)))
            x = self._stage(x.reshape(-1, *x.shape[2:]), "stage2")
            x = x.reshape(batch, num_tokens, -1)
        for index in range(config.mlp_depth):
            if index:
                x = gelu(x)
            names = ("embed", "mlp") if index % 2 == 0 else ("mlp", "embed")
            x = self.dense(x, config.out_dim, names, f"readout_{index}")
        return constrain(x, "clips", None, None)

    def _stage(self, x, name):
        if not self.config.depth:
            return x
        return RegStage(
            depth=self.config.depth,
            features=self.config.out_dim,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)

    def _sample(self, x):
        config = self.config
        padding = [(size, size) for size in config.padding]
        if config.sampler == "pool":
            windows = cut_windows(x, config.downsample, padding)
            return windows.mean(axis=(4, 5, 6), dtype=jnp.float32).astype(self.dtype)
        fan_in = math.prod(config.downsample) * x.shape[-1]
        return nn.Conv(
            config.out_dim,
            config.downsample,
            strides=config.downsample,
            padding=padding,
            kernel_init=_uniform("conv_time", "conv_height", "conv_width", *_IN_OUT),
            bias_init=_uniform_bias(fan_in, "conv_out"),
            conv_general_dilated=convolve,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="sampler",
        )(x)


class AudioConnector(_Layers):
    """Audio features to decoder tokens: dense layers with GELU between them.

    Attributes:
      config: the shapes.
      dtype: of activations and matmuls.
      param_dtype: of the parameters that `init` makes.
    """

    config: AudioConnectorConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_dim] -> [..., out_dim] in `dtype`."""
        for index in range(self.config.depth):
            x = gelu(x) if index else x.astype(self.dtype)
            names = ("embed", "mlp") if index % 2 == 0 else ("mlp", "embed")
            x = self.dense(x, self.config.out_dim, names, f"layer_{index}")
        return x
