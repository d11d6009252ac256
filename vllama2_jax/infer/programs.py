"""The compiled programs of inference: encode, prefill, decode, logits.

`prefill` compiles once per length bucket. `decode` is one loop that stays on the device until it
is told to look up (`until`), so nothing crosses to the host per token; streaming calls it with a
small `until` again and again, which is the same program.
"""

import functools
from collections.abc import Callable, Iterable

import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.infer.sampling import Sampler, choose
from vllama2_jax.models.axes import Layout, constrain, using
from vllama2_jax.models.cache import CACHE_AXES, KVCache, init_cache
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.parallel.backends import network_options


@flax.struct.dataclass
class Generation:
    """Rows in the middle of being generated; B rows, room for N new tokens.

    Attributes:
      cache: keys and values of everything fed so far (all but each row's newest token).
      tokens: int32 [B, N], the new tokens; undefined from `count` on.
      count: int32, how many tokens every row has (rows that are done repeat their last).
      positions: int32 [B], the rotary position of each row's newest token.
      done: bool [B], rows that have produced a stop id.
      lengths: int32 [B], new tokens of each row, its stop id included.
      seen: bool [B, V], tokens generated so far ([B, 0] where no penalty reads it).
      keys: [B] random keys, one per row, folded with the row's token count at each step.
    """

    cache: KVCache
    tokens: jax.Array
    count: jax.Array
    positions: jax.Array
    done: jax.Array
    lengths: jax.Array
    seen: jax.Array
    keys: jax.Array


@flax.struct.dataclass
class Prompt:
    """Spliced rows on their way into the cache; all int32 [B, L], padded on the right.

    `segment_ids` is 1 on real slots and 0 on padding.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    media_index: jax.Array


class Programs:
    """Jitted functions of one network; parameters are always an argument."""

    def __init__(
        self,
        config: VLlama2Config,
        dtype,
        split_experts: bool = False,
        layout: Layout | None = None,
        devices: Iterable[jax.Device] = (),
    ):
        """Prepare (not compile) the programs.

        Args:
          config: of the network.
          dtype: of activations.
          split_experts: see `models/stacking.py`.
          layout: how arrays are split over several devices; None is one. Over the shape of a mesh
            alone they can be traced, and caches be abstract.
          devices: the one device, without a layout; by default JAX's first.
        """
        self.config, self.dtype, self.layout = config, dtype, layout
        self._caches: dict[tuple[int, int], Callable] = {}
        options = network_options(config, layout, devices)
        self.network = VLlama2(
            config, dtype=dtype, scan_layers=False, split_experts=split_experts, **options
        )
        # float32 means float32: accelerators would otherwise multiply in TF32 or bf16 passes.
        precision = "highest" if dtype == jnp.float32 else None
        jit = functools.partial(_jit_with_precision, precision)
        self.encode = jit(self._encode)
        self.hear = jit(self._hear)
        self.logits = jit(self._logits)
        self.prefill = jit(self._prefill, donate_argnames="cache")
        self.start = jit(self._start, static_argnames="room")
        self.decode = jit(self._decode, donate_argnames="state")

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache, which lies where the layout has its parts."""
        make = functools.partial(init_cache, self.config.decoder, rows, capacity, self.dtype)
        if self.layout is None:
            return make()
        if (rows, capacity) not in self._caches:  # a program of its own for each size
            where = jax.tree.map(lambda x: x.sharding, self.abstract_cache(rows, capacity))
            self._caches[rows, capacity] = jax.jit(make, out_shardings=where)
        return self._caches[rows, capacity]()

    def abstract_cache(self, rows: int, capacity: int) -> KVCache:
        """Shapes of a cache, which know where they lie; needs a layout."""
        shapes = jax.eval_shape(
            functools.partial(init_cache, self.config.decoder, rows, capacity, self.dtype)
        )

        def placed(leaf):
            names = (
                CACHE_AXES[-leaf.ndim :] if leaf.ndim > 2 else (CACHE_AXES[0], None)[: leaf.ndim]
            )
            where = self.layout.sharding(names, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(placed, shapes)

    def _apply(self, params, method, *args):
        with using(self.layout):
            return self.network.apply({"params": params}, *args, method=method)

    def _encode(self, params, frames, clip_frames):
        """uint8 [B, F, S, S, 3], int32 [B, K, T] -> [B, K * num_tokens, W]."""
        return self._apply(params, VLlama2.encode, frames, clip_frames)

    def _hear(self, params, audio):
        """float32 [B, A, frames, 128] -> [B, A * num_sound_tokens, W]."""
        return self._apply(params, VLlama2.hear, audio)

    def _hidden(self, params, prompt: Prompt, media, cache):
        return self._apply(
            params,
            VLlama2.decode,
            prompt.tokens,
            prompt.positions,
            prompt.segment_ids,
            media,
            prompt.media_index,
            cache,
        )

    def _logits(self, params, prompt: Prompt, media):
        """float32 [B, L, V] of whole rows, without a cache."""
        hidden, _ = self._hidden(params, prompt, media, None)
        return self._apply(params, VLlama2.logits, hidden)

    def _prefill(self, params, prompt: Prompt, media, cache: KVCache):
        """Append a prompt; returns the last real slot's logits [B, V] and the cache."""
        hidden, cache = self._hidden(params, prompt, media, cache)
        last = jnp.maximum(jnp.sum(prompt.segment_ids != 0, axis=1) - 1, 0)
        hidden = jax.vmap(lambda row, index: row[index])(hidden, last)
        return self._apply(params, VLlama2.logits, hidden), cache

    def _start(self, logits, cache, positions, keys, sampler: Sampler, stop_ids, room: int):
        """The state that holds each row's first new token, chosen from the prompt's logits."""
        rows, vocab = logits.shape
        seen = jnp.zeros((rows, vocab if sampler.penalises else 0), bool)
        token = choose(logits, seen, jax.vmap(jax.random.fold_in, (0, None))(keys, 0), sampler)
        state = Generation(
            cache=cache,
            tokens=jnp.zeros((rows, room), jnp.int32).at[:, 0].set(token),
            count=jnp.int32(1),
            positions=positions,
            done=jnp.isin(token, stop_ids),
            lengths=jnp.ones((rows,), jnp.int32),
            seen=_mark(seen, token),
            keys=keys,
        )
        return self._readable(state)

    def _readable(self, state: Generation) -> Generation:
        """The same, with what the host reads whole on every device, and so in every process."""
        read = {name: getattr(state, name) for name in ("tokens", "count", "done", "lengths")}
        with using(self.layout):
            whole = {name: constrain(x, *[None] * x.ndim) for name, x in read.items()}
        return state.replace(**whole)

    def _decode(self, params, state: Generation, sampler: Sampler, stop_ids, until) -> Generation:
        """Generate until every row is done or has `until` tokens, without leaving the device."""

        def unfinished(state):
            return (state.count < until) & ~jnp.all(state.done)

        def step(state):
            newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
            hidden, cache = self._apply(
                params,
                VLlama2.decode,
                newest,
                state.positions[:, None],
                jnp.where(state.done, 0, 1)[:, None],
                None,
                None,
                state.cache,
            )
            logits = self._apply(params, VLlama2.logits, hidden[:, 0])
            keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
            token = choose(logits, state.seen, keys, sampler)
            token = jnp.where(state.done, newest[:, 0], token)
            return state.replace(
                cache=cache,
                tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
                count=state.count + 1,
                positions=state.positions + 1,
                done=state.done | jnp.isin(token, stop_ids),
                lengths=state.lengths + ~state.done,
                seen=_mark(state.seen, token),
            )

        return self._readable(jax.lax.while_loop(unfinished, step, state))


def _mark(seen: jax.Array, token: jax.Array) -> jax.Array:
    if seen.shape[1] == 0:
        return seen
    return seen.at[jnp.arange(seen.shape[0]), token].set(True)


def _jit_with_precision(precision, function, **kwargs):
    @functools.wraps(function)
    def with_precision(*args, **arguments):
        with jax.default_matmul_precision(precision):
            return function(*args, **arguments)

    return jax.jit(with_precision, **kwargs)
