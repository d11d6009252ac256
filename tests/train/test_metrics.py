"""The log of a run: lines survive kills at any byte, a resumed run cuts back to its step."""

import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.train.metrics import MetricsLog, read_metrics


def line(step, **values):
    return json.dumps({"step": step, **values}).encode() + b"\n"


def write_lines(folder, *lines):
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))


def reopened(folder, restored_step):
    """The file's bytes once a run went on from a step."""
    with MetricsLog(folder, restored_step=restored_step, tensorboard=False):
        pass
    return (folder / "metrics.jsonl").read_bytes()


def steps(records):
    return [record["step"] for record in records]


def events(folder):
    """TensorBoard's events, file by file: TFRecord is length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_each_step_is_one_line_on_the_disk_before_the_log_is_closed(tmp_path):
    with MetricsLog(tmp_path / "run", restored_step=0, tensorboard=False) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 1.5, "stage": "video_sft"})
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == step
            assert json.loads(lines[-1]) == {"step": step, "loss": 1.5, "stage": "video_sft"}


def test_arrays_of_one_number_are_written_without_loss(tmp_path):
    values = {"a": np.float32(0.1), "b": jnp.asarray(0.1), "c": np.int32(7), "d": np.ones((1, 1))}
    with MetricsLog(tmp_path, restored_step=0, tensorboard=False) as log:
        log.write({"step": np.int64(3), **values})
    (record,) = read_metrics(tmp_path)
    assert record.pop("step") == 3
    assert record == {name: float(np.asarray(value).item()) for name, value in values.items()}


def test_what_is_not_finite_becomes_null_and_the_file_stays_standard_json(tmp_path):
    with MetricsLog(tmp_path, restored_step=0) as log:
        log.write({"step": 1, "loss": float("nan"), "grad_norm": jnp.inf, "tokens": 5})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    expected = {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}
    assert json.loads(text, parse_constant=refuse) == expected
    assert read_metrics(tmp_path) == [expected]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"step": 5}, "step 5 cannot follow those of step 5"),
        ({"step": 4}, "step 4 cannot follow"),
        ({"loss": 1.0}, "need a 'step' that is a whole number, not None"),
        ({"step": 6.0}, "whole number, not 6.0"),
        ({"step": 6, "loss": [1.0]}, "'loss' must be a number or a string, not list"),
        ({"step": 6, "loss": np.ones(2)}, "'loss' must be a number or a string, not ndarray"),
    ],
)
def test_a_record_that_cannot_be_meant_is_refused_and_leaves_no_trace(tmp_path, record, words):
    write_lines(tmp_path, line(5))
    with MetricsLog(tmp_path, restored_step=5, tensorboard=False) as log:
        with pytest.raises(ValueError, match=words.replace("(", r"\(")):
            log.write(record)
        log.write({"step": 6})
    assert steps(read_metrics(tmp_path)) == [5, 6]


@pytest.mark.parametrize("restored", [0, 1, 3, 9])
def test_a_resumed_run_keeps_the_lines_up_to_its_step_byte_for_byte(tmp_path, restored):
    lines = [line(step, loss=1 / step, stage="å") for step in range(1, 6)]
    write_lines(tmp_path, *lines)
    assert reopened(tmp_path, restored) == b"".join(lines[:restored])


def test_metrics_of_step_0_stay_when_a_run_begins_anew(tmp_path):
    write_lines(tmp_path, line(0, accuracy=0.1), line(1))
    assert reopened(tmp_path, 0) == line(0, accuracy=0.1)


def test_a_file_cut_at_any_byte_keeps_every_whole_line(tmp_path):
    lines = [line(step, loss=0.1 * step, stage="é") for step in (1, 2, 3)]
    whole = b"".join(lines)
    for size in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:size])
        kept, end = [], 0
        for each in lines:
            end += len(each)
            # A line that lacks only its end of line holds the whole record.
            kept += [each] if size >= end - 1 else []
        assert steps(read_metrics(tmp_path)) == list(range(1, len(kept) + 1))
        assert reopened(tmp_path, 3) == b"".join(kept)


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 64,
        b'{"step": 4, "lo',
        b"\n\n",
        b"\xff\xfe\n",
        b'{"step": NaN}\n',
        b"[1]\n17\n",
        b"[",
    ],
)
def test_an_end_that_is_no_record_is_cut_off(tmp_path, tail):
    write_lines(tmp_path, line(2), line(3), tail)
    assert steps(read_metrics(tmp_path)) == [2, 3]
    assert reopened(tmp_path, 3) == line(2) + line(3)


def test_garbage_in_front_of_what_is_dropped_anyway_is_cut_off_with_it(tmp_path):
    write_lines(tmp_path, line(1), b"\0\0\n", line(3))
    assert reopened(tmp_path, 1) == line(1)


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ([line(1), b"not a record\n", line(3)], 2),
        ([b'{"name": "of another program"}\n', b'{"name": "still"}\n'], 1),
    ],
)
def test_damage_that_no_kill_leaves_is_an_error_that_names_the_line(tmp_path, lines, number):
    write_lines(tmp_path, *lines)
    for use in (lambda: reopened(tmp_path, 5), lambda: read_metrics(tmp_path)):
        with pytest.raises(ValueError, match=f"metrics.jsonl: line {number} is not the metrics"):
            use()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)


def test_a_kill_while_cutting_back_leaves_the_old_file(tmp_path, monkeypatch):
    lines = [line(step) for step in range(1, 6)]
    write_lines(tmp_path, *lines)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            reopened(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert reopened(tmp_path, 2) == b"".join(lines[:2])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_tensorboard_has_each_number_of_a_step_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, restored_step=0)
    log.write({"step": 7, "loss": 0.25, "loss/toybox": float("nan"), "stage": "x", "tokens": 3})
    (event,) = [event for event in events(tmp_path) if event.HasField("summary")]
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 7
    assert values.keys() == {"loss", "loss/toybox", "tokens"}
    assert (values["loss"], values["tokens"]) == (0.25, 3)
    assert np.isnan(values["loss/toybox"])
    log.__exit__()


def test_tensorboard_is_told_to_drop_what_a_resumed_run_repeats(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for restored in (0, 2):
        with MetricsLog(tmp_path, restored_step=restored) as log:
            for step in range(restored + 1, restored + 4):
                log.write({"step": step, "loss": 1.0})
    starts = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert {e.session_log.status for e in starts} == {SessionLog.START}
    assert sorted(e.step for e in starts) == [1, 3]
    assert steps(read_metrics(tmp_path)) == [1, 2, 3, 4, 5]


def test_a_bucket_and_a_folder_without_metrics_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="gs://bucket/run: metrics are appended to") as error:
        MetricsLog("gs://bucket/run", restored_step=0)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"metrics.jsonl: no such file"):
        read_metrics(tmp_path)
