"""A small model's schooling: labels say what is there, losses fall, and a model comes out."""

import dataclasses

import jax
import numpy as np
import pytest

from vllama2_jax.checkpoints import CheckpointError, load_model
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.data.toybox_labels import (
    CLIP_HEADS,
    clip_labels,
    labelled_clips,
    patch_labels,
    picture_batches,
)
from vllama2_jax.data.toybox_scenes import (
    COLOURS,
    DIRECTIONS,
    FAMILIES,
    SHAPES,
    render,
    sample_scene,
)
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.schooling import Lesson, make_task, model_card, school, teach
from vllama2_jax.train.start import random_parts
from vllama2_jax.weights import TINY


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
        decoder=dataclasses.replace(config.decoder, width=32, mlp_dim=64, num_layers=1),
    )


def _lesson(part, steps):
    return Lesson(part, steps, rows=8, optimizer=OptimizerConfig(5e-3, warmup_ratio=0.125))


@pytest.fixture(scope="module")
def beginning():
    return random_parts(_narrow(ZOO["tiny"]), list(ZOO["tiny"].parts), 0, None, narrow=True)


@pytest.mark.parametrize("part", ["vision", "connector", "decoder"])
def test_lesson_lowers_its_loss_and_touches_only_its_part(part, beginning, monkeypatch):
    tokenizer = load_tokenizer(TINY / "tokenizer")
    card = model_card(_narrow(ZOO["tiny"]), tokenizer)

    def one_batch(lesson, *arguments):
        """The same one, since batches of 8 differ more than they teach."""
        loss, batches = make_task(lesson, *arguments)
        return loss, [next(iter(batches))] * lesson.steps

    monkeypatch.setattr("vllama2_jax.train.schooling.make_task", one_batch)
    after, losses = teach(_lesson(part, 30), beginning, card, tokenizer, 0)
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert set(after) == set(ZOO["tiny"].parts)
    changed = {
        path.split("/")[0]
        for path, leaf in flatten(after).items()
        if not np.array_equal(leaf, flatten(beginning)[path])
    }
    assert changed == {part}


def test_schooling_saves_a_model_that_loads_and_spares_a_folder_in_use(tmp_path, capsys):
    config, out = _narrow(ZOO["tiny"]), tmp_path / "start"
    lesson = dataclasses.replace(_lesson("vision", 1), rows=2)
    school(config, out, [lesson])
    params, card = load_model(out, lambda card: abstract_params(card.config))
    assert card == model_card(config, load_tokenizer(out / "tokenizer"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert "vision: 1 steps, loss" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not empty"):
        school(config, out, [lesson])


@pytest.mark.parametrize(
    "batches", [lambda: picture_batches(64, 8, 2, 5), lambda: labelled_clips(64, 2, 5)]
)
def test_batches_of_labels_are_reproducible(batches):
    first, again = (next(batches()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first["frames"].shape[-3:] == (64, 64, 3)
