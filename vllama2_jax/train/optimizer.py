"""AdamW under a cosine schedule with warm-up, over what trains and nothing else."""

import dataclasses
import math

import jax
import optax

from vllama2_jax.train.trainable import Rule

# Everything decays but the biases and the scales of norms, as in Hugging Face's Trainer. What is
# left out is named, not what decays: a mixture's experts are called neither kernel nor embedding.
_NOT_DECAYED = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the original's, but for the learning rate.

    Attributes:
      learning_rate: at the peak.
      warmup_ratio: share of the steps that warm up, linearly from 0 at the first; rounded up.
      weight_decay: decoupled, times the learning rate; of all but biases and norm scales.
      b1, b2, eps: of Adam.
      clip_norm: upper limit of the gradients' global norm; None does not clip.
    """

    learning_rate: float
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None

    def __post_init__(self):
        """Refuse what cannot be meant."""
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} must be at least 0 and below 1")
        for name, value in (("learning_rate", self.learning_rate), ("clip_norm", self.clip_norm)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate: linear from 0, then half a cosine down to 0 at `steps`.

    The same as `transformers.get_cosine_schedule_with_warmup`. A run too short to warm up and to
    come down does not warm up.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if warmup >= steps:
        warmup = 0
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate, config.learning_rate, warmup, steps
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, assigned: dict[str, Rule]
) -> optax.GradientTransformation:
    """The update rule for the flat dict of trainable parameters that `partition` returns."""
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(
            optax.add_decayed_weights(
                config.weight_decay,
                mask=lambda params: {p: p.rsplit("/", 1)[-1] not in _NOT_DECAYED for p in params},
            )
        )
    parts.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    if any(rule.lr_scale != 1 for rule in assigned.values()):
        parts.append(
            optax.stateless(
                lambda updates, _: {
                    path: jax.tree.map(lambda u, s=assigned[path].lr_scale: u * s, update)
                    for path, update in updates.items()
                }
            )
        )
    return optax.chain(*parts)
