"""A run goes on in any number of processes and devices: the same records, the same losses."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from vllama2_jax.train.metrics import read_metrics

STEPS, EVERY = 24, 4
_OPTIONS = (
    "--batch 4 --workers 0 --config config:video_sft --config set:dtype='float32' "
    "--config set:optimizer.learning_rate=1e-2 --config set:data.max_tokens=120"
)
# The recipe of `tiny` that hears and sees, on scenes that are rendered on the way.
_TINY = "--model tiny --config config:tiny_av_joint --batch 8 --workers 0"


class Runs:
    """Starts the same run in so many processes, each with so many simulated devices."""

    def __init__(self, *options):
        self._arguments = [sys.executable, "-m", "tests.train.recorded_run", "train", *options]
        self._arguments += ["--steps", str(STEPS), "--save-every", str(EVERY)]

    def start(self, out, processes=1, devices=1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        several = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        environment = {
            **os.environ,
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "STEPS": str(STEPS),
            **(several if processes > 1 else {}),
        }
        return [
            subprocess.Popen(
                [*self._arguments, "--out", str(out)],
                env={
                    **environment,
                    "JAX_PROCESS_ID": str(number),
                    "RECORDS": f"{out}.{number}of{processes}.records",
                },
                stdout=subprocess.DEVNULL,
                stderr=open(f"{out}.{number}.log", "a"),
            )
            for number in range(processes)
        ]

    def finish(self, out, **how):
        started = self.start(out, **how)
        try:
            codes = [process.wait(timeout=900) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [open(f"{out}.{number}.log").read()[-2000:] for number in range(len(started))]
        assert not any(codes), logs


@pytest.fixture(scope="module")
def runs(small_model, clips):
    records = str(clips / "train.json")
    return Runs("--model", str(small_model), "--data", records, *_OPTIONS.split())


def losses(out):
    return {record["step"]: record["loss"] for record in read_metrics(out)}


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The folder of a run of one process with one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(out)
    return out


def records(out, processes=1):
    """{step: ids of all rows}, of the steps for which every process has read its share."""
    read = []
    for number in range(processes):
        with open(f"{out}.{number}of{processes}.records", encoding="utf-8") as file:
            whole = [line for line in file if line.endswith("\n")]  # a kill may cut the last one
        read.append(dict(map(json.loads, whole)))
    steps = set.intersection(*map(set, read))
    return {step: [row for share in read for row in share[step]] for step in steps}


def same_losses(out, alone):
    found, wanted = losses(out), losses(alone)
    assert set(found) == set(wanted) == set(range(1, STEPS + 1))
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step


def same_records(out, alone, processes):
    """The runs of so many processes, together, read what one process reads."""
    wanted, seen = records(alone), set()
    assert set(wanted) == set(range(STEPS))
    for count in processes:
        found = records(out, count)
        assert found, count
        for step, rows in found.items():
            assert rows == wanted[step], (count, step)
        seen |= set(found)
    assert seen == set(wanted)


def wait_for(out, step, processes):
    deadline = time.monotonic() + 900
    while not (out / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_four_devices_of_one_process_give_its_losses(runs, alone, tmp_path):
    runs.finish(tmp_path / "run", devices=4)
    same_losses(tmp_path / "run", alone)


def kill_and_go_on(runs, out):
    """In two processes, in four, and in one to the end; the first two are killed on the way."""
    for processes, step in ((2, EVERY), (4, 3 * EVERY)):
        started = runs.start(out, processes=processes)
        try:
            wait_for(out, step, started)
            started[-1].kill()
            for process in started:  # the others do not outlive it
                process.wait(timeout=300)
        finally:
            for process in started:
                process.kill()
        assert started[0].returncode != 0
    runs.finish(out)


@pytest.mark.slow
def test_a_run_is_killed_in_two_processes_and_goes_on_in_four_and_in_one(runs, alone, tmp_path):
    kill_and_go_on(runs, tmp_path / "run")
    same_losses(tmp_path / "run", alone)
    same_records(tmp_path / "run", alone, (2, 4, 1))


@pytest.mark.slow
def test_tiny_hears_and_sees_alike_however_many_processes_train_it(tmp_path):
    runs = Runs(*_TINY.split())
    runs.finish(tmp_path / "alone")
    kill_and_go_on(runs, tmp_path / "run")
    same_losses(tmp_path / "run", tmp_path / "alone")
    same_records(tmp_path / "run", tmp_path / "alone", (2, 4, 1))
