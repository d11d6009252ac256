"""The training step: one jitted function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vllama2_jax.models.axes import Layout, using
from vllama2_jax.parallel.backends import compiler_options
from vllama2_jax.parallel.sharding import optimizer_shardings, whole
from vllama2_jax.train.loss import LossSums, reciprocal
from vllama2_jax.train.trainable import combine

AVERAGES = ("tokens", "micro_batches")


@flax.struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
      step: int32 scalar, steps taken.
      trainable: {path: array}, the master copies of what trains, float32 or bfloat16.
      optimizer: the optimizer's state; it covers `trainable` and nothing else.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    optimizer: optax.OptState


def init_state(
    trainable: dict[str, jax.Array], optimizer, where=None, dtype=jnp.float32
) -> TrainState:
    """State before the first step.

    The arrays are copied, since a step consumes its state, and widened to float32: in bfloat16 an
    update of less than 1/512 of a parameter would be rounded away, and learning rates are smaller.
    Moments have the dtype of their parameter.

    Args:
      trainable: {path: array} of what trains.
      optimizer: of `make_optimizer`.
      where: of `state_shardings`, or one sharding for all; None stays where the arrays are.
      dtype: of the master copies.
    """

    def make(trainable):
        trainable = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    return make(trainable) if where is None else jax.jit(make, out_shardings=where)(trainable)


def state_shardings(layout: Layout, optimizer, trainable: dict) -> TrainState:
    """Where a state lies: what belongs to a parameter where that lies, all else everywhere.

    Args:
      layout: the mesh and its rules.
      optimizer: of `make_optimizer`.
      trainable: {path: array, or shape with its sharding}.
    """
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        for path, leaf in trainable.items()
    }
    return TrainState(
        whole(layout),
        {path: leaf.sharding for path, leaf in shapes.items()},
        optimizer_shardings(layout, optimizer, shapes),
    )


def loss_and_gradients(
    loss: Callable,
    trainable: dict,
    frozen: dict,
    batch,
    *,
    micro_batches: int = 1,
    average: str = "tokens",
    compute_dtype=None,
) -> tuple[LossSums, dict[str, jax.Array]]:
    """(mean loss, {path: gradient of it}); what is frozen is not differentiated.

    Gradients have the dtype of the master copies; those of micro-batches add up in float32.

    Args:
      loss, micro_batches, average, compute_dtype: of `make_step`.
      trainable, frozen: of `partition`.
      batch: arrays [B, ...].

    Raises:
      ValueError: for rows that do not split, or an unknown `average`.
    """
    if average not in AVERAGES:
        raise ValueError(f"unknown average {average!r}; known: {', '.join(AVERAGES)}")
    dtypes = {path: leaf.dtype for path, leaf in trainable.items()}
    if compute_dtype is not None:
        trainable = {path: leaf.astype(compute_dtype) for path, leaf in trainable.items()}

    def objective(trainable, part):
        sums = loss(combine(trainable, frozen), part)
        if not isinstance(sums, LossSums):  # a mean of its own kind
            sums = LossSums(sums, jnp.ones(()))
        if average == "micro_batches":
            sums = sums.mean()
        return sums.total, sums

    def evaluate(part):
        gradients, sums = jax.grad(objective, has_aux=True)(trainable, part)
        if micro_batches > 1:
            return sums, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        return sums, {path: g.astype(dtypes[path]) for path, g in gradients.items()}

    if micro_batches == 1:
        sums, gradients = evaluate(batch)
    else:
        parts = _split(batch, micro_batches)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, first))
        (sums, gradients), _ = jax.lax.scan(
            lambda so_far, part: (jax.tree.map(jnp.add, so_far, evaluate(part)), None), zeros, parts
        )
    scale = reciprocal(sums.weight)
    gradients = {path: (g * scale).astype(dtypes[path]) for path, g in gradients.items()}
    return sums.mean(), gradients


def _split(batch, count: int):
    """Arrays [B, ...] as [count, B / count, ...]; neighbouring rows go to different micro-batches.

    So each device's rows, which are neighbours, are spread over all micro-batches and stay there.
    """

    def split(x):
        if count < 1 or x.shape[0] % count:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be split into {count} equal micro-batches; "
                "choose a number that divides it"
            )
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    average: str = "tokens",
    compute_dtype=None,
    layout: Layout | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, dict, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `step(state, frozen, batch) -> (state, metrics)`.

    The state is donated: use the returned one. The frozen parameters are an argument, so that they
    are neither copied nor baked into the program; they may be bfloat16. Where loss or gradient is
    not finite, the returned state is the given one: what was learnt so far survives a bad batch.

    Metrics are float32 scalars: `loss`, its parts and counts (see `batch_loss`), `grad_norm` of all
    that trains (before clipping), and `grad_norm/<part>` of each top-level part of the network.

    Args:
      loss: (params, batch) -> `LossSums`, for example `functools.partial(batch_loss, model)`; or a
        scalar, which then weighs 1.
      optimizer: of `make_optimizer`.
      micro_batches: parts of a batch that are computed one after the other, to save memory.
      average: "tokens" divides the sum of all losses by the sum of all weights, so that the result
        is that of the batch in one piece. "micro_batches" is the original's (Hugging Face's Trainer
        before version 4.46): the mean of the micro-batches' means, in which a token counts more
        among few; micro-batches with nothing to learn, NaN there, are left out.
      compute_dtype: what trains is cast to it once a step; None computes with the float32 masters.
        Activations have the model's own `dtype`.
      layout: how networks split their arrays over several devices.
      shardings: where the state's arrays lie, before the step and behind it; metrics lie whole on
        every device. None lets XLA choose.
    """

    def take(state: TrainState, frozen: dict, batch):
        sums, gradients = loss_and_gradients(
            loss,
            state.trainable,
            frozen,
            batch,
            micro_batches=micro_batches,
            average=average,
            compute_dtype=compute_dtype,
        )
        metrics = {"loss": sums.total, **sums.parts, **sums.counts, **_norms(gradients)}
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        new = TrainState(state.step + 1, trainable, optimizer_state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

    def step(state: TrainState, frozen: dict, batch):
        with using(layout):
            return take(state, frozen, batch)

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, whole(layout)),
        compiler_options=compiler_options(layout.mesh.devices) or None,
    )


def _norms(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`grad_norm` of everything, and `grad_norm/<part>` of each top-level part."""
    parts: dict[str, list[jax.Array]] = {}
    for path, gradient in gradients.items():
        parts.setdefault(path.split("/", 1)[0], []).append(gradient)
    return {
        "grad_norm": optax.tree.norm(gradients),
        **{f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in parts.items()},
    }
