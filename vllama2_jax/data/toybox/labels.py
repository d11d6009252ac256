"""What small towers and connectors are taught to see and hear (see `train/schooling.py`)."""

from collections.abc import Iterator

import numpy as np

from vllama2_jax.data.toybox.drawing import render
from vllama2_jax.data.toybox.families import FAMILIES_OF, sample_scene
from vllama2_jax.data.toybox.scenes import (
    CHANGES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    GLIDES,
    MOMENTS,
    NOISES,
    PITCHES,
    REGISTERS,
    SHAPES,
    TIMES,
    Event,
    Moment,
    Scene,
)
from vllama2_jax.data.toybox.source import noisy, weighted_scene
from vllama2_jax.data.toybox.synthesis import SAMPLE_RATE, synthesise
from vllama2_jax.media.fbank import filter_bank
from vllama2_jax.media.waveform import fit

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
    "bounce": len(TIMES),
}
# Of a stretch of sound: silence, the register of a tone, or a noise.
STEP_HEADS = {"heard": 1 + len(REGISTERS) + len(NOISES)}
SOUND_HEADS = {
    "pitch": len(PITCHES),
    "glide": len(GLIDES),
    "beeps": len(COUNTS),
    "noise": len(NOISES),
    "timing": len(TIMES),
    "half": 2,  # of the clip, in which the sound begins
}
_NAMES = {"colour": tuple(COLOURS), "shape": SHAPES}
_FACTS = {"motion": DIRECTIONS, "count": COUNTS, "change": CHANGES, "bounce": tuple(TIMES)}
_SOUND_FACTS = {
    "pitch": PITCHES,
    "glide": GLIDES,
    "beeps": COUNTS,
    "noise": NOISES,
    "timing": tuple(TIMES),
}
# Of clips, the families. The way of a motion takes the connector longest, and a decoder learns it
# in minutes only from a connector that tells it.
_SHARES = {"motion": 0.42, "order": 0.12, "count": 0.08, "change": 0.28, "bounce": 0.1}
_JOINT = 0.4  # share of sounds that are those of things
_COVERED = 0.6  # of a stretch, from where on it is an event's
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
            families = FAMILIES_OF["video"]
            scene = sample_scene(rng, "train", families[rng.integers(len(families))])
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
            scene = weighted_scene(rng, "video", _SHARES)
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


def labelled_sounds(
    seconds: float, steps: int, step_seconds: float, rows: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of sounds; batch k is a function of (seed, k).

    Args:
      seconds: of sound that the tower takes.
      steps: stretches that the tower tells apart (T).
      step_seconds: length of each.
      rows: of a batch (B).
      seed: decides everything.

    Yields:
      "audio" float32 [B, 1, frames, 128], as in `Batch`, what `step_labels` says, [B, T] each, and
      what `sound_labels` says, int32 [B] each.
    """
    number = 0
    while True:
        rng = np.random.default_rng([seed, 5, number])
        banks, labels = [], []
        for _ in range(rows):
            scene = weighted_scene(rng, "av" if rng.random() < _JOINT else "audio")
            samples = fit(synthesise(scene.events, rng), round(seconds * SAMPLE_RATE))
            banks.append(filter_bank(samples))
            labels.append(sound_labels(scene) | step_labels(scene.events, steps, step_seconds))
        yield {"audio": np.stack(banks)[:, None], **_stack(labels)}
        number += 1


def sound_labels(scene: Scene) -> dict[str, np.int32]:
    """The class of each of `SOUND_HEADS`; -1 where it has no answer."""
    labels = dict.fromkeys(SOUND_HEADS, -1)
    if scene.family in _SOUND_FACTS:
        labels[scene.family] = _SOUND_FACTS[scene.family].index(scene.fact)
    moment = scene.events[0].moment
    if scene.family == "sync":
        labels["timing"] = list(TIMES.values()).index(moment)
    if scene.family == "sounding":
        labels["half"] = int(moment >= MOMENTS // 2)
    return {name: np.int32(label) for name, label in labels.items()}


def step_labels(
    events: tuple[Event, ...], steps: int, step_seconds: float
) -> dict[str, np.ndarray]:
    """What is heard in each stretch: "heard" int32 [T] of `STEP_HEADS`, "weights" float32 [T].

    Stretches that an event covers in part weigh nothing. A glide has the register of its middle.
    """
    first = np.arange(steps) * step_seconds
    heard, weights = np.zeros(steps, np.int32), np.ones(steps, np.float32)
    for event in events:
        end = np.minimum(first + step_seconds, event.start + event.seconds)
        covered = np.maximum(end - np.maximum(first, event.start), 0) / step_seconds
        if event.kind == "tone":
            middle = np.sqrt(event.pitches[0] * event.pitches[1])
            label = 1 + int(np.abs(np.log(np.asarray(REGISTERS) / middle)).argmin())
        else:
            label = 1 + len(REGISTERS) + NOISES.index(event.kind)
        heard[covered >= _COVERED] = label
        weights[(covered > 0) & (covered < _COVERED)] = 0
    return {"heard": heard, "weights": weights}


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
