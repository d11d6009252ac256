"""The language model: Mistral, Mixtral, Qwen2 and Llama are one network with different shapes.

Formulas: `transformers`' modeling_mistral.py, modeling_mixtral.py, modeling_qwen2.py. Two forms of
the parameters hold the same numbers: scanned (`layers/...` with a leading layer axis; training)
and unrolled (`layer_0/...`; inference). `docs/decisions/decoder-layers.md` says why.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vllama2_jax.models.attention import attend
from vllama2_jax.models.axes import constrain
from vllama2_jax.models.cache import CACHE_AXES, KVCache
from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.linear import Linear
from vllama2_jax.models.moe import MoE
from vllama2_jax.models.remat import rematerialised
from vllama2_jax.models.rope import apply_rope, rope_tables


def _write(cached, new, end):
    """Put `new` [B, L, KV, D] into a layer's keys or values at slot `end`."""
    update = new.swapaxes(1, 2).astype(cached.dtype)
    update = update.reshape(*cached.shape[:-2], *update.shape[-2:])
    slot = (*[0] * (cached.ndim - 2), end, 0)
    names = CACHE_AXES[-cached.ndim :]
    return constrain(jax.lax.dynamic_update_slice(cached, update, slot), *names)


def _read(cached, batch):
    """A layer's keys or values as [B, S, KV, D]."""
    return cached.reshape(batch, -1, *cached.shape[-2:]).swapaxes(1, 2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to `dtype`, then times `scale`."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        """Normalise `x` [..., W] over its last axis."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    backend: str

    def _project(self, x, name, count, axis):
        heads = Linear(
            (count, self.config.head_dim),
            ("embed", axis, "head_dim"),
            self.dtype,
            self.param_dtype,
            use_bias=self.config.qkv_bias,
            name=name,
        )(x)
        return constrain(heads, "batch", "length", axis, "head_dim")

    @nn.compact
    def __call__(self, x, rope, positions, segments, cache, layer_kv):
        """Mix `x` [B, L, W] along L; returns it and the layer's updated (keys, values)."""
        c = self.config
        q = apply_rope(self._project(x, "query", c.num_heads, "heads"), rope)
        k = apply_rope(self._project(x, "key", c.num_kv_heads, "kv_heads"), rope)
        v = self._project(x, "value", c.num_kv_heads, "kv_heads")
        common = {
            "q_positions": positions,
            "q_segments": segments,
            "window": c.sliding_window,
            "backend": self.backend,
        }

        def among_new_tokens():
            return attend(
                q, k, v, kv_positions=positions, kv_segments=segments, aligned=True, **common
            )

        if cache is None:
            mixed = among_new_tokens()
        else:
            layer_kv = tuple(
                _write(old, new, cache.end) for old, new in zip(layer_kv, (k, v), strict=True)
            )

            def over_the_cache():
                keys, values = (_read(kv, len(x)).astype(self.dtype) for kv in layer_kv)
                return attend(
                    q,
                    keys,
                    values,
                    kv_positions=cache.positions,
                    kv_segments=cache.segments,
                    **common,
                )

            if x.shape[1] == 1:
                mixed = over_the_cache()
            else:  # the first prompt need not look at a cache that holds nothing else
                mixed = jax.lax.cond(cache.end == 0, among_new_tokens, over_the_cache)
        out = Linear(
            (c.width,),
            ("heads", "head_dim", "embed"),
            self.dtype,
            self.param_dtype,
            num_inputs=2,
            name="out",
        )(mixed)
        return out, layer_kv


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    def _linear(self, name, features, *names):
        return Linear((features,), names, self.dtype, self.param_dtype, name=name)

    @nn.compact
    def __call__(self, x):
        """Transform `x` [B, L, W] token by token."""
        gate = self._linear("gate", self.config.mlp_dim, "embed", "mlp")(x)
        up = self._linear("up", self.config.mlp_dim, "embed", "mlp")(x)
        hidden = constrain(nn.silu(gate) * up, "batch", "length", "mlp")
        return self._linear("down", self.config.width, "mlp", "embed")(hidden)


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, MLP or mixture of experts, residual."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention_backend: str
    moe_backend: str
    split_experts: bool
    expert_exchange: str

    @nn.compact
    def __call__(self, x, rope, positions, segments, cache, layer_kv):
        """Returns x [B, L, W] and (the layer's keys and values, router logits or None)."""
        c, types = self.config, (self.dtype, self.param_dtype)
        mixed, layer_kv = Attention(c, *types, self.attention_backend, name="attention")(
            RMSNorm(c.norm_eps, *types, name="input_norm")(x),
            rope,
            positions,
            segments,
            cache,
            layer_kv,
        )
        x = x + mixed
        normed = RMSNorm(c.norm_eps, *types, name="post_norm")(x)
        if c.num_experts:
            options = (self.moe_backend, self.split_experts, self.expert_exchange)
            moe = MoE(c, *types, *options, name="moe")
            mixed, router_logits = moe(normed)
        else:
            mixed, router_logits = MLP(c, *types, name="mlp")(normed), None
        return constrain(x + mixed, "batch", "length", "act_embed"), (layer_kv, router_logits)


class Decoder(nn.Module):
    """Token embedding, layers, final norm and output head, as three separate steps.

    The splice of media features happens between `embed` and `__call__`; `logits` is separate so
    that generation computes them for the last token only.

    Attributes:
      config: shapes.
      dtype: of the matrix products; norms, softmax and rotation run in float32.
      param_dtype: of the parameters.
      remat: a name in `remat.REMAT_POLICIES`.
      scan_layers: scan over stacked parameters (training), or run a Python loop over each layer's
        own (inference; the only form that takes a cache). `unstack_layers` converts.
      attention_backend: see `attention.attend`.
      moe_backend: see `grouped_matmul.grouped_matmul`.
      split_experts: every expert has its own arrays, `moe/expert_0/gate` (inference on CPU).
      expert_exchange: how tokens travel to experts of other devices: see `expert_parallel`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    attention_backend: str = "xla"
    moe_backend: str = "blocks"
    split_experts: bool = False
    expert_exchange: str = "ring"

    def setup(self):
        """Declare the parameters."""
        c, types = self.config, (self.dtype, self.param_dtype)
        layer = rematerialised(DecoderLayer, self.remat, scanned=self.scan_layers)
        options = (
            c,
            *types,
            self.attention_backend,
            self.moe_backend,
            self.split_experts,
            self.expert_exchange,
        )
        if self.scan_layers:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,) * 5,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(*options)
        else:
            self.layer = [layer(*options) for _ in range(c.num_layers)]
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocab", "embed")
            ),
        )
        self.final_norm = RMSNorm(c.norm_eps, *types)
        if not c.tie_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), *types)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, L, W] in `dtype` of `tokens` int32 [B, L]."""
        return self.embed_tokens(tokens)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: KVCache | None = None,
        *,
        with_router_logits: bool = False,
    ):
        """Run the layers.

        Args:
          x: [B, L, W], embeddings of tokens and media.
          positions: int32 [B, L], ascending within a segment.
          segments: int32 [B, L]; 0 is padding.
          cache: what was seen before; the new tokens are entered at its `end`.
          with_router_logits: also return the routers' logits, for `moe.load_balancing_loss`.

        Returns:
          (hidden [B, L, W] after the final norm, the new cache or None), and with
          `with_router_logits` a third: [num_layers, B, L, E].

        Raises:
          ValueError: for a cache with scanned layers, or router logits of a dense decoder.
        """
        c = self.config
        if cache is not None and self.scan_layers:
            raise ValueError(
                "a decoder with scan_layers=True takes no cache; build it with scan_layers=False "
                "and convert the parameters with unstack_layers"
            )
        if with_router_logits and not c.num_experts:
            raise ValueError(f"a {c.family} decoder without experts has no router logits")
        x = constrain(x.astype(self.dtype), "batch", "length", "act_embed")
        rope = rope_tables(positions, c.head_dim, c.rope_theta)
        if cache is not None:
            cache = cache.claim(positions, segments)
        if self.scan_layers:
            x, (_, router_logits) = self.layers(x, rope, positions, segments, None, None)
        else:
            new_kv, router_logits = [], []
            for i, layer in enumerate(self.layer):
                layer_kv = None if cache is None else (cache.keys[i], cache.values[i])
                x, (layer_kv, logits) = layer(x, rope, positions, segments, cache, layer_kv)
                new_kv.append(layer_kv)
                router_logits.append(logits)
            if cache is not None:
                keys, values = zip(*new_kv, strict=True)
                cache = cache.replace(keys=keys, values=values, end=cache.end + x.shape[1])
            if with_router_logits:
                router_logits = jnp.stack(router_logits)
        hidden = self.final_norm(x)
        if self.is_initializing():
            self.logits(self.embed(jnp.zeros((1, 1), jnp.int32)))  # create their parameters too
        return (hidden, cache, router_logits) if with_router_logits else (hidden, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits, float32 [B, L, V], of `hidden` [B, L, W]."""
        if self.config.tie_embeddings:
            return self.embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)
