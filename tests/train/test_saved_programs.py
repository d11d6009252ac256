"""A run takes the programs that a plan has kept for it, and says why where it cannot."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from etils import epath

from vllama2_jax.parallel.program_cache import using_folder
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan.planning import save_programs
from vllama2_jax.plan.records import records_of
from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.run import run

STEPS = 2


@pytest.fixture(scope="module")
def short_run(small_run):
    return dataclasses.replace(small_run, steps=STEPS)


@pytest.fixture(scope="module")
def kept(short_run, tmp_path_factory):
    """A folder of the programs of that run on one device."""
    folder = epath.Path(tmp_path_factory.mktemp("kept"))
    plan = save_programs(short_run, topology("cpu:1"), records_of(short_run), folder)
    assert plan.fits and plan.compile_seconds > 0
    return folder


class Taken:
    """Counts what JAX itself says that it took from disk."""

    def __init__(self):
        self.programs = 0

    def __call__(self, event, **_):
        self.programs += event == "/jax/compilation_cache/cache_hits"


@pytest.fixture
def taken():
    counter = Taken()
    jax.monitoring.register_event_listener(counter)
    yield counter
    jax.monitoring.unregister_event_listener(counter)


def told(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_run_takes_what_was_planned_for_it_and_learns_the_same(
    short_run, kept, taken, tmp_path, capsys
):
    notes = [json.loads(note.read_text()) for note in kept.glob("*.json")]
    lengths = {note["program"]["slots of a row"] for note in notes}
    run(short_run, tmp_path / "taken", programs=kept)
    text = told(capsys)
    assert text.count(f"was taken from {kept}") == len(lengths) > 0
    assert taken.programs >= len(lengths)  # and small ones that another run has left
    assert "compiled in" not in text
    run(short_run, tmp_path / "compiled")
    losses = [[r["loss"] for r in read_metrics(tmp_path / n)] for n in ("taken", "compiled")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_another_step_is_compiled_and_what_differs_is_said(short_run, kept, tmp_path, capsys):
    optimizer = dataclasses.replace(short_run.optimizer, learning_rate=3e-3)
    run(dataclasses.replace(short_run, optimizer=optimizer), tmp_path / "run", programs=kept)
    text = told(capsys)
    assert "optimizer.learning_rate 0.01 there, 0.003 here" in text and "was taken" not in text
    # What was compiled is kept: started again, the run takes it.
    run(dataclasses.replace(short_run, optimizer=optimizer), tmp_path / "again", programs=kept)
    assert "was taken from" in told(capsys)


def test_programs_of_another_version_are_left_and_the_version_is_named(
    short_run, kept, tmp_path, capsys
):
    old = epath.Path(tmp_path / "old")
    old.mkdir()
    for note in kept.glob("*.json"):
        said = json.loads(note.read_text())
        said["for"]["jaxlib"] = "0.0.1"
        (old / f"{'0' * 8}-{note.name}").write_text(json.dumps(said))
    run(short_run, tmp_path / "run", programs=old)
    text = told(capsys)
    assert f"jaxlib 0.0.1 there, {jax.lib.__version__} here" in text and "was taken" not in text


def test_a_damaged_program_is_named_and_compiled_anew(short_run, kept, tmp_path, capsys):
    damaged = epath.Path(tmp_path / "damaged")
    damaged.mkdir()
    for file in kept.glob("*-cache*"):
        cut = file.read_bytes()
        (damaged / file.name).write_bytes(cut[: len(cut) // 2])  # the notes too
    run(short_run, tmp_path / "run", programs=damaged)
    text = told(capsys)
    assert "a damaged program was dropped: jit_step-" in text and "was taken" not in text
    assert len(read_metrics(tmp_path / "run")) == STEPS
    run(short_run, tmp_path / "again", programs=damaged)
    assert "was taken from" in told(capsys)


def test_a_rule_that_is_gone_is_a_difference(short_run, kept, tmp_path, capsys):
    rules = (*short_run.rules[:-1], dataclasses.replace(short_run.rules[-1], lr_scale=0.5))
    changed = dataclasses.replace(short_run, rules=rules)
    run(changed, tmp_path / "run", programs=kept)
    assert f"rules.{len(rules) - 1}.lr_scale 1.0 there, 0.5 here" in told(capsys)


def test_a_folder_of_programs_that_is_a_file_ends_the_run_at_once(short_run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"file: no folder for programs .*name another"):
        run(short_run, tmp_path / "run", programs=file)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_in_use_no_longer_than_a_run(kept):
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(FloatingPointError), using_folder(kept):
        assert jax.config.jax_compilation_cache_dir == str(kept)
        raise FloatingPointError
    assert jax.config.jax_compilation_cache_dir == before


def test_programs_for_a_slice_have_the_same_names_each_time(libtpu, short_run, tmp_path):
    names = []
    for folder in (epath.Path(tmp_path / "one"), epath.Path(tmp_path / "two")):
        save_programs(short_run, topology("v5e:2x2"), records_of(short_run), folder)
        names.append({file.name for file in folder.glob("*-cache")})
        note = json.loads(next(folder.glob("*.json")).read_text())
        assert note["for"]["devices"] == "4 TPU v5 lite in 2x2x1"
    assert names[0] == names[1] and names[0]


@pytest.mark.slow
def test_a_run_over_four_devices_takes_what_was_planned_for_four(tmp_path):
    options = ["--config", "config:tiny_video_sft", "--model", "tiny", "--batch", "8"]
    options += ["--steps", "1", "--config", "set:validation.sources=()"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

    def said(*arguments):
        command = [sys.executable, "-m", "vllama2_jax.cli", *arguments, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stderr

    said("plan", "--topology", "cpu:4", "--save-programs", str(tmp_path / "kept"))
    where = ["--out", str(tmp_path / "run"), "--workers", "0"]
    text = said("train", *where, "--programs", str(tmp_path / "kept"))
    assert f"was taken from {tmp_path / 'kept'}" in text
