"""A run that is killed goes on as if nothing had been, in processes of its own."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import optax
import psutil
import pytest

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.train.metrics import read_metrics

STEPS = 60


@pytest.fixture(scope="module")
def command(small_model, clips, tmp_path_factory):
    """What a person types, without --out; programs are compiled once for all runs."""
    options = (
        f"--model {small_model} --data {clips / 'train.json'} --steps {STEPS} --batch 4 "
        "--save-every 7 --workers 0 --config config:video_sft --config set:dtype='float32' "
        "--config set:optimizer.learning_rate=1e-2 --config set:data.max_tokens=120"
    )
    programs = tmp_path_factory.mktemp("programs")
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [sys.executable, "-m", "vllama2_jax.cli", "train", *options.split()]

    def start(out, *more):
        return subprocess.Popen(
            [*arguments, "--out", str(out), *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """{step: loss} of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = command(out)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return losses(out)


def losses(out):
    return {record["step"]: record["loss"] for record in read_metrics(out)}


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_behind(process, out, step, number, watch=lambda: None, send=os.kill):
    """Send a signal once so many steps are logged; `watch` is called until then."""
    deadline = time.monotonic() + 240
    while lines(out) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        watch()
        time.sleep(0.002)
    send(process.pid, number)
    _, said = process.communicate(timeout=120)
    return said


def test_a_run_killed_twice_is_bit_for_bit_the_same(command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    for step in (10, 30):
        process = command(out)
        stop_behind(process, out, step, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 59, "lo')  # torn, as a kill may leave it
    process = command(out)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "going on behind step" in said
    assert losses(out) == uninterrupted
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [
        *range(1, STEPS + 1)
    ]


def test_no_process_outlives_a_killed_run(command, tmp_path):
    """Grain's workers, and their decoders, would wait for the dead run for good."""
    out, left = tmp_path / "run", set()
    process = command(out, "--workers", "2")
    children = psutil.Process(process.pid).children
    stop_behind(
        process, out, 3, signal.SIGKILL, watch=lambda: left.update(children(recursive=True))
    )
    _, alive = psutil.wait_procs(left, timeout=30)
    assert len(left) >= 2 and not alive


def test_an_interrupt_at_the_terminal_saves_and_ends_quietly(command, tmp_path):
    """It reaches every process of the group, workers and decoders as well."""
    out = tmp_path / "run"
    process = command(out, "--workers", "2")
    said = stop_behind(process, out, 3, signal.SIGINT, send=os.killpg)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in said and "Traceback" not in said
    with RunCheckpoints(out, read_only=True) as checkpoints:
        assert checkpoints.latest == lines(out)


def test_sigterm_saves_where_it_is_and_says_so(command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = command(out)
    said = stop_behind(process, out, 10, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    last = lines(out)
    assert f"stopped by SIGTERM behind step {last} of {STEPS}" in said
    with RunCheckpoints(out, read_only=True) as checkpoints:
        assert checkpoints.latest == last
    assert losses(out) == {step: uninterrupted[step] for step in range(1, last + 1)}


def test_a_failed_save_is_an_error(tmp_path):
    """As on a full disk: no file may grow beyond 64 KiB."""
    arrays = {"a": jax.random.normal(jax.random.key(0), (512, 512))}
    state = optax.adam(1.0).init(arrays)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(CheckpointError, match="a checkpoint could not be written"),
        RunCheckpoints(tmp_path) as checkpoints,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        try:
            checkpoints.save(1, arrays, state, 0.0)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == []
