"""A mixture of SwiGLU experts without capacity: no token is ever dropped.

Formulas: `transformers`' modeling_mixtral.py. Under a layout (`axes.py`) the router is split by
XLA; behind it every device works on its own and says itself what it exchanges (`per_device`).
`docs/decisions/moe-layout.md` holds the layouts, what they cost, and measurements of the backends.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.models.axes import (
    constrain,
    gather,
    layout_in_force,
    per_device,
    sum_of_shares,
)
from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.expert_parallel import (
    EXCHANGES,
    Placement,
    exchange,
    sort_pairs,
    sum_of_pairs,
    to_add,
    to_rows,
)
from vllama2_jax.models.grouped_matmul import grouped_matmul
from vllama2_jax.models.linear import Linear
from vllama2_jax.models.lora import LORA_A, adapter_names, low_rank
from vllama2_jax.models.quantized import (
    dequantize,
    multiply_quantized,
    quantized_names,
    quantized_parts,
    with_own_constants,
)


@flax.struct.dataclass
class Weight:
    """One of the three products, of all experts or of one.

    Attributes:
      kernel: an array [E, in, out] or [in, out], a tuple of E arrays [in, out], or the parts of a
        quantised one.
      adapter: None, or A [E, in, rank] and B [E, rank, out], for one without E (see `lora.py`).
    """

    kernel: Any
    adapter: tuple[jax.Array, jax.Array] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        parts = isinstance(self.kernel, dict)
        return len(next(iter(self.kernel.values())) if parts else self.kernel)

    def of_expert(self, e: int) -> "Weight":
        """Expert e's."""
        if isinstance(self.kernel, tuple):
            return Weight(self.kernel[e])
        return jax.tree.map(lambda array: array[e], self)

    def times(self, x: jax.Array, product: Callable) -> jax.Array:
        """x W, and x A B where there is an adapter; `product` is what multiplies."""
        if isinstance(self.kernel, dict):
            y = multiply_quantized(product, x, self.kernel, None, x.dtype)
        else:
            y = product(x, self.kernel)
        if self.adapter is None:
            return y
        a, b = self.adapter
        return y + product(product(x, a), b)

    def named(self, names: tuple[str | None, ...]) -> "Weight":
        """Names of axes in the place of arrays, from those of a kernel [E, in, out]."""
        kernel = names
        if isinstance(self.kernel, tuple):
            kernel = (names[1:],) * len(self.kernel)
        elif isinstance(self.kernel, dict):
            kernel = {part: quantized_names(names, 1, 1)[part] for part in self.kernel}
        return Weight(kernel, self.adapter and adapter_names(names, 1, 1))


class MoE(nn.Module):
    """Router, top-k experts, weighted sum.

    Attributes:
      config: shapes.
      dtype: of the matrix products.
      param_dtype: of the parameters.
      backend: of the grouped matrix product, see `grouped_matmul`.
      split_experts: parameters are `expert_0/gate` [in, out] ... instead of `gate` [E, in, out].
        Only the latter may be adapted, quantised, or split over devices by expert.
      exchange: how tokens travel to experts of other devices, see `expert_parallel.exchange`.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    backend: str
    split_experts: bool
    exchange: str = "ring"

    @nn.compact
    def __call__(self, x):
        """Transform `x` [B, L, W]; returns it and the router's logits [B, L, E].

        The router's logits are computed in `dtype`, their softmax in float32; the top-k
        probabilities are divided by their sum and cast to `dtype`. What they weigh is the input of
        the last product, so that the backward pass need not compute its output again. The sum over
        experts runs in float32.

        Raises:
          ValueError: for an unknown exchange, or experts that the mesh cannot split.
        """
        c = self.config
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"unknown exchange of experts {self.exchange!r}; known: {', '.join(EXCHANGES)}"
            )
        router_logits = Linear(
            (c.num_experts,),
            ("embed", "router"),
            self.dtype,
            self.param_dtype,
            dot_general=jax.lax.dot_general,
            name="router",
        )(x)
        router_logits = constrain(router_logits, "batch", "length", None)
        probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(probs, c.top_k)
        top = (top / top.sum(axis=-1, keepdims=True)).astype(self.dtype)

        place = Placement.of(c, *x.shape[:2])
        weights = self._split_weights(place) if self.split_experts else self._weights()
        names = tuple(
            weight.named(tuple(place.names[name] for name in axes))
            for weight, (_, _, axes) in zip(weights, _kernels(c), strict=True)
        )
        rows = (*place.tokens[:2], None)
        layout = layout_in_force()
        run = functools.partial(_experts, layout, names, place, self.backend, self.exchange)
        run = per_device(run, (place.tokens, rows, rows, names), place.tokens)
        return run(x, top, chosen, weights), router_logits

    def _weights(self):
        """Gate, up and down, ready to be split."""
        layout, weights = layout_in_force(), []
        for name, shape, axes in _kernels(self.config):
            kernel = quantized_parts(self, name)
            if kernel is None:
                init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
                kernel = self.param(name, init, shape, self.param_dtype).astype(self.dtype)
            elif layout:
                kernel = with_own_constants(kernel)
                if "nf4" in kernel and kernel["nf4"].shape[1] % layout.size(axes[1]):
                    kernel = dequantize(kernel, self.dtype)  # no block can be cut
            weights.append(Weight(kernel, low_rank(self, name, self.dtype)))
        return tuple(weights)

    def _split_weights(self, place):
        """The same, of arrays that every expert has for itself."""
        c = self.config
        if any(self.has_variable("params", name + LORA_A) for name, _, _ in _kernels(c)):
            raise ValueError("split_experts=True takes no adapters; merge them into the kernels")
        if place.expert:
            raise ValueError(
                "split_experts=True keeps experts in arrays of their own, which a mesh cannot "
                "split; use split_experts=False"
            )
        experts = [Expert(c, self.param_dtype, name=f"expert_{e}")() for e in range(c.num_experts)]
        return tuple(
            Weight(tuple(kernel.astype(self.dtype) for kernel in group))
            for group in zip(*experts, strict=True)
        )


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
                nn.with_logical_partitioning(nn.initializers.normal(0.02), axes[1:]),
                shape[1:],
                self.param_dtype,
            )
            for name, shape, axes in _kernels(self.config)
        )


def _kernels(c):
    into, out = (c.num_experts, c.width, c.mlp_dim), (c.num_experts, c.mlp_dim, c.width)
    return (
        ("gate", into, ("expert", "expert_embed", "mlp")),
        ("up", into, ("expert", "expert_embed", "mlp")),
        ("down", out, ("expert", "mlp", "expert_embed")),
    )


def _experts(layout, names, place, backend, how, x, top, chosen, weights):
    """What the experts make of one device's tokens [B, L, W], from its parts of the weights."""
    width, k = x.shape[-1], chosen.shape[-1]
    tokens, top, chosen = x.reshape(-1, width), top.reshape(-1, k), chosen.reshape(-1, k)
    whole = functools.partial(gather, layout=layout, kept=place.kept)
    weights = jax.tree.map(whole, weights, names)
    num_experts = weights[0].num_experts
    run = functools.partial(_sorted_tokens, *weights, place.inputs, backend)
    if place.exchanged:
        out = exchange(tokens, top, chosen, run, num_experts, place.expert, how)
    else:
        if place.expert:
            chosen -= num_experts * jax.lax.axis_index(place.expert)
        if place.few:
            out = _few_tokens(*weights, place.inputs, tokens, top, chosen)
        else:
            out = run(tokens, top, chosen, len(tokens) * min(k, num_experts))
    if place.outputs:
        # Over columns alone it is of rounded products, as in dense layers.
        of_experts = {*place.expert} & {*place.outputs}
        out = to_add(out, k, x.dtype) if of_experts else out.astype(x.dtype)
        out = sum_of_shares(out, place.outputs)
    return out.astype(x.dtype).reshape(x.shape)


def _hidden(gate, up, top, inputs):
    """silu(gate) * up, times the weight of the expert for the token; sums over mesh axes first."""
    if inputs:
        gate, up = jax.lax.psum((gate, up), inputs)
    hidden = (nn.silu(gate) * up).astype(jnp.float32) * top[..., None].astype(jnp.float32)
    return hidden.astype(gate.dtype)


def _few_tokens(gate, up, down, inputs, tokens, top, chosen):
    """Each chosen expert runs once, over all T tokens; the others' weights are never read.

    Returns float32 [T, W], as `_sorted_tokens` does.
    """
    asked = [(chosen == e).any() for e in range(gate.num_experts)]

    def enter(e):
        return jnp.stack([w.of_expert(e).times(tokens, jnp.matmul) for w in (gate, up)])

    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(lambda: enter(0)))
    entered = jnp.stack(
        [
            jax.lax.cond(wanted, functools.partial(enter, e), lambda: nothing)
            for e, wanted in enumerate(asked)
        ]
    )
    # [T, k, 2, mlp] of [E, 2, T, mlp]: what each token needs. Sums over devices are of no more, and
    # stand outside of the conditions, which differ between devices with different experts.
    own = jnp.where((chosen >= 0) & (chosen < len(asked)), chosen, len(asked))
    entered = entered.at[own, :, jnp.arange(len(tokens))[:, None]].get(mode="fill", fill_value=0)
    hidden = _hidden(entered[..., 0, :], entered[..., 1, :], top, inputs)

    def leave(e, out):
        rows = jnp.where((chosen == e)[..., None], hidden, 0).sum(1)
        return out + down.of_expert(e).times(rows, jnp.matmul).astype(jnp.float32)

    out = jnp.zeros(tokens.shape, jnp.float32)
    for e, wanted in enumerate(asked):
        out = jax.lax.cond(wanted, functools.partial(leave, e), lambda out: out, out)
    return out


def _sorted_tokens(gate, up, down, inputs, backend, tokens, top, chosen, most):
    """Sort by expert, three grouped products, un-sort, sum in float32; at most `most` rows."""
    pairs = sort_pairs(chosen.T.reshape(-1), gate.num_experts, most)

    def product(x, kernel):
        return grouped_matmul(x, kernel, pairs.sizes, backend)

    x = to_rows(tokens, pairs)
    hidden = _hidden(
        gate.times(x, product), up.times(x, product), to_rows(top.T.reshape(-1), pairs), inputs
    )
    return sum_of_pairs(down.times(hidden, product), pairs, len(tokens))


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
