"""launch/gke_xpk.sh against a fake xpk, docker and kubectl, which write down what they are told."""

import shlex
import subprocess

import pytest

PLACE = ("--project", "mine", "--zone", "us-east5-a", "--cluster", "c1")
RUN = (*PLACE, "--topology", "2xv5e-256", "--name", "run1", "--image", "host/vllama2:1")
COMMAND = ["vllama2", "train", "it's", "a  b", '--config=fiddler:data_root("gs://b")']
FAKE = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${0##*/}" "$@" \\
  >>"$FAKE_CLOUD/calls.jsonl"
if [[ -n ${FAKE_FAILURE:-} ]]; then echo "$FAKE_FAILURE" >&2; exit 3; fi
"""


@pytest.fixture
def gke(cloud):
    for name in ("xpk", "docker", "kubectl"):
        cloud.program(name, FAKE)
    return cloud


def sent(gke, action, *options):
    gke.run("gke_xpk.sh", action, *options)
    return gke.calls[-1]


def test_a_cluster_is_made_of_slices_as_plan_names_them(gke):
    call = sent(gke, "cluster", *RUN, "--spot")
    assert call[:3] == ["xpk", "cluster", "create"]
    assert {"--cluster=c1", "--tpu-type=v5litepod-256", "--num-slices=2", "--spot"} <= set(call)
    assert "--on-demand" in sent(gke, "cluster", *RUN)
    assert "--reservation=r1" in sent(gke, "cluster", *RUN, "--reservation", "r1")
    told = gke.run("gke_xpk.sh", "cluster", *RUN).stderr.splitlines()
    assert "512 chips" in told[0]
    gke.run("gke_xpk.sh", *shlex.split(told[-1])[2:])
    assert gke.calls[-1][:4] == ["xpk", "cluster", "delete", "--cluster=c1"]


def test_the_command_arrives_whole_in_the_container_under_its_flags(gke, tmp_path):
    call = sent(gke, "run", *RUN, "--restarts", "3", "--", *COMMAND)
    assert call[:3] == ["xpk", "workload", "create"]
    assert {"--workload=run1", "--docker-image=host/vllama2:1", "--max-restarts=3"} <= set(call)
    (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    # Without it xpk starts a run again only where that ended with 42 or 127-255; errors end with 2.
    assert "--restart-on-exit-codes=1-126" in call
    # As xpk has bash read it: (COMMAND) &
    text = f"bash() {{ printf '%s\\0' \"$@\"; }}; ({command.removeprefix('exec ')}) & wait"
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert words == ["/opt/vllama2/launch/with_flags.sh", "tpu", *COMMAND]
    assert command.startswith("exec ")  # or a shell would get xpk's SIGTERM


def test_a_run_without_restarts_tells_xpk_nothing_of_exit_codes(gke):
    call = sent(gke, "run", *RUN, "--", *COMMAND)
    assert "--max-restarts=0" in call and not [word for word in call if "exit-codes" in word]


def test_list_logs_and_deletions(gke):
    assert sent(gke, "list", *PLACE)[:4] == ["xpk", "workload", "list", "--cluster=c1"]
    assert sent(gke, "logs", *RUN)[:3] == ["kubectl", "logs", "--follow"]
    call = sent(gke, "delete", *RUN)
    assert call[:5] == ["xpk", "workload", "delete", "--workload=run1", "--cluster=c1"]
    assert sent(gke, "delete-cluster", *RUN)[:4] == ["xpk", "cluster", "delete", "--cluster=c1"]


def test_the_image_is_built_for_tpus_and_pushed(gke):
    gke.run("gke_xpk.sh", "image", "--image", "host/vllama2:1")
    build, push = gke.calls
    assert build[:2] == ["docker", "build"] and "--build-arg=EXTRAS=tpu,gcs" in build
    assert push == ["docker", "push", "host/vllama2:1"]


@pytest.mark.parametrize(
    "action", ["cluster", "image", "run", "logs", "list", "delete", "delete-cluster"]
)
def test_what_print_shows_is_what_is_run(gke, action):
    shown = gke.printed("gke_xpk.sh", action, *RUN, "--", *COMMAND)
    gke.run("gke_xpk.sh", action, *RUN, "--", *COMMAND)
    assert shown == gke.calls


def test_a_failing_xpk_is_a_failing_script_with_its_reason(gke):
    done = gke.run("gke_xpk.sh", "list", *PLACE, code=1, FAKE_FAILURE="no such cluster")
    assert "no such cluster" in done.stderr
    assert "this failed with exit code 3: xpk workload list" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cluster", *PLACE], "--topology is missing"),
        (["list", *PLACE[:4]], "--cluster is missing"),
        (["list", "--cluster=c1", "--zone=z"], "--project is missing"),
        (["run", *RUN], "no command, as in -- vllama2 train"),
        (["run", *RUN, "--", "a\nb"], "a command for xpk cannot hold line breaks"),
        (["cluster", *RUN, "--spot", "--reservation=r"], "--spot and --reservation exclude"),
        (["run", *RUN, "--restarts=often"], "--restarts often: must be a whole number"),
        (["run", *RUN, "--name=Run_1", "--", "a"], "--name Run_1: at most 40 small letters"),
        (["run", *RUN, "--name", "r" * 41, "--", "a"], f"--name {'r' * 41}: at most 40 small"),
        (["run", *RUN, "--topology=v5p-100", "--", "a"], "no slice v5p-100; there are v5p-8"),
        (["start"], "unknown action 'start'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line_and_nothing_is_sent(gke, arguments, words):
    (line,) = gke.run("gke_xpk.sh", *arguments, code=2).stderr.splitlines()
    assert line.startswith(f"gke_xpk.sh: {words}")
    assert gke.calls == []
