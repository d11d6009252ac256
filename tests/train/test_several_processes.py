"""A run goes on in any number of processes and devices, to the same losses."""

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
        self._arguments = [sys.executable, "-m", "vllama2_jax.cli", "train", *options]
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
            **(several if processes > 1 else {}),
        }
        return [
            subprocess.Popen(
                [*self._arguments, "--out", str(out)],
                env={**environment, "JAX_PROCESS_ID": str(number)},
                stdout=subprocess.DEVNULL,
                stderr=open(f"{out}.{number}.log", "a"),
            )
            for number in range(processes)
        ]

    def finish(self, out, **how):
        started = self.start(out, **how)
        codes = [process.wait(timeout=400) for process in started]
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
    """{step: loss} of one process with one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(out)
    return losses(out)


def same(found, wanted):
    assert set(found) == set(wanted) == set(range(1, STEPS + 1))
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step


def wait_for(out, step, processes):
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_four_devices_of_one_process_give_its_losses(runs, alone, tmp_path):
    runs.finish(tmp_path / "run", devices=4)
    same(losses(tmp_path / "run"), alone)


def kill_and_go_on(runs, out):
    """In two processes, in four, and in one to the end; the first two are killed on the way."""
    for processes, step in ((2, EVERY), (4, 3 * EVERY)):
        started = runs.start(out, processes=processes)
        wait_for(out, step, started)
        started[-1].kill()
        for process in started:  # the others do not outlive it
            process.wait(timeout=300)
        assert started[0].returncode != 0
    runs.finish(out)


@pytest.mark.slow
def test_a_run_is_killed_in_two_processes_and_goes_on_in_four_and_in_one(runs, alone, tmp_path):
    kill_and_go_on(runs, tmp_path / "run")
    same(losses(tmp_path / "run"), alone)


@pytest.mark.slow
def test_tiny_hears_and_sees_to_the_same_losses_however_many_processes_train_it(tmp_path):
    runs = Runs(*_TINY.split())
    runs.finish(tmp_path / "alone")
    kill_and_go_on(runs, tmp_path / "run")
    same(losses(tmp_path / "run"), losses(tmp_path / "alone"))
