"""The key-value cache of a decoder, as a pytree."""

import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.models.config import DecoderConfig

# Names of the axes of keys and values; a single row has no first.
CACHE_AXES = ("batch", "kv_heads", None, "head_dim")


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, S slots per row.

    All rows share the next free slot `end`. A prompt is padded on the right to its bucket; its
    padded slots keep segment 0, so nothing ever sees them. Later tokens of every row go to the
    shared slot `end`, while `positions` counts per row. Thus rows of unequal length need one
    `dynamic_update_slice`. The caller keeps `end` within the capacity: a write past it cannot
    raise inside a compiled program, and would overwrite the last slots.
    """

    keys: tuple[jax.Array, ...]  # per layer [B, KV, S, D], or [KV, S, D] if B is 1; rotated
    values: tuple[jax.Array, ...]  # as keys
    positions: jax.Array  # int32 [B, S]
    segments: jax.Array  # int32 [B, S]; 0 = empty or padding
    end: jax.Array  # int32 [], the next free slot

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.positions.shape[1]

    def claim(self, positions: jax.Array, segments: jax.Array) -> "KVCache":
        """Enter L new tokens' positions and segments [B, L] at `end`, without moving `end`.

        Raises:
          ValueError: if L alone exceeds the capacity.
        """
        if positions.shape[1] > self.capacity:
            raise ValueError(
                f"{positions.shape[1]} tokens do not fit a cache of {self.capacity} slots; "
                "make it larger with init_cache(capacity=...)"
            )
        start = (jnp.int32(0), self.end)
        return self.replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
            segments=jax.lax.dynamic_update_slice(self.segments, segments, start),
        )

    def grow(self, slots: int) -> "KVCache":
        """The same cache with room for `slots` more; copies it."""

        def pad(kv):
            return jnp.pad(kv, [*[(0, 0)] * (kv.ndim - 2), (0, slots), (0, 0)])

        return self.replace(
            keys=tuple(pad(k) for k in self.keys),
            values=tuple(pad(v) for v in self.values),
            positions=jnp.pad(self.positions, ((0, 0), (0, slots))),
            segments=jnp.pad(self.segments, ((0, 0), (0, slots))),
        )


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype=jnp.float32) -> KVCache:
    """An empty cache for `batch` rows of `capacity` slots; keys and values in `dtype`."""
    shape = (config.num_kv_heads, capacity, config.head_dim)
    # A batch axis of 1 would make XLA on CPU copy the cache per token: it drops the axis in front
    # of the attention product, and fuses the update a second time into that reshape.
    if batch > 1:
        shape = (batch, *shape)
    return KVCache(
        # One buffer per leaf, so that the whole cache can be donated.
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        segments=jnp.zeros((batch, capacity), jnp.int32),
        end=jnp.zeros((), jnp.int32),
    )
