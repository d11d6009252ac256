"""A small tower's and connector's schooling: labels say what is there, and losses fall."""

import dataclasses

import jax
import numpy as np
import pytest

from vllama2_jax.data.toybox_scenes import (
    COLOURS,
    DIRECTIONS,
    FAMILIES,
    SHAPES,
    render,
    sample_scene,
)
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train.initial import initial_params
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.recipes import Stage, make_task, new_heads
from vllama2_jax.train.schooling import (
    CLIP_HEADS,
    clip_labels,
    labelled_clips,
    patch_labels,
    picture_batches,
)
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, partition


def test_labelled_patches_have_the_colour_of_their_label():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng, "train", "count")
        labels = patch_labels(scene.moments[0], 8)
        picture = render(scene, 64)[0].reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, -1, 3)
        background = np.asarray(scene.moments[0].background)
        for patch in np.flatnonzero(labels["weights"] == 1):
            colour = list(COLOURS.values())[labels["colour"][patch]]
            # Some pixel of the patch has it (rings have holes, shades jitter by 12).
            assert np.abs(picture[patch] - np.asarray(colour)).max(-1).min() <= 13
        for patch in np.flatnonzero(np.float32(labels["weights"]) == np.float32(0.1)):
            assert labels["colour"][patch] == len(COLOURS) and labels["shape"][patch] == len(SHAPES)
            assert (picture[patch] == background).all(-1).mean() > 0.5


def test_clip_labels_are_what_the_scene_says():
    rng = np.random.default_rng(1)
    for family in FAMILIES:
        for _ in range(10):
            scene = sample_scene(rng, "train", family)
            labels = clip_labels(scene)
            assert set(labels) == set(CLIP_HEADS)
            first, last = (scene.moments[i].things for i in (0, -1))
            if family != "count" and first and last:
                assert SHAPES[labels["first_shape"]] == first[0].shape
                assert list(COLOURS)[labels["last_colour"]] == last[0].colour
            if family == "count":
                assert labels["count"] + 1 == len(scene.things) and labels["first_colour"] == -1
            if family == "motion":
                assert DIRECTIONS[labels["motion"]] == scene.fact
            if family != "change":
                assert labels["change"] == -1


def _narrow(config):
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, width=24, mlp_dim=48),
        connector=dataclasses.replace(config.connector, in_dim=24, out_dim=32),
        decoder=dataclasses.replace(config.decoder, width=32, num_layers=1),
    )


@pytest.mark.parametrize("task", ["tower", "connector"])
def test_schooling_lowers_its_loss_and_touches_only_its_part(task):
    config = _narrow(ZOO["tiny"])
    params = initial_params(config, 0)
    params |= new_heads(config, task, 0)
    part = {"tower": "vision", "connector": "connector"}[task]
    rules = (Rule(f"({part}|heads)/.*", "train"), Rule(".*", "freeze"))
    optimizer_config = OptimizerConfig(5e-3, 40, 5)
    stage = Stage(task, rules, optimizer_config, rows=8)
    assigned = assign_rules(rules, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(optimizer_config, assigned)
    state = init_state(trainable, optimizer)
    loss, batches = make_task(config, stage, None, 0)
    step = make_step(loss, optimizer)
    losses = []
    batch = next(iter(batches))  # the same one, since batches of 8 differ more than they teach
    for _ in range(40):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert {path.split("/")[0] for path in state.trainable} == {part, "heads"}


@pytest.mark.parametrize("batches", [picture_batches, labelled_clips])
def test_schooling_batches_are_reproducible(batches):
    first, again = (next(batches(ZOO["tiny"], 2, 5)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first["frames"].shape[-3:] == (64, 64, 3)
