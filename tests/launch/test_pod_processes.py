"""Processes that launch/tpu.sh starts on the machines of a slice find each other."""

import json
import re
import socket
import sys
from pathlib import Path

from fake_cloud import ROOT


def test_processes_on_machines_of_a_slice_find_each_other_without_being_told(cloud, tmp_path):
    """What `tpu.sh run` starts sets no JAX_* variable but which platforms may be used."""
    (tmp_path / "chips/dev/vfio").mkdir(parents=True)
    (tmp_path / "chips/dev/vfio/0").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(__file__).with_name("pod_worker.py")
    cloud.run_is(
        f"cd {ROOT} && PYTHONPATH={ROOT} JAX_COORDINATOR_PORT={port} exec {sys.executable} "
        f"{program} ${{FAKE_WORKER##*-}} 2 {tmp_path}/chips"
    )
    place = ("--name=pod1", "--project=mine", "--zone=z", "--topology=v5p-16")
    cloud.run("tpu.sh", "create", *place)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "train")
    logs = [cloud.run("tpu.sh", "logs", "--name=pod1", f"--worker={k}").stdout for k in (0, 1)]
    found = [json.loads(re.search(r"^\{.*\}$", log, re.MULTILINE)[0]) for log in logs]
    assert [(one["process"], one["processes"]) for one in found] == [(0, 2), (1, 2)]
    for one in found:  # the port is this test's, since both are on one machine
        assert one["variables"] == ["JAX_COORDINATOR_PORT", "JAX_PLATFORMS"]
