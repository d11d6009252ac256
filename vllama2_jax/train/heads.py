"""Linear heads that a small tower and connector are taught with, and thrown away afterwards.

One pair reads colour and shape of every patch from the tower's features, the others what a clip is
about from the mean of the connector's tokens.
"""

import jax
import jax.numpy as jnp

from vllama2_jax.data.toybox_labels import CLIP_HEADS, PATCH_HEADS
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vit import VisionTower, normalise
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.train.loss import cross_entropy

HEADS_OF = {"vision": PATCH_HEADS, "connector": CLIP_HEADS, "decoder": {}}


def make_heads(sizes: dict[str, int], width: int, seed: int) -> dict[str, jax.Array]:
    """New linear heads, {name: [width, classes]}."""
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        name: jax.random.normal(key, (width, classes)) * width**-0.5
        for key, (name, classes) in zip(keys, sizes.items(), strict=True)
    }


def tower_loss(config: VLlama2Config, params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    """Sum over `PATCH_HEADS` of the mean cross entropy over patches.

    Args:
      config: of the model.
      params: {"vision", "heads"}.
      batch: of `picture_batches`.
    """
    frames = normalise(batch["frames"], config.vision)
    features = VisionTower(config.vision).apply({"params": params["vision"]}, frames)
    total = jnp.zeros(())
    for name in PATCH_HEADS:
        logits = features @ params["heads"][name]
        losses, count = cross_entropy(logits, batch[name], batch["weights"])
        total += losses / count
    return total


def connector_loss(config: VLlama2Config, params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    """Sum over `CLIP_HEADS` of the mean cross entropy over the clips that a head is about.

    Args:
      config: of the model.
      params: {"vision", "connector", "heads"}.
      batch: of `labelled_clips`.
    """
    parts = {name: params[name] for name in ("vision", "connector")}
    tokens = VLlama2(config).apply(
        {"params": parts}, batch["frames"], batch["clip_frames"], method="encode"
    )
    half = tokens.shape[1] // 2  # tokens are ordered by time
    pooled = {"first": tokens[:, :half].mean(1), "last": tokens[:, half:].mean(1)}
    whole = (pooled["first"] + pooled["last"]) / 2
    total = jnp.zeros(())
    for name in CLIP_HEADS:
        asked = (batch[name] >= 0).astype(jnp.float32)
        logits = pooled.get(name.split("_")[0], whole) @ params["heads"][name]
        losses, count = cross_entropy(logits, jnp.maximum(batch[name], 0), asked)
        total += losses / jnp.maximum(count, 1)
    return total
