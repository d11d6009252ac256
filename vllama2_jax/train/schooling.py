"""Give a small tower and connector something to say, before a decoder has to listen to them.

The published towers come trained on pairs of pictures and captions, and the published connectors
meet decoders that have read the internet. At the size of `tiny` neither is so: behind a decoder,
tower and connector learn slowly. So linear heads, thrown away afterwards, read colour and shape
from the tower's features of every patch, and what a clip is about from the mean of the connector's
tokens.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.data.toybox_scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    SHAPES,
    Moment,
    Scene,
    render,
    sample_scene,
)
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vit import VisionTower, normalise
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.train.loss import cross_entropy
from vllama2_jax.train.toybox_feed import noisy, training_scene

# One more class each for the background.
PATCH_HEADS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1}
CLIP_HEADS = {
    "first_colour": len(COLOURS),
    "first_shape": len(SHAPES),
    "last_colour": len(COLOURS),
    "last_shape": len(SHAPES),
    "motion": len(DIRECTIONS),
    "count": len(COUNTS),
    "change": len(CHANGES),
}
_NAMES = {"colour": tuple(COLOURS), "shape": SHAPES}
_FACTS = {"motion": DIRECTIONS, "count": COUNTS, "change": CHANGES}
_REACH = 0.8  # of a thing's radius; patches whose centres lie further out are left to be guessed


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


def picture_batches(config: VLlama2Config, rows: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches: frames uint8 [B, S, S, 3], and what `patch_labels` says, [B, N] each."""
    number = 0
    while True:
        rng = np.random.default_rng([seed, 3, number])
        frames, labels = [], []
        for _ in range(rows):
            scene = sample_scene(rng, "train")
            moment = int(rng.integers(len(scene.moments)))
            labels.append(patch_labels(scene.moments[moment], config.vision.grid))
            frames.append(noisy(render(scene, config.vision.image_size)[moment], rng))
        yield {"frames": np.stack(frames), **_stack(labels)}
        number += 1


def labelled_clips(config: VLlama2Config, rows: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches: frames, clip_frames (as in `Batch`), and what `clip_labels` says, [B]."""
    steps = np.arange(config.num_frames, dtype=np.int32)
    clip_frames = np.broadcast_to(steps, (rows, 1, config.num_frames))
    number = 0
    while True:
        rng = np.random.default_rng([seed, 4, number])
        frames, labels = [], []
        for _ in range(rows):
            scene = training_scene(rng)
            labels.append(clip_labels(scene))
            frames.append(noisy(render(scene, config.vision.image_size), rng))
        yield {"frames": np.stack(frames), "clip_frames": clip_frames, **_stack(labels)}
        number += 1


def clip_labels(scene: Scene) -> dict[str, np.int32]:
    """The class of each of `CLIP_HEADS`; -1 where it has no answer."""
    labels = dict.fromkeys(CLIP_HEADS, -1)
    if scene.family != "count":
        for when, thing in (("first", scene.things[0]), ("last", scene.things[-1])):
            for name, values in _NAMES.items():
                labels[f"{when}_{name}"] = values.index(getattr(thing, name))
    if scene.family in _FACTS:
        labels[scene.family] = _FACTS[scene.family].index(scene.fact)
    return {name: np.int32(label) for name, label in labels.items()}


def _stack(labels: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([label[name] for label in labels]) for name in labels[0]}


def patch_labels(moment: Moment, grid: int) -> dict[str, np.ndarray]:
    """What covers each patch, row-major: "colour", "shape" int32 [N], "weights" float32 [N].

    The background is the last class and weighs little, since most patches are background.
    """
    centres = (np.arange(grid) + 0.5) / grid
    labels = {name: np.full((grid, grid), classes - 1) for name, classes in PATCH_HEADS.items()}
    weights = np.full((grid, grid), 0.1, np.float32)
    for thing in moment.things:
        distance = np.hypot(centres - thing.x, centres[:, None] - thing.y)
        covered = distance < _REACH * thing.radius
        weights[covered] = 1
        for name in PATCH_HEADS:
            labels[name][covered] = _NAMES[name].index(getattr(thing, name))
        weights[(distance < 1.1 * thing.radius) & ~covered] = 0
    flat = {name: label.reshape(-1).astype(np.int32) for name, label in labels.items()}
    return {**flat, "weights": weights.reshape(-1)}
