"""Linear heads that small towers and connectors are taught with, and thrown away afterwards.

One pair reads colour and shape of every patch from the tower's features, others what a clip is
about from the mean of the connector's tokens; of sound, what is heard when and what it is about.
"""

import jax
import jax.numpy as jnp

from vllama2_jax.data.toybox.labels import CLIP_HEADS, PATCH_HEADS, SOUND_HEADS, STEP_HEADS
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vit import VisionTower, normalise
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.train.loss import cross_entropy

HEADS_OF = {
    "vision": PATCH_HEADS,
    "connector": CLIP_HEADS,
    "audio": {**STEP_HEADS, **SOUND_HEADS},
    "decoder": {},
}


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
    pooled = {name: pooled.get(name.split("_")[0], whole) for name in CLIP_HEADS}
    return _asked_losses(params["heads"], pooled, batch)


def sound_loss(config: VLlama2Config, params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    """Sum over `STEP_HEADS` and `SOUND_HEADS` of the mean cross entropy over what they are about.

    Args:
      config: of the model.
      params: {"audio", "audio_connector", "heads"}.
      batch: of `labelled_sounds`.
    """
    parts = {name: params[name] for name in ("audio", "audio_connector")}
    tokens = VLlama2(config).apply({"params": parts}, batch["audio"], method="hear")
    whole = tokens.mean(1)
    total = _asked_losses(params["heads"], dict.fromkeys(SOUND_HEADS, whole), batch)
    rows, steps = batch["weights"].shape
    over_bands = tokens.reshape(rows, steps, -1, tokens.shape[-1]).mean(2)
    for name in STEP_HEADS:
        logits = over_bands @ params["heads"][name]
        losses, count = cross_entropy(logits, batch[name], batch["weights"])
        total += losses / count
    return total


def _asked_losses(heads: dict, pooled: dict[str, jax.Array], batch: dict) -> jax.Array:
    """Sum of the heads' losses, each the mean over the rows that it is about (label 0 or more)."""
    total = jnp.zeros(())
    for name, tokens in pooled.items():
        asked = (batch[name] >= 0).astype(jnp.float32)
        losses, count = cross_entropy(tokens @ heads[name], jnp.maximum(batch[name], 0), asked)
        total += losses / jnp.maximum(count, 1)
    return total
