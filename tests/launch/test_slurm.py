"""launch/slurm_gpu.sbatch, with a fake srun that starts real processes as Slurm would."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from fake_cloud import LAUNCH, ROOT

SCRIPT = LAUNCH / "slurm_gpu.sbatch"
# Starts NODES x TASKS processes, each told who it is as Slurm tells it; ends as the worst of them.
_SRUN = """#!{python}
import json, os, pathlib, subprocess, sys
with open(os.environ["FAKE_CLOUD"] + "/srun.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
def started(number):
    told = dict(SLURM_STEP_NODELIST="localhost", SLURM_PROCID=number, SLURM_LOCALID=number % tasks)
    told = dict((name, str(value)) for name, value in told.items())
    return subprocess.Popen(command, env=dict(os.environ, **told))
sys.exit(max(process.wait() for process in [started(k) for k in range(nodes * tasks)]))
"""
# Joins as `vllama2 train` does; the backends, which are not of this machine, are not asked.
_JOIN = """
import json, os, jax
from jax._src import distributed, xla_bridge
from vllama2_jax.parallel import hosts
hosts.join()
found = distributed.global_state
told = dict(process=found.process_id, processes=found.num_processes)
told |= dict(gpu=xla_bridge.CUDA_VISIBLE_DEVICES.value, flags=os.environ["XLA_FLAGS"])
os.write(1, (json.dumps(told) + "\\n").encode())  # at once: two processes share this pipe
jax.distributed.shutdown()
"""
# Jobs on one machine meet at a port that follows from this number.
JOB = str(os.getpid())


@pytest.fixture
def slurm(cloud):
    cloud.program("srun", _SRUN.format(python=sys.executable))
    cloud.program("squeue", "#!/usr/bin/env bash\necho ${FAKE_STATE:-RUNNING}\n")
    cloud.program("scontrol", '#!/usr/bin/env bash\necho "$*" >>$FAKE_CLOUD/scontrol\n')
    shutil.copy(SCRIPT, cloud.folder / "slurm_script")  # as Slurm does

    def run(*command, code=0, **more):
        told = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        done = subprocess.run(
            ["bash", str(cloud.folder / "slurm_script"), *command],
            env=cloud.environment(PYTHONPATH=str(ROOT), **(told | more)),
            cwd=cloud.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    run.cloud = cloud
    return run


def test_a_task_for_each_gpu_joins_and_takes_its_own(slurm):
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
    done = slurm(sys.executable, "-c", _JOIN, **nodes)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted((one["process"], one["processes"], one["gpu"]) for one in found) == [
        (0, 4, "0"),
        (1, 4, "1"),
        (2, 4, "0"),
        (3, 4, "1"),
    ]
    assert all("latency_hiding" in one["flags"] for one in found)


def test_the_job_asks_for_as_many_tasks_as_gpus_and_may_be_requeued():
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE))
    assert told["ntasks-per-node"] == told["gpus-per-node"]
    assert "requeue" in told and told["open-mode"] == "append"
    name, seconds = told["signal"].split("@")
    assert name == "TERM" and int(seconds) >= 300  # to the processes ("B:" would be the shell)
    assert "gpus-per-task" not in told and "gpu-bind" not in told
    head, _, code = SCRIPT.read_text().partition("\nset -euo pipefail\n")
    assert "#SBATCH" in head and "#SBATCH" not in code  # where Slurm stops looking


@pytest.mark.parametrize(
    ("ended", "state", "code", "requeued"),
    [
        (0, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),  # before the time limit
        (143, "CANCELLED", 143, False),  # by scancel
        (1, "RUNNING", 1, False),
    ],
)
def test_a_run_that_was_stopped_goes_on_and_one_that_ended_does_not(
    slurm, ended, state, code, requeued
):
    slurm("bash", "-c", f"exit {ended}", code=code, FAKE_STATE=state)
    told = slurm.cloud.folder / "scontrol"
    assert (told.read_text() if told.exists() else "") == (f"requeue {JOB}\n" if requeued else "")


def test_what_print_shows_is_what_is_started(slurm):
    command = ["bash", "-c", "exit 0", "it's", "a b", ""]
    shown = subprocess.run(
        ["bash", str(SCRIPT), "--print", *command],
        cwd=ROOT,
        env=slurm.cloud.environment(SLURM_CPUS_PER_TASK="3"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    slurm(*command)
    assert [shlex.split(shown)[1:]] == slurm.cloud.lines("srun.jsonl")


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ([], {}, "no command, as in: sbatch launch/slurm_gpu.sbatch"),
        (["a"], {"SLURM_GPUS_ON_NODE": "4"}, "2 tasks for 4 GPUs of a node"),
        (["a"], {"SLURM_SUBMIT_DIR": "/"}, "/ is not the project; call sbatch from its folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(slurm, command, more, words):
    (line,) = slurm(*command, code=1, **more).stderr.splitlines()
    assert words in line
