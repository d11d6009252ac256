"""A mixture of SwiGLU experts without capacity: no token is ever dropped.

Formulas: `transformers`' modeling_mixtral.py. `docs/decisions/moe-layout.md` holds the measurements
behind the backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.grouped_matmul import grouped_matmul
from vllama2_jax.models.linear import Linear
from vllama2_jax.models.lora import LORA_A, low_rank
from vllama2_jax.models.quantized import multiply_quantized, quantized_parts

# At most this many tokens: each expert that anyone chose runs over all of them, without sorting.
FEW_TOKENS = 16


class Weight(NamedTuple):
    """One of the three products, of all experts or of one.

    Attributes:
      shape: of the kernel, [E, in, out] or [in, out].
      kernel: an array, a list of E arrays [in, out], or the parts of a quantised one.
      adapter: None, or A [E, in, rank] and B [E, rank, out], for one without E (see `lora.py`).
    """

    shape: tuple[int, ...]
    kernel: Any
    adapter: tuple[jax.Array, jax.Array] | None = None

    def of_expert(self, e: int) -> "Weight":
        """Expert e's."""
        if isinstance(self.kernel, dict):
            kernel = {part: array[e] for part, array in self.kernel.items()}
        else:
            kernel = self.kernel[e]
        adapter = self.adapter and tuple(matrices[e] for matrices in self.adapter)
        return Weight(self.shape[1:], kernel, adapter)

    def times(self, x: jax.Array, product: Callable) -> jax.Array:
        """x W, and x A B where there is an adapter; `product` is what multiplies."""
        if isinstance(self.kernel, dict):
            y = multiply_quantized(product, x, self.kernel, self.shape, x.dtype)
        else:
            y = product(x, self.kernel)
        if self.adapter is None:
            return y
        a, b = self.adapter
        return y + product(product(x, a), b)


class MoE(nn.Module):
    """Router, top-k experts, weighted sum.

    Attributes:
      config: shapes.
      dtype: of the matrix products.
      param_dtype: of the parameters.
      backend: of the grouped matrix product, see `grouped_matmul`.
      split_experts: parameters are `expert_0/gate` [in, out] ... instead of `gate` [E, in, out].
        Only the latter may be adapted or quantised.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    backend: str
    split_experts: bool

    @nn.compact
    def __call__(self, x):
        """Transform `x` [B, L, W]; returns it and the router's logits [B, L, E].

        The router's logits are computed in `dtype`, their softmax in float32; the top-k
        probabilities are divided by their sum and cast to `dtype`; the sum over experts runs in
        float32.
        """
        c = self.config
        router_logits = Linear(
            (c.num_experts,),
            ("embed", "router"),
            self.dtype,
            self.param_dtype,
            dot_general=jax.lax.dot_general,
            name="router",
        )(x)
        probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(probs, c.top_k)
        top = (top / top.sum(axis=-1, keepdims=True)).astype(self.dtype)

        tokens = x.reshape(-1, c.width)
        top, chosen = top.reshape(-1, c.top_k), chosen.reshape(-1, c.top_k)
        weights = self._split_weights() if self.split_experts else self._weights()
        if len(tokens) <= FEW_TOKENS:
            out = _few_tokens(tokens, top, chosen, *weights)
        else:
            out = _sorted_tokens(tokens, top, chosen, *weights, self.backend)
        return out.astype(self.dtype).reshape(x.shape), router_logits

    def _weights(self):
        """Gate, up and down."""
        weights = []
        for name, shape, axes in _kernels(self.config):
            shape = (self.config.num_experts, *shape)
            kernel = quantized_parts(self, name)
            if kernel is None:
                init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("expert", *axes))
                kernel = self.param(name, init, shape, self.param_dtype).astype(self.dtype)
            weights.append(Weight(shape, kernel, low_rank(self, name, self.dtype)))
        return weights

    def _split_weights(self):
        """Gate, up and down of arrays that every expert has for itself."""
        c = self.config
        if any(self.has_variable("params", name + LORA_A) for name, _, _ in _kernels(c)):
            raise ValueError("split_experts=True takes no adapters; merge them into the kernels")
        experts = [Expert(c, self.param_dtype, name=f"expert_{e}")() for e in range(c.num_experts)]
        return [
            Weight((c.num_experts, *shape), [kernel.astype(self.dtype) for kernel in group])
            for group, (_, shape, _) in zip(zip(*experts, strict=True), _kernels(c), strict=True)
        ]


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
            for name, shape, axes in _kernels(self.config)
        )


def _kernels(c):
    return (
        ("gate", (c.width, c.mlp_dim), ("expert_embed", "mlp")),
        ("up", (c.width, c.mlp_dim), ("expert_embed", "mlp")),
        ("down", (c.mlp_dim, c.width), ("mlp", "expert_embed")),
    )


def _few_tokens(tokens, top, chosen, gate, up, down):
    """Each chosen expert runs once, over all T tokens; the others' weights are never read."""
    num_experts = gate.shape[0]
    # [T, E]: a token's weight for each expert, 0 where it did not choose it.
    share = jnp.zeros((len(tokens), num_experts), top.dtype)
    share = share.at[jnp.arange(len(tokens))[:, None], chosen].set(top)
    out = jnp.zeros(tokens.shape, jnp.float32)
    for e in range(num_experts):

        def run(out, e=e):
            y = nn.silu(gate.of_expert(e).times(tokens, jnp.matmul))
            y = y * up.of_expert(e).times(tokens, jnp.matmul)
            y = down.of_expert(e).times(y, jnp.matmul)
            return out + share[:, e, None].astype(jnp.float32) * y.astype(jnp.float32)

        out = jax.lax.cond((chosen == e).any(), run, lambda out: out, out)
    return out


def _sorted_tokens(tokens, top, chosen, gate, up, down, backend):
    """Sort by expert, three grouped products, un-sort, weighted sum in float32."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=gate.shape[0])

    def product(x, kernel):
        return grouped_matmul(x, kernel, sizes, backend)

    x = tokens[order // chosen.shape[1]]
    y = nn.silu(gate.times(x, product)) * up.times(x, product)
    y = down.times(y, product)
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
