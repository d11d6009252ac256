"""What training minimises, as sums over tokens, so that the parts of a batch add up to the whole.

The float32 logits of a row are its largest array by far: 4 rows of 2,048 slots over Qwen2's 152,064
ids take 5 GB, and their gradient as much again. `chunked_cross_entropy` never holds them whole.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.models.axes import gather, layout_in_force, per_device
from vllama2_jax.models.moe import load_balancing_loss
from vllama2_jax.models.vllama2 import Batch, VLlama2
from vllama2_jax.parallel.sharding import leaf_axes


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross entropy, and how it is computed; the defaults are the original's.

    Attributes:
      chunk: slots of every row whose logits stand in memory at a time; None takes rows whole.
      z_loss: coefficient of (log Z)^2, Z being the softmax's denominator (PaLM, section 5: 1e-4).
      load_balancing: coefficient of `moe.load_balancing_loss`. Mixtral-8x7B-Instruct-v0.1 names
        0.02 in its config.json, but the original never adds it.
    """

    chunk: int | None = 256
    z_loss: float = 0.0
    load_balancing: float = 0.0

    def __post_init__(self):
        """Refuse what cannot be meant."""
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} must be at least 1 slot, or None for whole rows")
        for name in ("z_loss", "load_balancing"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative; 0 is off")


@flax.struct.dataclass
class LossSums:
    """The loss of some rows; those of two halves of a batch add up to the whole batch's.

    Attributes:
      total: float32 scalar, the sum over tokens of weight times loss; what is differentiated.
      weight: float32 scalar, the sum of the weights; `mean` divides by it.
      parts: {name: float32 scalar}, what `total` is made of, summed like it.
      counts: {name: float32 scalar}, of tokens.
    """

    total: jax.Array
    weight: jax.Array
    parts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    counts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def mean(self) -> "LossSums":
        """`total` and `parts` per unit of weight, `weight` 1; all 0 where nothing weighs anything.

        A batch may hold nothing to learn (only bad files): its loss is 0, not NaN.
        """
        scale = reciprocal(self.weight)
        return LossSums(
            total=self.total * scale,
            weight=jnp.sign(self.weight),
            parts={name: value * scale for name, value in self.parts.items()},
            counts=self.counts,
        )


def reciprocal(weight: jax.Array) -> jax.Array:
    """1 / weight, and 0 for a weight of 0."""
    return jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0.0)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target), and the sum of weights, both float32 scalars.

    Args:
      logits: float [..., V]; the softmax runs in float32.
      targets: int32 [...]; anything where the weight is 0.
      weights: float32 [...]; 0 leaves a slot out.
    """
    return (_losses(logits, targets, weights)[0] * weights).sum(), weights.sum()


def _losses(logits, targets, weights, across=()) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and (log Z)^2 of each slot, both 0 where the weight is.

    Where the vocabulary is split over the mesh axes `across`, logits are this device's part.
    """
    logits = logits.astype(jnp.float32)
    if across:
        picked, log_z = _over_parts(logits, targets, across)
    else:
        # An id outside of the vocabulary gives NaN, which counts only where there is a weight.
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = jnp.where(weights > 0, log_z - picked, 0.0)
    squares = jnp.where(weights > 0, log_z, 0.0) ** 2
    return losses, squares


def _over_parts(logits, targets, across) -> tuple[jax.Array, jax.Array]:
    """The target's logit and log Z of logits that are split over mesh axes."""
    size = logits.shape[-1]
    own = targets - size * jax.lax.axis_index(across)
    picked = jnp.take_along_axis(logits, own.clip(0, size - 1)[..., None], axis=-1)[..., 0]
    picked = jax.lax.psum(jnp.where((own >= 0) & (own < size), picked, 0.0), across)
    # By all_gather, since pmax has no derivative, not even one that is stopped.
    highest = jax.lax.all_gather(jax.lax.stop_gradient(logits.max(-1)), across).max(0)
    total = jax.lax.psum(jnp.exp(logits - highest[..., None]).sum(-1), across)
    return picked, highest + jnp.log(total)


def split_cross_entropy(
    project: Callable[[dict, jax.Array], jax.Array],
    head: dict,
    names: dict,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`chunked_cross_entropy` of each device's own rows, where a layout is in force.

    The head is gathered once, in front of the chunks, and its gradient scattered once behind them.
    Left to XLA, both would be done for every chunk.

    Args:
      project, head, hidden, targets, weights, chunk: of `chunked_cross_entropy`.
      names: a tree like `head`, of the names of each leaf's axes.
    """
    layout = layout_in_force()
    across = layout.axes("vocab") if layout else ()

    def local(head, hidden, targets, weights):
        head = {
            path: gather(leaf, names[path], layout, kept=("vocab",)) for path, leaf in head.items()
        }
        return chunked_cross_entropy(project, head, hidden, targets, weights, chunk, across)

    slots = ("batch", "length")
    apart = per_device(local, (names, (*slots, None), slots, slots), (slots, slots))
    return apart(head, hidden, targets, weights)


def chunked_cross_entropy(
    project: Callable[[dict, jax.Array], jax.Array],
    head: dict,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int | None,
    across: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of hidden states, projected to logits a chunk of slots at a time.

    A chunk is `chunk` slots of every row, so that rows may lie on different devices. Its logits are
    computed again in the backward pass. Chunks without a supervised slot, as those of a video are,
    are never projected. The head's gradients add up in float32, however it is stored.

    Args:
      project: (head, [B, chunk, W]) -> logits [B, chunk, V].
      head: the parameters of the projection, whose gradients are wanted.
      hidden: [B, L, W].
      targets: int32 [B, L].
      weights: float32 [B, L].
      chunk: slots; with None, or where L is no more, rows are projected whole.
      across: mesh axes that the vocabulary is split over, inside `axes.per_device`.

    Returns:
      Float32 [B, L]: -log p(target) and (log Z)^2 of each slot, both 0 where the weight is.
    """
    length = hidden.shape[1]
    if chunk is None or length <= chunk:
        return _losses(project(head, hidden), targets, weights, across)
    count = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], count * chunk)[:, :length]

    # Reverse-mode scan adds the gradient of what it closes over in that array's own dtype.
    wide = jax.tree.map(_widened, head)
    dtypes = jax.tree.map(lambda x: x.dtype, head)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_losses(wide, hidden, targets, weights):
        narrow = jax.tree.map(lambda x, dtype: x.astype(dtype), wide, dtypes)
        return jax.lax.cond(
            (weights > 0).any(),
            lambda: _losses(project(narrow, hidden), targets, weights, across),
            lambda: (jnp.zeros(weights.shape), jnp.zeros(weights.shape)),
        )

    def body(_, part):
        return None, chunk_losses(wide, *part)

    parts = (split(hidden), split(targets), split(weights))
    return jax.tree.map(join, jax.lax.scan(body, None, parts)[1])


def _widened(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x


_ENTROPY_ALONE = LossConfig()


def batch_loss(
    model: VLlama2,
    params: dict,
    batch: Batch,
    config: LossConfig = _ENTROPY_ALONE,
    datasets: tuple[str, ...] = (),
) -> LossSums:
    """Cross entropy over the supervised tokens of a batch, and what `config` adds to it.

    Towers of media that the batch does not have do not run.

    Args:
      model: the network.
      params: all of its parameters, nested.
      batch: with `targets` and `target_weights`.
      config: see there.
      datasets: names of those that the batch's `dataset_ids` number.

    Returns:
      Sums weighted by `target_weights`. `parts` names cross_entropy, z_loss and load_balancing
      (without their coefficients) as far as they are on; `counts` the slots that are not padding
      (`tokens`) and those of them that are learnt (`supervised_tokens`), and of each dataset the
      sums of its cross entropy and weights (`dataset_losses`).

    Raises:
      ValueError: for `load_balancing` and a decoder without experts.
    """
    variables = {"params": params}
    media = model.apply(variables, batch, method="media_tokens")
    media_index = None if media is None else batch.media_index
    hidden, _, *router_logits = model.apply(
        variables,
        *(batch.tokens, batch.positions, batch.segment_ids, media, media_index),
        with_router_logits=config.load_balancing > 0,
        method="decode",
    )
    name = "embed_tokens" if model.config.decoder.tie_embeddings else "lm_head"
    weights = batch.target_weights
    head, layout = flatten({name: params["decoder"][name]}), layout_in_force()
    projector = _of_vocabulary_part(model, layout.size("vocab")) if layout else model
    entropy, squares = split_cross_entropy(
        lambda head, rows: projector.apply(
            {"params": {"decoder": unflatten(head)}}, rows, method="logits"
        ),
        head,
        {path: _head_axes(path) for path in head},
        hidden,
        batch.targets,
        weights,
        config.chunk,
    )
    weight, attended = weights.sum(), batch.segment_ids > 0
    counts = {"tokens": attended.sum(dtype=jnp.float32)}
    counts["supervised_tokens"] = (weights > 0).sum(dtype=jnp.float32)
    counts |= _by_dataset(entropy * weights, weights, batch.dataset_ids, datasets)
    entropy, squares = (entropy * weights).sum(), (squares * weights).sum()
    total, parts = entropy, {"cross_entropy": entropy}
    if config.z_loss:
        parts["z_loss"] = squares
        total += config.z_loss * squares
    if config.load_balancing:
        # Rows of padding alone have no mean; their weight is 0, but 0 times NaN is NaN.
        counted = attended | ~attended.any()
        balance = load_balancing_loss(router_logits[0], model.config.decoder.top_k, counted)
        parts["load_balancing"] = balance * weight
        total += config.load_balancing * balance * weight
    return LossSums(total, weight, parts, counts)


_HEADS = {
    "decoder/lm_head/kernel": ("embed", "vocab"),
    "decoder/embed_tokens/embedding": ("vocab", "embed"),
}


def _of_vocabulary_part(model: VLlama2, parts: int) -> VLlama2:
    """The network whose head has one of so many equal parts of the vocabulary."""
    decoder = model.config.decoder
    decoder = dataclasses.replace(decoder, vocab_size=decoder.vocab_size // parts)
    return model.clone(config=dataclasses.replace(model.config, decoder=decoder))


def _head_axes(path: str) -> tuple[str | None, ...]:
    return leaf_axes(f"decoder/{path}", _HEADS)


_LOSS_OF, _WEIGHT_OF = "loss_sum/", "weight_sum/"


def _by_dataset(losses, weights, dataset_ids, datasets: tuple[str, ...]) -> dict[str, jax.Array]:
    """Sums over the slots of each dataset; scalars, named by `dataset_losses`."""
    if not datasets:
        return {}
    sums = [
        jax.ops.segment_sum(x.reshape(-1), dataset_ids.reshape(-1), len(datasets))
        for x in (losses, weights)
    ]
    return {
        prefix + name: values[i]
        for prefix, values in zip((_LOSS_OF, _WEIGHT_OF), sums, strict=True)
        for i, name in enumerate(datasets)
    }


def dataset_losses(metrics: dict[str, float]) -> dict[str, float]:
    """The same metrics, with the sums of each dataset that occurs as its mean, `loss/<dataset>`."""
    means = {
        f"loss/{name.removeprefix(_LOSS_OF)}": value / metrics[_WEIGHT_OF + name[len(_LOSS_OF) :]]
        for name, value in metrics.items()
        if name.startswith(_LOSS_OF) and metrics[_WEIGHT_OF + name[len(_LOSS_OF) :]] > 0
    }
    kept = {n: v for n, v in metrics.items() if not n.startswith((_LOSS_OF, _WEIGHT_OF))}
    return kept | means
