"""`make tiny` in a few steps each: schooling, the five steps of the recipe, a model to ask."""

import dataclasses

import numpy as np
import pytest
from miniature import NARROW_TINY

import vllama2_jax as vl
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.configs import build, parse
from vllama2_jax.data.toybox.questions import KINDS
from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.run import run
from vllama2_jax.train.schooling import HEARING, SEEING, school
from vllama2_jax.weights import read


def _recipe(name, start):
    config = parse([f"config:{name}", "set:rows=2", f"set:start.model={str(start)!r}"])
    for source in (*config.data.sources, *config.validation.sources):
        source.records = 4
    return build(config)


# Recipe -> what trains, and the datasets it reads; in the order of `make tiny` and `make tiny-av`.
STEPS = {
    "tiny_video_pretrain": ({"connector"}, {"captions"}),
    "tiny_video_sft": ({"connector", "decoder"}, {"clips", "bare"}),
    "tiny_audio_pretrain": ({"audio_connector"}, {"captions"}),
    "tiny_audio_sft": ({"audio", "audio_connector"}, {"sounds"}),
    "tiny_av_joint": (
        {"connector", "audio_connector", "decoder"},
        {"av", "audio", "video", "bare"},
    ),
}


def _school(config, out, lessons, start=None):
    lessons = [dataclasses.replace(lesson, steps=1, rows=2) for lesson in lessons]
    school(config, out, lessons, start=start)
    return out


def _weights(model):
    return flatten(read(model, None, scan_layers=True)[0])


def _changed(before, after):
    return {p.split("/")[0] for p in before if not np.array_equal(before[p], after[p])}


@pytest.mark.slow
def test_every_step_begins_with_what_the_one_before_it_has_made(tmp_path):
    seeing = dataclasses.replace(NARROW_TINY, audio=None, audio_connector=None)
    made = _school(seeing, tmp_path / "start", SEEING)
    before = _weights(made)
    for name, (trains, datasets) in STEPS.items():
        if name == "tiny_audio_pretrain":
            made = _school(NARROW_TINY, tmp_path / "ears", HEARING, start=made)
            after = _weights(made)
            assert not _changed(before, after)
            assert {path.split("/")[0] for path in after.keys() - before.keys()} == {
                "audio",
                "audio_connector",
            }
            before = after
        run(_recipe(name, made), tmp_path / name)
        made = tmp_path / name
        after = _weights(made)
        assert _changed(before, after) == trains, name
        before = after
        records = read_metrics(made)
        assert np.isfinite([record["loss"] for record in records]).all()
        assert {f"loss/{dataset}" for dataset in datasets} <= set().union(*records)
        assert np.isfinite(records[-1]["validation/loss"])
    kinds = {key.removeprefix("accuracy/") for key in records[-1] if key.startswith("accuracy/")}
    assert kinds and kinds <= set(KINDS)
    assert isinstance(vl.load(made).ask(None, "What shape is it?", max_new_tokens=2), str)
