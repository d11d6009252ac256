"""Processes of one run find each other, agree, and fail together with words."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vllama2_jax.parallel import hosts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "tests.parallel.two_processes"]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **environment,
                "JAX_PROCESS_ID": str(number),
                "XLA_FLAGS": f"--xla_backend_optimization_level={number + 1}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out) for out, _ in outputs]


def test_processes_find_each_other_by_three_variables(found):
    assert [(one["process"], one["processes"]) for one in found] == [(0, 2), (1, 2)]


def test_what_is_the_same_passes_and_what_differs_is_named(found):
    assert [one["same"] for one in found] == [None, None]
    for one in found:
        assert "processes 0 and 1 differ in seed (0 and 1)" in one["differs"]


def test_processes_that_compile_under_different_flags_are_told_so(found):
    for one in found:
        assert "processes 0 and 1 differ in flags ('" in one["software"]
        assert "--xla_backend_optimization_level=1" in one["software"]


def test_the_first_does_what_is_done_once_and_its_failure_is_everyones(found):
    assert [one["did"][:1] for one in found] == [[0], []]
    assert found[0]["failed"] == "error: the disk is full"
    assert found[1]["failed"] == "error: the first process says: the disk is full"


def test_all_stop_behind_the_same_step_when_one_is_told(found):
    assert found[0]["stopped"] == found[1]["stopped"] == 5


def test_another_run_of_the_same_processes_hears_nothing_of_the_one_before(found):
    """Its names are the same, and what was said, failed or stopped under them then is over."""
    assert [one["again"] for one in found] == [[None, None, None, None, False]] * 2
    assert found[0]["did"] == [0, "again"] and found[1]["did"] == []


def test_waiting_for_a_process_that_does_not_come_ends_with_words(found):
    assert "not all 2 processes reached 'alone' within 1 s" in found[0]["alone"]


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_missing_variable_is_named(monkeypatch, name):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for other in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(other, "1")
    monkeypatch.delenv(name)
    with pytest.raises(hosts.HostsError, match=f"{name} is missing"):
        hosts.join()


@pytest.fixture
def on_a_tpu(monkeypatch):
    """As a machine with chips, of which nothing else is known."""
    monkeypatch.setattr(hosts, "has_tpus", lambda: True)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(hosts.clusters.GkeTpuCluster, "is_env_present", lambda: False)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr(hosts.jax.distributed, "initialize", _joined)


def _joined(**options):
    raise RuntimeError("joins others")


def test_a_tpu_machine_of_which_no_others_are_known_is_one_process(monkeypatch, on_a_tpu):
    monkeypatch.setattr(hosts.clusters.GceTpuCluster, "is_env_present", lambda: False)
    hosts.join()
    monkeypatch.setattr(hosts.clusters.GceTpuCluster, "is_env_present", lambda: True)
    with pytest.raises(hosts.HostsError, match="joins others"):
        hosts.join()


def test_metadata_that_cannot_be_read_are_no_reason_to_train_alone(monkeypatch, on_a_tpu):
    def unreachable():
        raise OSError("no route to metadata.google.internal")

    monkeypatch.setattr(hosts.clusters.GceTpuCluster, "is_env_present", unreachable)
    with pytest.raises(hosts.HostsError, match=r"\(no route .* alone, set TPU_SKIP_MDS_QUERY=1"):
        hosts.join()


def test_a_slurm_job_s_own_shell_is_told_of_srun(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(hosts.HostsError, match=r"has 16 tasks, .* start it with srun"):
        hosts.join()


def test_one_process_alone_needs_nobody():
    hosts.agree("alone", {"steps": 1})
    hosts.barrier("alone", 0.1)
    assert hosts.is_first() and not hosts.several()


class Service:
    """The coordination service, as far as keys go; of what is not there yet it says {}."""

    def __init__(self):
        self.said, self.read = {}, []

    def key_value_set(self, key, text):
        assert key not in self.said
        self.said[key] = text

    def blocking_key_value_get(self, key, milliseconds):
        self.read.append(key)
        return self.said.get(key, "{}")


def test_of_many_processes_that_agree_one_reads_a_digest_of_each_and_the_others_its_word(
    monkeypatch,
):
    service, me = Service(), [0]
    monkeypatch.setattr(hosts.distributed.global_state, "client", service)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 64)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: me[0])
    for me[0] in range(63, -1, -1):
        hosts.agree("run", {"steps": 7, "long": "x" * 10_000})
    assert len(service.read) == 63 + 63
    assert sum(len(service.said.get(key, "")) for key in service.read) < 64 * 200
