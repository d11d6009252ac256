"""The training step: one jitted function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vllama2_jax.models.vllama2 import Batch, VLlama2
from vllama2_jax.train.trainable import combine


@flax.struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
      step: int32 scalar, steps taken.
      trainable: {path: array}, the master copies of what trains.
      optimizer: the optimizer's state; it covers `trainable` and nothing else.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    optimizer: optax.OptState


def init_state(trainable: dict[str, jax.Array], optimizer) -> TrainState:
    """State before the first step; the arrays are copied, since a step consumes its state."""
    trainable = jax.tree.map(jnp.array, trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target), and the sum of weights, both float32 scalars.

    Args:
      logits: float [..., V]; the softmax runs in float32.
      targets: int32 [...].
      weights: float32 [...]; 0 leaves a slot out.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return (losses * weights).sum(), weights.sum()


def batch_loss(model: VLlama2, params, batch: Batch) -> jax.Array:
    """Mean cross entropy over the supervised tokens of the whole batch, float32.

    A batch whose `frames` are None is text alone: tower and connector do not run.
    """
    if batch.frames is None:
        rows = (batch.tokens, batch.positions, batch.segment_ids)
        hidden, _ = model.apply({"params": params}, *rows, method="decode")
    else:
        hidden = model.apply({"params": params}, batch)
    logits = model.apply({"params": params}, hidden, method="logits")
    total, count = cross_entropy(logits, batch.targets, batch.target_weights)
    # A batch may hold nothing to learn (only bad files); its loss is 0, not NaN.
    return total / jnp.maximum(count, 1e-6)


def loss_and_gradients(loss: Callable, trainable: dict, frozen: dict, batch):
    """(loss, {path: gradient}) of `loss(params, batch)`; what is frozen is not differentiated."""
    return jax.value_and_grad(lambda t: loss(combine(t, frozen), batch))(trainable)


def make_step(
    loss: Callable, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, dict, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `step(state, frozen, batch) -> (state, metrics)`.

    The state is donated: use the returned one. The frozen parameters are an argument, so that they
    are neither copied nor baked into the program. Metrics are float32 scalars: `loss` and
    `grad_norm` (before clipping).

    Args:
      loss: (params, batch) -> scalar, for example `functools.partial(batch_loss, model)`.
      optimizer: of `make_optimizer`.
    """

    def step(state: TrainState, frozen: dict, batch):
        value, gradients = loss_and_gradients(loss, state.trainable, frozen, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)
