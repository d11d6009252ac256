"""What a small tower and connector are taught to see in Toybox (see `train/schooling.py`)."""

from collections.abc import Iterator

import numpy as np

from vllama2_jax.data.toybox_scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    MOMENTS,
    SHAPES,
    Moment,
    Scene,
    render,
    sample_scene,
)
from vllama2_jax.data.toybox_source import noisy, weighted_scene

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


def picture_batches(
    image_size: int, grid: int, rows: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of single frames; batch k is a function of (seed, k).

    Args:
      image_size: pixels of a frame's side (S).
      grid: patches along a frame's side.
      rows: of a batch (B).
      seed: decides everything.

    Yields:
      "frames" uint8 [B, S, S, 3], and what `patch_labels` says, [B, grid * grid] each.
    """
    number = 0
    while True:
        rng = np.random.default_rng([seed, 3, number])
        frames, labels = [], []
        for _ in range(rows):
            scene = sample_scene(rng, "train")
            moment = int(rng.integers(len(scene.moments)))
            labels.append(patch_labels(scene.moments[moment], grid))
            frames.append(noisy(render(scene, image_size)[moment], rng))
        yield {"frames": np.stack(frames), **_stack(labels)}
        number += 1


def labelled_clips(image_size: int, rows: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of clips; batch k is a function of (seed, k).

    Args:
      image_size: pixels of a frame's side (S).
      rows: of a batch (B).
      seed: decides everything.

    Yields:
      "frames" uint8 [B, MOMENTS, S, S, 3] and "clip_frames" int32 [B, 1, MOMENTS], as in `Batch`,
      and what `clip_labels` says, int32 [B] each.
    """
    clip_frames = np.broadcast_to(np.arange(MOMENTS, dtype=np.int32), (rows, 1, MOMENTS))
    number = 0
    while True:
        rng = np.random.default_rng([seed, 4, number])
        frames, labels = [], []
        for _ in range(rows):
            scene = weighted_scene(rng)
            labels.append(clip_labels(scene))
            frames.append(noisy(render(scene, image_size), rng))
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
