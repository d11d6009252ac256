"""How tokens meet their experts, on one device and on many.

`Placement` says who computes what. A token and one of the experts that it chose are a pair. Pairs
are sorted by expert, so that each expert meets its own in one run of rows; `Pairs` says which row
is which pair's. Sorting and its undoing are gathers, and so are their gradients.

Where experts and tokens are split over the same devices, tokens travel (`exchange`), by "ring" or
"all_to_all". Neither drops one: buffers hold the worst case, in which every token of the group
chose experts of the same device.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vllama2_jax.models.axes import divisible, layout_in_force
from vllama2_jax.models.config import DecoderConfig

EXCHANGES = ("ring", "all_to_all")

# At most this many tokens: each expert that anyone chose runs over all of them, without sorting.
FEW_TOKENS = 16

# Maps tokens [T, W], their weights [T, k] and experts [T, k], numbers among this device's own (any
# other number is another's), to float32 [T, W]; the last argument is the most pairs that can be its
# own.
Experts = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


class Placement(NamedTuple):
    """Who computes what, by logical names and by axes of the mesh; all empty without a layout.

    Attributes:
      names: {name: itself, or None where it does not split its axis evenly} of the kernels' axes.
      tokens: names of the axes of [B, L, W].
      few: whether so few tokens meet that they skip the sort.
      kept: names of kernels' axes that stay split. Others are split over the same devices as the
        tokens, and their parts are gathered before the products.
      expert: mesh axes of the experts.
      exchanged: whether tokens are split over them too, and have to travel.
      inputs: mesh axes over whose devices the first two products are summed, since each has a part
        of the tokens' width.
      outputs: likewise of the last product, of whose inputs or experts each has a part.
    """

    names: dict[str, str | None]
    tokens: tuple[str | None, ...]
    few: bool
    kept: tuple[str, ...]
    expert: tuple[str, ...]
    exchanged: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, config: DecoderConfig, batch: int, length: int) -> "Placement":
        """The placement that the layout in force makes of [B, L] tokens.

        Raises:
          ValueError: if the mesh does not split the experts evenly.
        """
        layout = layout_in_force()
        sizes = {
            "expert": config.num_experts,
            "expert_embed": config.width,
            "mlp": config.mlp_dim,
        }
        parts = {name: layout.size(name) if layout else 1 for name in (*sizes, "batch")}
        axes = {name: layout.axes(name) if layout else () for name in (*sizes, "batch", "length")}
        if config.num_experts % parts["expert"]:
            raise ValueError(
                f"{config.num_experts} experts cannot be split over {parts['expert']} devices; "
                "give the mesh's axis of experts a size that divides them"
            )
        names = {name: name if size % parts[name] == 0 else None for name, size in sizes.items()}
        axes |= {name: () for name, fits in names.items() if fits is None}

        # A few tokens meet where the weights are: weights stay, and tokens are on all devices that
        # share one set of them. So do rows or slots that do not divide, as those of one question.
        split = divisible("batch", batch), divisible("length", length)
        apart = not {*axes["batch"]} & {*axes["expert"], *axes["expert_embed"], *axes["mlp"]}
        apart = apart and split[0] is not None
        few = batch * length // (parts["batch"] if apart else 1) <= FEW_TOKENS
        rows = (split[0] if apart or not few else None, None if few else split[1])
        taken = {axis for name in rows if name for axis in axes[name]}

        gathered = [name for name in ("expert_embed", "mlp") if taken & {*axes[name]}]
        axes |= dict.fromkeys(gathered, ())
        exchanged = bool(taken & {*axes["expert"]})
        return cls(
            names,
            (*rows, names["expert_embed"] if axes["expert_embed"] else None),
            few,
            tuple(name for name in sizes if name not in gathered),
            axes["expert"],
            exchanged,
            axes["expert_embed"],
            axes["mlp"] + (() if exchanged else axes["expert"]),
        )


class Pairs(NamedTuple):
    """N pairs and the R rows that those of one device's experts take, sorted by expert.

    Attributes:
      of_row: int32 [R]; the pair of each row, N for a row that is left over.
      of_pair: int32 [N]; the row of each pair, R for one of another device's experts.
      sizes: int32 [E]; rows of each expert.
    """

    of_row: jax.Array
    of_pair: jax.Array
    sizes: jax.Array


def sort_pairs(experts: jax.Array, num_experts: int, num_rows: int) -> Pairs:
    """Sort pairs by expert.

    Args:
      experts: int32 [N]; numbers outside [0, num_experts) are of other devices.
      num_experts: of this device.
      num_rows: R, at least the number of pairs of this device.
    """
    own = (experts >= 0) & (experts < num_experts)
    order = jnp.argsort(jnp.where(own, experts, num_experts))
    place = jnp.argsort(order)
    sizes = (experts[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    total = sizes.sum()
    return Pairs(
        jnp.where(jnp.arange(num_rows) < total, order[:num_rows], len(experts)),
        jnp.where(place < total, place, num_rows),
        sizes,
    )


def to_rows(values: jax.Array, pairs: Pairs) -> jax.Array:
    """Values [V, ...] of pairs in the order of rows [R, ...]; zeros where none is.

    Where N is a multiple of V, pairs n, n + V ... share a value.
    """
    return _take(values, pairs.of_row, pairs.of_pair, len(values))


def to_pairs(rows: jax.Array, pairs: Pairs) -> jax.Array:
    """Rows [R, ...] in the order of pairs [N, ...]; zeros for those of other devices' experts."""
    return _take(rows, pairs.of_pair, pairs.of_row, len(rows))


def sum_of_pairs(rows: jax.Array, pairs: Pairs, num_tokens: int) -> jax.Array:
    """Rows [R, W] summed over each token's pairs, n, n + T ...: float32 [T, W]."""
    out = to_pairs(rows, pairs).reshape(-1, num_tokens, rows.shape[-1])
    return out.sum(0, dtype=jnp.float32)


def to_add(out: jax.Array, top_k: int, dtype) -> jax.Array:
    """What devices sum up of a token's experts, float32 [T, W], as it travels.

    Two numbers of `dtype` add up to the same, rounded once, in `dtype` and in float32, and nothing
    is lost beside zeros. More would be rounded again and again.
    """
    return out.astype(dtype) if top_k <= 2 else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(values, index, back, count):
    """values[index % count], 0 past the end; `back` undoes it, so that the gradient is a gather."""
    index = jnp.where(index < len(back), index % count, count)
    return values.at[index].get(mode="fill", fill_value=0)


def _take_forward(values, index, back, count):
    return _take(values, index, back, count), (index, back)


def _take_backward(count, residuals, grad):
    index, back = residuals
    copies = _take(grad, back, index, len(grad))
    copies = copies.reshape(-1, count, *grad.shape[1:])
    return copies.sum(0, dtype=jnp.float32).astype(grad.dtype), None, None


_take.defvjp(_take_forward, _take_backward)


def exchange(
    tokens: jax.Array,
    top: jax.Array,
    chosen: jax.Array,
    experts: Experts,
    num_experts: int,
    axes: tuple[str, ...],
    how: str,
) -> jax.Array:
    """Have each token's experts applied to it, wherever they are; called inside `per_device`.

    Args:
      tokens: [T, W], this device's.
      top: [T, k], the weights of their experts.
      chosen: int32 [T, k], these experts, numbers among all.
      experts: what this device's own experts do.
      num_experts: of this device.
      axes: mesh axes over which the experts are split; the tokens are too.
      how: "ring" (every device meets all tokens of the group, and sums of what it did for them go
        back: an all-gather and a reduce-scatter, which the hardware does in a ring), or
        "all_to_all" (each pair travels to its expert and back).

    Returns:
      [T, W], the sum over each token's experts in the dtype of `tokens`.
    """
    dtype, top_k = tokens.dtype, chosen.shape[1]
    own = jax.lax.axis_index(axes) * num_experts
    devices = jax.lax.axis_size(axes)
    most = devices * len(tokens) * min(top_k, num_experts)
    if how == "ring":
        tokens, top, chosen = (
            jax.lax.all_gather(array, axes, tiled=True) for array in (tokens, top, chosen)
        )
        out = experts(tokens, top, chosen - own, most)
        return jax.lax.psum_scatter(to_add(out, top_k, dtype), axes, tiled=True).astype(dtype)

    pairs = sort_pairs(chosen.T.reshape(-1), devices * num_experts, chosen.size)
    sizes = jax.lax.all_gather(pairs.sizes, axes).reshape(devices, devices, num_experts)
    post = _post(sizes.sum(-1), jax.lax.axis_index(axes))
    there = (chosen.size, most)
    rows = _send(to_rows(tokens, pairs), post, there, axes, False)
    weights = _send(to_rows(top.T.reshape(-1, 1), pairs), post, there, axes, True)
    out = experts(rows, weights, _received_experts(sizes[:, post.me], most)[:, None], most)
    rows = _send(out.astype(dtype), post.returning(), there[::-1], axes, False)
    return sum_of_pairs(rows, pairs, len(tokens)).astype(dtype)


def _received_experts(sizes, num_rows):
    """Experts int32 [num_rows] of rows that came sorted by sender, then expert: sizes [n, E]."""
    devices, num_experts = sizes.shape
    experts = jnp.tile(jnp.arange(num_experts), devices)
    experts = jnp.repeat(experts, sizes.reshape(-1), total_repeat_length=num_rows)
    return jnp.where(jnp.arange(num_rows) < sizes.sum(), experts, num_experts)


class Post(NamedTuple):
    """Which rows go from which of n devices to which: [n, n] arrays, by sender and receiver.

    Attributes:
      sizes: how many; they are neighbours.
      sent_at: the first one's place among the sender's rows.
      received_at: its place among the receiver's.
      me: the number of this device.
    """

    sizes: jax.Array
    sent_at: jax.Array
    received_at: jax.Array
    me: jax.Array

    def returning(self) -> "Post":
        """The way back."""
        return Post(self.sizes.T, self.received_at.T, self.sent_at.T, self.me)


def _post(sizes, me):
    """Rows lie one behind the other: at the sender by receiver, at the receiver by sender."""
    return Post(sizes, jnp.cumsum(sizes, 1) - sizes, jnp.cumsum(sizes, 0) - sizes, me)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _send(rows, post, counts, axes, whole):
    """What this device receives for `rows`, zeros behind the last; `counts` are of rows of both.

    With `whole`, and on CPUs, which have no ragged exchange, every device gets all rows and takes
    what is its own.
    """
    num_rows = counts[1]

    def ragged(rows, post):
        return jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype),
            post.sent_at[post.me],
            post.sizes[post.me],
            post.received_at[post.me],
            post.sizes[:, post.me],
            axis_name=axes,
        )

    def gathered(rows, post):
        sizes, sent_at, received_at = (a[:, post.me, None] for a in post[:3])
        behind = jnp.arange(num_rows) - received_at  # [n, num_rows], the first row of each sender
        place = sent_at + behind + len(rows) * jnp.arange(len(sizes))[:, None]
        place = jnp.where((behind >= 0) & (behind < sizes), place, 0).sum(0)
        place = jnp.where(jnp.arange(num_rows) < sizes.sum(), place, len(sizes) * len(rows))
        rows = jax.lax.all_gather(rows, axes, tiled=True)
        return rows.at[place].get(mode="fill", fill_value=0)

    if whole:
        return gathered(rows, post)
    return jax.lax.platform_dependent(rows, post, cpu=gathered, default=ragged)


def _send_forward(rows, post, counts, axes, whole):
    return _send(rows, post, counts, axes, whole), post


def _send_backward(counts, axes, whole, post, grad):
    return _send(grad, post.returning(), counts[::-1], axes, whole), None


_send.defvjp(_send_forward, _send_backward)
