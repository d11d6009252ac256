"""Choosing the next token from logits, on the device."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token; the defaults are greedy.

    Attributes:
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_p: keep the smallest set of most likely tokens that together reach this probability.
      top_k: keep this many most likely tokens; 0 keeps all.
      repetition_penalty: logits of tokens generated before are divided by it where positive and
        multiplied where negative (also when greedy), as transformers does.
      seed: of the random numbers; the same seed gives the same answer in any batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Refuse values without a meaning."""
        checks = (
            (self.temperature >= 0, f"temperature must be 0 or more, not {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty must be positive, not {self.repetition_penalty}",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)


@flax.struct.dataclass
class Sampler:
    """`Sampling` for a compiled program: numbers are traced, what to compute at all is static."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    repetition_penalty: jax.Array
    greedy: bool = flax.struct.field(pytree_node=False)
    filters: bool = flax.struct.field(pytree_node=False)  # sort the vocabulary for top-p or top-k
    penalises: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, sampling: Sampling) -> "Sampler":
        """Split a `Sampling` into its traced and static parts."""
        greedy = sampling.temperature == 0
        return cls(
            temperature=jnp.float32(sampling.temperature or 1.0),
            top_p=jnp.float32(sampling.top_p),
            top_k=jnp.int32(sampling.top_k),
            repetition_penalty=jnp.float32(sampling.repetition_penalty),
            greedy=greedy,
            filters=not greedy and (sampling.top_p < 1 or sampling.top_k > 0),
            penalises=sampling.repetition_penalty != 1,
        )


def choose(logits: jax.Array, seen: jax.Array, keys: jax.Array, sampler: Sampler) -> jax.Array:
    """The next token of each row.

    Filters apply in transformers' order: penalty, temperature, top-k, top-p.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], the tokens generated so far (read only with a penalty).
      keys: [B] random keys of this step (read only when sampling).
      sampler: how.

    Returns:
      int32 [B].
    """
    if sampler.penalises:
        penalty = sampler.repetition_penalty
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if sampler.filters:
        logits = _keep_likely(logits, sampler.top_k, sampler.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Set the logits outside top-k, then outside top-p of the rest, to minus infinity."""
    vocab = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    kth = ranked[:, jnp.where(top_k > 0, jnp.minimum(top_k, vocab) - 1, vocab - 1)][:, None]
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token always stays: nothing stands before it.
    lowest = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
