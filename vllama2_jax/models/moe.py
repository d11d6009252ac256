"""A mixture of SwiGLU experts without capacity: no token is ever dropped.

Formulas: `transformers`' modeling_mixtral.py. `docs/decisions/moe-layout.md` holds the measurements
behind the backends.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.grouped_matmul import grouped_matmul

# At most this many tokens: each expert that anyone chose runs over all of them, without sorting.
FEW_TOKENS = 16


class MoE(nn.Module):
    """Router, top-k experts, weighted sum.

    Attributes:
      config: shapes.
      dtype: of the matrix products.
      param_dtype: of the parameters.
      backend: of the grouped matrix product, see `grouped_matmul`.
      split_experts: parameters are `expert_0/gate` [in, out] ... instead of `gate` [E, in, out].
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    backend: str
    split_experts: bool

    def setup(self):
        """Declare the parameters."""
        c = self.config
        self.router = nn.Dense(
            c.num_experts,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("embed", "expert")
            ),
        )
        if self.split_experts:
            self.expert = [Expert(c, self.param_dtype) for _ in range(c.num_experts)]
        else:
            for name, shape, axes in _weights(c):
                init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("expert", *axes))
                setattr(
                    self, name, self.param(name, init, (c.num_experts, *shape), self.param_dtype)
                )

    def __call__(self, x):
        """Transform `x` [B, L, W]; returns it and the router's logits [B, L, E].

        The router's logits are computed in `dtype`, their softmax in float32; the top-k
        probabilities are divided by their sum and cast to `dtype`; the sum over experts runs in
        float32.
        """
        c = self.config
        router_logits = self.router(x)
        probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(probs, c.top_k)
        top = (top / top.sum(axis=-1, keepdims=True)).astype(self.dtype)

        tokens = x.reshape(-1, c.width)
        top, chosen = top.reshape(-1, c.top_k), chosen.reshape(-1, c.top_k)
        gate, up, down = self._expert_weights()
        if len(tokens) <= FEW_TOKENS:
            out = _few_tokens(tokens, top, chosen, gate, up, down)
        else:
            out = _sorted_tokens(tokens, top, chosen, gate, up, down, self.backend)
        return out.astype(self.dtype).reshape(x.shape), router_logits

    def _expert_weights(self):
        """Gate, up and down: per name an array [E, in, out], or a list of E arrays."""
        if not self.split_experts:
            return tuple(w.astype(self.dtype) for w in (self.gate, self.up, self.down))
        weights = zip(*(expert() for expert in self.expert), strict=True)
        return tuple([w.astype(self.dtype) for w in group] for group in weights)


class Expert(nn.Module):
    """The parameters of one expert, `gate`, `up` and `down`, each [in, out]."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self):
        """Returns the three arrays."""
        return tuple(
            self.param(
                name,
                nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
                shape,
                self.param_dtype,
            )
            for name, shape, axes in _weights(self.config)
        )


def _weights(c):
    return (
        ("gate", (c.width, c.mlp_dim), ("embed", "mlp")),
        ("up", (c.width, c.mlp_dim), ("embed", "mlp")),
        ("down", (c.mlp_dim, c.width), ("mlp", "embed")),
    )


def _few_tokens(tokens, top, chosen, gate, up, down):
    """Each chosen expert runs once, over all T tokens; the others' weights are never read."""
    # [T, E]: a token's weight for each expert, 0 where it did not choose it.
    share = jnp.zeros((len(tokens), len(gate)), top.dtype)
    share = share.at[jnp.arange(len(tokens))[:, None], chosen].set(top)
    out = jnp.zeros(tokens.shape, jnp.float32)
    for e in range(len(gate)):

        def run(out, e=e):
            y = (nn.silu(tokens @ gate[e]) * (tokens @ up[e])) @ down[e]
            return out + share[:, e, None].astype(jnp.float32) * y.astype(jnp.float32)

        out = jax.lax.cond((chosen == e).any(), run, lambda out: out, out)
    return out


def _sorted_tokens(tokens, top, chosen, gate, up, down, backend):
    """Sort by expert, three grouped products, un-sort, weighted sum in float32."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=len(gate))
    x = tokens[order // chosen.shape[1]]
    y = nn.silu(grouped_matmul(x, gate, sizes, backend)) * grouped_matmul(x, up, sizes, backend)
    y = grouped_matmul(y, down, sizes, backend)
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("tk,tkw->tw", top.astype(jnp.float32), y.astype(jnp.float32))


def load_balancing_loss(
    router_logits: jax.Array, top_k: int, weights: jax.Array | None = None
) -> jax.Array:
    """Mixtral's auxiliary loss, about `top_k` when the load is balanced; off in the reference.

    E * sum over k and e of (share of tokens whose k-th choice is e) * (mean probability of e),
    over the tokens of all layers together.

    Args:
      router_logits: [num_layers, B, L, E], from `VLlama2.decode(with_router_logits=True)`.
      top_k: experts per token.
      weights: [B, L], 1 for a token that counts and 0 for padding; None counts all.

    Returns:
      A float32 scalar; multiply by the coefficient (0.02 in Mixtral-8x7B-Instruct-v0.1).
    """
    num_experts = router_logits.shape[-1]
    probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    chosen = jax.nn.one_hot(jax.lax.top_k(probs, top_k)[1], num_experts)  # [N, B, L, k, E]
    if weights is None:
        weights = jnp.ones(router_logits.shape[1:3])
    weights = jnp.broadcast_to(weights.astype(jnp.float32), router_logits.shape[:3])
    total = weights.sum()
    share = jnp.einsum("nbl,nblke->ke", weights, chosen) / total
    mean = jnp.einsum("nbl,nble->e", weights, probs) / total
    return num_experts * jnp.sum(share * mean)
