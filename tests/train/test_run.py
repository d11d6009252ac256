"""A run does what its configuration says, and knows itself when it is started again."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.data.pipeline import TooManyFaults
from vllama2_jax.train import run as run_module
from vllama2_jax.train.config import SaveConfig, SourceConfig, ValidationConfig
from vllama2_jax.train.feeding import feeding_of
from vllama2_jax.train.lora import merge
from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.run import Outcome, run
from vllama2_jax.train.start import begin
from vllama2_jax.train.trainable import Rule
from vllama2_jax.weights import read


@pytest.fixture(scope="module")
def done(small_run, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run(small_run, folder, profile=(2, 3)) == Outcome(12, 12)
    return folder


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_loss_falls_and_every_step_is_told(done):
    records = read_metrics(done)
    assert [record["step"] for record in records] == list(range(1, 13))
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    for record in records:
        assert record["seconds"] > 0 and record["samples"] == 4
        assert record["tokens"] > record["supervised_tokens"] > 0
        assert {"grad_norm", "grad_norm/connector", "grad_norm/decoder"} <= set(record)
        assert "grad_norm/vision" not in record
    rates = [record["learning_rate"] for record in records]
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-2)


def test_processes_compare_their_software_before_the_folder_is_touched(
    small_run, tmp_path, monkeypatch
):
    def differ(name, value):
        assert {"code", "jax", "jaxlib", "compiler", "flags"} <= set(value)
        raise run_module.hosts.HostsError(f"differ in {name}")

    monkeypatch.setattr(run_module.hosts, "agree", differ)
    with pytest.raises(run_module.hosts.HostsError, match="differ in software"):
        run(small_run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_compare_all_records_and_where_they_go_on(
    small_run, clips, tmp_path, monkeypatch
):
    compared = {}

    def agree(name, value):
        compared[name] = value
        if name == "start":
            raise run_module.hosts.HostsError("enough")

    monkeypatch.setattr(run_module.hosts, "agree", agree)
    held_out = SourceConfig("heldout", str(clips / "heldout.json"))
    config = dataclasses.replace(small_run, validation=ValidationConfig((held_out,), every=6))
    with pytest.raises(run_module.hosts.HostsError, match="enough"):
        run(config, tmp_path / "run")
    assert compared["run"]["steps"] == 12 and set(compared["run"]["data"]) == {"toybox"}
    assert set(compared["run"]["validation data"]) == {"heldout"}
    assert compared["start"] == {"the newest checkpoint in --out": None}


def test_every_shape_is_compiled_once(small_run, tmp_path, monkeypatch, capsys):
    lengths = set()

    def feed(*args, **kwargs):
        feeding = feeding_of(*args, **kwargs)
        lengths.update(step.length for step in feeding.schedule)
        return feeding

    monkeypatch.setattr(run_module, "feeding_of", feed)
    run(small_run, tmp_path / "run")
    told = re.findall(r"compiling the step for rows of ([\d,]+) slots", capsys.readouterr().err)
    assert sorted(int(said.replace(",", "")) for said in told) == sorted(lengths)


def test_losses_per_dataset_make_up_the_loss(done):
    for record in read_metrics(done):
        parts = [value for name, value in record.items() if name.startswith("loss/")]
        assert min(parts) <= record["loss"] + 1e-5 and max(parts) >= record["loss"] - 1e-5
    assert {name for r in read_metrics(done) for name in r if name.startswith("loss/")} == {
        "loss/toybox",
        "loss/words",
    }


def test_the_folder_describes_itself(done):
    config = json.loads((done / "train_config.json").read_text())
    assert config["rows"] == 4 and config["optimizer"]["learning_rate"] == 1e-2
    assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((done / "tensorboard").iterdir())
    assert any((done / "profile").rglob("*.xplane.pb"))
    assert not (done / "faults.jsonl").exists()


def test_checkpoints_hold_what_trains_and_nothing_else(done, small_run):
    params, _, _ = begin(small_run.start, None, small_run.seed)
    trained = [path for path in flatten(params) if not path.startswith("vision/")]
    with RunCheckpoints(done, read_only=True) as checkpoints:
        assert checkpoints.steps[-2:] == [8, 12]
        stored = checkpoints.stored(12)
    assert sorted(stored) == sorted(trained)


def test_a_run_loads_as_the_model_that_it_made(done, small_run, clips):
    before, card, _ = begin(small_run.start, None, small_run.seed)
    params, trained_card, _ = read(done, np.float32, scan_layers=True)
    old, new = flatten(before), flatten(params)
    assert set(old) == set(new)
    for path in old:
        assert (path.startswith("vision/")) == bool(np.array_equal(old[path], new[path])), path
    assert trained_card.preset.square_pad and not card.preset.square_pad
    model = vl.load(done)
    video = next((clips / "videos" / "heldout").iterdir())
    assert isinstance(model.ask(str(video), "What is red?", max_new_tokens=3), str)


def test_a_finished_run_started_again_changes_nothing(done, small_run, tmp_path):
    folder = copy_of(done, tmp_path)
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(small_run, folder) == Outcome(12, 12)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_every_difference(done, small_run):
    optimizer = dataclasses.replace(small_run.optimizer, learning_rate=1.0)
    with pytest.raises(CheckpointError) as caught:
        run(dataclasses.replace(small_run, optimizer=optimizer, rows=8), done)
    said = str(caught.value)
    assert "optimizer.learning_rate: 0.01 -> 1.0" in said and "rows: 4 -> 8" in said
    assert "another --out" in said and "\n" not in said


def test_changed_records_are_refused(small_run, clips, tmp_path):
    moved = tmp_path / "train.json"
    records = json.loads((clips / "train.json").read_text())
    source = SourceConfig("toybox", str(moved), media_root=str(clips))
    moved.write_text(json.dumps(records))
    config = dataclasses.replace(
        small_run, data=dataclasses.replace(small_run.data, sources=(source,))
    )
    run(config, tmp_path / "mine")
    moved.write_text(json.dumps(records[1:]))
    with pytest.raises(CheckpointError, match="the records of toybox have changed"):
        run(config, tmp_path / "mine")


def test_a_changed_base_is_refused(done, small_run, small_model, tmp_path):
    """Training or loading a run beside other frozen weights would be another model."""
    folder = copy_of(done, tmp_path)
    base = shutil.copytree(small_model, tmp_path / "base")
    card = json.loads((folder / "run.json").read_text())
    card["start"]["model"] = str(base)
    (folder / "run.json").write_text(json.dumps(card))
    read(folder, np.float32, scan_layers=True)  # the same weights elsewhere will do
    first = next(iter(card["frozen"]))
    card["frozen"][first] = card["frozen"][first][:-1] + "x"
    (folder / "run.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=f"has changed since, in 1 of .*{first}"):
        read(folder, np.float32, scan_layers=True)


def test_a_start_that_failed_does_not_claim_its_folder(small_run, tmp_path):
    missing = dataclasses.replace(small_run.data, sources=(SourceConfig("x", "nowhere.json"),))
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read"):
        run(dataclasses.replace(small_run, data=missing), tmp_path)
    assert run(small_run, tmp_path) == Outcome(12, 12)


def test_a_folder_that_is_no_run_is_refused(small_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a run"):
        run(small_run, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_held_out_records_are_measured_and_choose_the_best(small_run, clips, tmp_path):
    held_out = SourceConfig("heldout", str(clips / "heldout.json"))
    config = dataclasses.replace(
        small_run,
        save=SaveConfig(every=4, keep_last=1, keep_best=1),
        validation=ValidationConfig((held_out,), every=6, max_records=6, accuracy=True),
    )
    run(config, tmp_path / "run")
    records = {r["step"]: r for r in read_metrics(tmp_path / "run")}
    measured = {step: r["validation/loss"] for step, r in records.items() if "validation/loss" in r}
    assert list(measured) == [4, 6, 8, 12]
    assert any(name.startswith("accuracy/") for name in records[12])
    assert records[12]["validation/loss/heldout"] == pytest.approx(measured[12], rel=1e-6)
    best = min((4, 8, 12), key=measured.get)
    with RunCheckpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps == sorted({best, 12})


def test_unreadable_media_are_counted_named_and_survived(small_run, clips, tmp_path):
    records = json.loads((clips / "train.json").read_text())[-8:]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    said = records[0]["conversations"]
    records += [
        {"id": "bad", "video": str(broken), "conversations": said},
        {"id": "gone", "video": "nowhere.mp4", "conversations": said},
    ]
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(records))
    source = SourceConfig("toybox", str(file), media_root=str(clips))
    data = dataclasses.replace(small_run.data, sources=(source,))
    run(dataclasses.replace(small_run, data=data), tmp_path / "run")
    faults = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").open()]
    assert {(fault["source"], fault["record"]) for fault in faults} == {
        ("toybox", "bad"),
        ("toybox", "gone"),
    }
    assert len(read_metrics(tmp_path / "run")) == 12
    strict = dataclasses.replace(data, max_faults=1)
    with pytest.raises(TooManyFaults, match="2 records cannot be read, 1 are allowed"):
        run(dataclasses.replace(small_run, data=strict), tmp_path / "strict")
    assert (tmp_path / "strict" / "faults.jsonl").is_file()


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_adapters_alone_are_kept_and_merge_when_loaded(small_run, tmp_path, quantize):
    rules = (
        Rule("connector/.*", "train"),
        Rule("decoder/layers/mlp/.*/kernel", "lora", rank=2, alpha=4, quantize=quantize),
        Rule(".*", "freeze"),
    )
    config = dataclasses.replace(small_run, rules=rules)
    run(config, tmp_path / "run")
    with RunCheckpoints(tmp_path / "run", read_only=True) as checkpoints:
        stored = checkpoints.stored(12)
    assert {p for p in stored if p.startswith("decoder/")} == {
        f"decoder/layers/mlp/{name}/kernel_{part}"
        for name in ("gate", "up", "down")
        for part in ("lora_a", "lora_b")
    }
    before, _, _ = begin(config.start, None, config.seed)
    params, _, _ = read(tmp_path / "run", np.float32, scan_layers=True)
    assert set(flatten(params)) == set(flatten(merge(before)))
    changed = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, params)
    assert changed["decoder"]["layers"]["mlp"]["gate"]["kernel"] > 1e-4
    assert changed["decoder"]["layers"]["attention"]["query"]["kernel"] == 0
