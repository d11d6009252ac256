"""A small model's schooling: labels say what is there, losses fall, and a model comes out."""

import dataclasses

import jax
import numpy as np
import pytest
from miniature import NARROW_TINY

from vllama2_jax.checkpoints import CheckpointError, load_model
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.data.toybox.drawing import render
from vllama2_jax.data.toybox.families import FAMILIES_OF, sample_scene
from vllama2_jax.data.toybox.labels import (
    CLIP_HEADS,
    SOUND_HEADS,
    clip_labels,
    labelled_clips,
    labelled_sounds,
    patch_labels,
    picture_batches,
    sound_labels,
    step_labels,
)
from vllama2_jax.data.toybox.scenes import COLOURS, DIRECTIONS, SHAPES, TIMES, Event
from vllama2_jax.models.vllama2 import abstract_params
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
    for family in FAMILIES_OF["video"]:
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
            if family == "bounce":
                assert list(TIMES)[labels["bounce"]] == scene.fact
            if family == "motion":
                assert DIRECTIONS[labels["motion"]] == scene.fact
            if family != "change":
                assert labels["change"] == -1


def _lesson(part, steps):
    return Lesson(part, steps, rows=8, optimizer=OptimizerConfig(5e-3, warmup_ratio=0.125))


def test_sound_labels_are_what_the_scene_says():
    rng = np.random.default_rng(2)
    for family in (*FAMILIES_OF["audio"], *FAMILIES_OF["av"]):
        for _ in range(10):
            scene = sample_scene(rng, "train", family)
            labels = sound_labels(scene)
            assert set(labels) == set(SOUND_HEADS)
            asked = {name for name, label in labels.items() if label >= 0}
            (event, *_) = scene.events
            if family == "sync":
                moments = [moment.things[0].y for moment in scene.moments]
                together = labels["timing"] == (1, 3, 5).index(int(np.argmax(moments)))
                assert asked == {"timing"} and together == (scene.fact == "yes")
            elif family == "sounding":
                first = scene.things[0].name == scene.fact
                assert asked == {"half"} and labels["half"] == (not first)
            else:
                assert asked == {family}
            if family == "beeps":
                assert labels["beeps"] + 1 == len(scene.events)
            if family == "glide":
                assert (labels["glide"] == 0) == (event.pitches[1] > event.pitches[0])


def test_steps_are_labelled_where_something_is_heard():
    tone = Event("tone", 0.5, 0.5, (0.3, 0.3), (570.0, 570.0), "pure")
    hiss = Event("hiss", 1.5, 0.25, (0.3, 0.3))
    found = step_labels((tone, hiss), steps=8, step_seconds=0.25)
    assert found["heard"].tolist() == [0, 0, 3, 3, 0, 0, 7, 0]
    assert found["weights"].tolist() == [1] * 8
    # A quarter of the second stretch, and half of the fourth.
    late = dataclasses.replace(tone, start=0.4375, seconds=0.4375)
    found = step_labels((late,), steps=8, step_seconds=0.25)
    assert found["heard"].tolist() == [0, 0, 3, 0, 0, 0, 0, 0]
    assert found["weights"].tolist() == [1, 0, 1, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def beginning():
    return random_parts(NARROW_TINY, list(NARROW_TINY.parts), 0, None, narrow=True)


@pytest.mark.parametrize("part", ["vision", "connector", "audio", "decoder"])
def test_lesson_lowers_its_loss_and_touches_only_its_part(part, beginning, monkeypatch):
    tokenizer = load_tokenizer(TINY / "tokenizer")
    card = model_card(NARROW_TINY, tokenizer)

    def one_batch(lesson, *arguments):
        """The same one, since batches of 8 differ more than they teach."""
        loss, batches = make_task(lesson, *arguments)
        return loss, [next(iter(batches))] * lesson.steps

    monkeypatch.setattr("vllama2_jax.train.schooling.make_task", one_batch)
    after, losses = teach(_lesson(part, 30), beginning, card, tokenizer, 0)
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert set(after) == set(NARROW_TINY.parts)
    changed = {
        path.split("/")[0]
        for path, leaf in flatten(after).items()
        if not np.array_equal(leaf, flatten(beginning)[path])
    }
    assert changed == ({"audio", "audio_connector"} if part == "audio" else {part})


def test_ears_are_given_to_what_sees_and_to_nothing_else(tmp_path):
    seeing = dataclasses.replace(NARROW_TINY, audio=None, audio_connector=None)
    vision, audio = (dataclasses.replace(_lesson(part, 1), rows=2) for part in ("vision", "audio"))
    school(seeing, tmp_path / "sees", [vision])
    school(NARROW_TINY, tmp_path / "hears", [audio], start=tmp_path / "sees")
    before, after = (
        flatten(load_model(tmp_path / name, lambda card: abstract_params(card.config))[0])
        for name in ("sees", "hears")
    )
    assert all(np.array_equal(leaf, after[path]) for path, leaf in before.items())
    new = {path.split("/")[0] for path in after.keys() - before.keys()}
    assert new == {"audio", "audio_connector"}
    words = [tmp_path / name / "tokenizer/tokenizer.model" for name in ("sees", "hears")]
    assert words[0].read_bytes() == words[1].read_bytes()
    for start in (tmp_path / "hears", TINY):
        with pytest.raises(CheckpointError, match="is not tiny without what it is to be given"):
            school(NARROW_TINY, tmp_path / "again", [audio], start=start)
        assert not (tmp_path / "again").exists()


def test_schooling_saves_a_model_that_loads_and_spares_a_folder_in_use(tmp_path, capsys):
    config, out = NARROW_TINY, tmp_path / "start"
    lesson = dataclasses.replace(_lesson("vision", 1), rows=2)
    school(config, out, [lesson])
    params, card = load_model(out, lambda card: abstract_params(card.config))
    assert card == model_card(config, load_tokenizer(out / "tokenizer"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert "vision: 1 steps, loss" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not empty"):
        school(config, out, [lesson])


@pytest.mark.parametrize(
    "batches, shape",
    [
        (lambda: picture_batches(64, 8, 2, 5), (64, 64, 3)),
        (lambda: labelled_clips(64, 2, 5), (64, 64, 3)),
        (lambda: labelled_sounds(2.0, 12, 0.16, 2, 5), (1, 198, 128)),
    ],
)
def test_batches_of_labels_are_reproducible(batches, shape):
    first, again = (next(batches()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    media = first.get("frames", first.get("audio"))
    assert media.shape[-3:] == shape and len(media) == 2
