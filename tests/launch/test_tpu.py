"""launch/tpu.sh against a fake gcloud: what each action sends, and what becomes of a run."""

import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from fake_cloud import commands_of

POD = ("--name", "pod1", "--project", "mine", "--zone", "us-east5-a", "--every", "0")
SMALL = (*POD, "--topology", "v5p-16")
# Words that a shell would take apart.
HARD = [
    "vllama2",
    "train",
    '--config=fiddler:data_root("gs://b/my data")',
    "it's",
    "",
    "$HOME",
    "a\nb",
]


def verbs(calls):
    return [call[3] for call in calls]


def flags(call):
    return {word for word in call if word.startswith("--")}


def test_create_asks_for_a_queued_resource_and_says_what_ends_the_costs(cloud):
    done = cloud.run("tpu.sh", "create", *POD, "--topology", "v5p-128")
    (call,) = cloud.calls
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "pod1"]
    assert flags(call) == {
        *("--project=mine", "--zone=us-east5-a", "--quiet", "--node-id=pod1"),
        *("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"),
    }
    assert "64 chips" in done.stderr
    end = done.stderr.splitlines()[-1]
    assert shlex.split(end)[:3] == ["bash", str(cloud.project / "launch/tpu.sh"), "delete"]
    cloud.run("tpu.sh", *shlex.split(end)[2:])
    assert cloud.state["requests"] == cloud.state["nodes"] == {}


@pytest.mark.parametrize(
    ("told", "sent"),
    [
        (["--spot"], {"--spot"}),
        (["--reserved"], {"--reserved"}),
        (["--valid-for=6h"], {"--valid-until-duration=6h"}),
        (
            ["--create-with=--network=a b", "--create-with", "--internal-ips"],
            {"--network=a b", "--internal-ips"},
        ),
        (["--runtime", "v2-other"], {"--runtime-version=v2-other"}),
        (
            ["--topology=2xv5e-16"],
            {"--accelerator-type=v5litepod-16", "--node-count=2", "--node-prefix=pod1"},
        ),
    ],
)
def test_create_hands_on_what_it_is_told(cloud, told, sent):
    cloud.run("tpu.sh", "create", *SMALL, *told)
    assert sent <= flags(cloud.calls[0])
    assert ("--node-id=pod1" in cloud.calls[0]) == ("--node-count=2" not in sent)


def test_direct_makes_and_deletes_a_tpu_vm_without_a_queue(cloud):
    cloud.run("tpu.sh", "create", *POD, "--topology=v4-8", "--direct", "--spot")
    cloud.run("tpu.sh", "wait", "--name=pod1")
    cloud.run("tpu.sh", "delete", "--name=pod1")
    assert [call[2:4] for call in cloud.calls] == [
        ["tpu-vm", verb] for verb in ("create", "describe", "delete")
    ]
    assert {"--version=tpu-ubuntu2204-base", "--accelerator-type=v4-8", "--spot"} <= flags(
        cloud.calls[0]
    )
    assert cloud.state["nodes"] == {}


def test_wait_looks_until_all_slices_are_ready(cloud):
    cloud.change(
        on_create=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    )
    cloud.run("tpu.sh", "create", *SMALL, "--topology=2xv5p-16")
    done = cloud.run("tpu.sh", "wait", "--name=pod1")
    assert [call[2:5] for call in cloud.calls[1:]] == [
        *[["queued-resources", "describe", "pod1"]] * 4,
        *[["tpu-vm", "describe", f"pod1-{k}"] for k in (0, 1)],
    ]
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "pod1 is WAITING_FOR_RESOURCES",
        "pod1 is PROVISIONING",
        "pod1 is ACTIVE, its TPU READY",
    ]  # once each


def test_wait_ends_with_the_reason_where_the_request_has_failed(cloud):
    cloud.change(on_create=["PROVISIONING", "FAILED\tno capacity in this zone"])
    cloud.run("tpu.sh", "create", *SMALL)
    done = cloud.run("tpu.sh", "wait", "--name=pod1", code=1)
    assert "tpu.sh: pod1 is FAILED: no capacity in this zone; tpu.sh resume" in done.stderr


def test_delete_takes_the_tpu_and_the_queued_resource(cloud):
    cloud.run("tpu.sh", "create", *SMALL, "--topology=2xv5p-16")
    assert len(cloud.state["nodes"]) == 2
    cloud.run("tpu.sh", "delete", "--name=pod1")
    assert cloud.state["requests"] == cloud.state["nodes"] == {}
    again = cloud.run("tpu.sh", "delete", "--name=pod1", code=2)
    assert "nothing is known here of pod1, only of: nothing; give --project" in again.stderr


def test_a_failing_gcloud_is_a_failing_script_with_its_reason(cloud):
    cloud.change(fail={"create": "RESOURCE_EXHAUSTED: quota of 0 chips"})
    done = cloud.run("tpu.sh", "train", *SMALL, "--", "vllama2", code=1)
    assert "RESOURCE_EXHAUSTED: quota of 0 chips" in done.stderr
    assert (
        "tpu.sh: this failed with exit code 1: gcloud compute tpus queued-resources create pod1"
        in done.stderr
    )
    assert verbs(cloud.calls) == ["create"]


def test_setup_brings_the_commit_to_every_machine_and_keeps_its_environment(cloud):
    cloud.run("tpu.sh", "create", *SMALL, "--topology=2xv5p-16")
    cloud.run("tpu.sh", "setup", "--name=pod1", "--extras=tpu")
    homes = sorted((cloud.folder / "workers").iterdir())
    assert [home.name for home in homes] == ["pod1-0-0", "pod1-0-1", "pod1-1-0", "pod1-1-1"]
    for home in homes:
        project = home / "vllama2_jax"
        assert (project / "Makefile").is_file() and not (project / ".git").exists()
        (made,) = (home / "made").read_text().splitlines()
        assert f"-C {project} env EXTRAS=tpu PYTHON=" in made
        assert "transparent_hugepage" in (home / "sudone").read_text()
        (project / "stale.py").touch()
    cloud.run("tpu.sh", "setup", "--name=pod1")
    for home in homes:
        assert not (home / "vllama2_jax/stale.py").exists()
        assert (home / "vllama2_jax/.venv/bin/vllama2").is_file()


def test_a_machine_without_make_gets_it_from_a_fresh_list_of_packages(cloud):
    for program in ("bash", "dirname", "cat", "tee"):
        (cloud.bin / program).symlink_to(shutil.which(program))
    (cloud.bin / "make").unlink()
    subprocess.run(
        ["bash", str(cloud.project / "launch/worker.sh"), "setup", "tpu"],
        env=cloud.environment(PATH=str(cloud.bin), HOME=str(cloud.folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    told = (cloud.folder / "sudone").read_text().splitlines()
    assert [line.split()[3] for line in told[:2]] == ["update", "install"]
    assert told[1].split()[-1] == "make"


def test_setup_can_clone_a_repository_at_a_commit(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    options = ("--name=pod1", "--repo", str(cloud.project))
    assert "--repo needs --commit" in cloud.run("tpu.sh", "setup", *options, code=2).stderr
    cloud.run("tpu.sh", "setup", *options, "--commit", "HEAD")
    cloud.run("tpu.sh", "setup", "--name=pod1")  # the same again, which fetches
    assert "scp" not in verbs(cloud.calls)
    for worker in ("pod1-0", "pod1-1"):
        assert (cloud.folder / "workers" / worker / "vllama2_jax/.git").exists()


def test_a_commit_that_is_not_there_is_named_and_nothing_is_copied(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    (line,) = cloud.run("tpu.sh", "setup", "--name=pod1", "--commit=v9", code=1).stderr.splitlines()
    assert line.startswith("tpu.sh: there is no commit 'v9' in ")
    assert verbs(cloud.calls) == ["create"]


@pytest.fixture
def ready(cloud):
    """Two machines, set up."""
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    return cloud


def test_the_command_arrives_word_for_word_at_every_machine(ready):
    ready.run("tpu.sh", "run", "--name=pod1", "--", *HARD)
    ready.run("tpu.sh", "logs", "--name=pod1")
    ready.run("tpu.sh", "logs", "--name=pod1", "--worker=1")
    for worker in ("pod1-0", "pod1-1"):
        (told,) = ready.told(worker)
        assert told["argv"] == HARD[1:]
        assert told["folder"] == str(ready.folder / "workers" / worker / "vllama2_jax")
        assert told["environment"]["JAX_PLATFORMS"] == "tpu,cpu"


def test_a_run_goes_on_without_its_connection_and_logs_tell_how_it_ends(ready):
    ready.run_is("echo begun; until [ -e $FAKE_CLOUD/end ]; do sleep 0.05; done; echo no; exit 7")
    ready.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "train")  # comes back at once
    for pid in ready.runs():  # what ends a session does not end it
        assert os.getsid(pid) != os.getsid(0)
    assert "pod1 is ACTIVE" in ready.run("tpu.sh", "status", "--name=pod1").stderr
    assert ready.run("tpu.sh", "status", "--name=pod1").stdout.count(": running ") == 2
    # The same again may be the second try of a connection that was lost.
    again = ready.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "train")
    assert again.stdout.count(": running ") == 2 and len(ready.told("pod1-0")) == 1
    other = ready.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "eval", code=1)
    assert "a run is under way" in other.stderr
    replaced = ready.run("tpu.sh", "setup", "--name=pod1", code=1)
    assert "a run is under way" in replaced.stderr
    (ready.folder / "end").touch()
    log = ready.run("tpu.sh", "logs", "--name=pod1", code=7).stdout
    assert log.index("begun") < log.index("no") < log.index("ended with exit code 7")
    assert ready.run("tpu.sh", "status", "--name=pod1").stdout.count(": ended 7") == 2


def test_stop_sends_sigterm_to_the_command_alone_on_every_machine(ready):
    ready.run_is(
        "(trap 'touch $HOME/child' TERM; sleep 20 & wait) & "
        "trap 'echo saved; kill -9 $!; exit 143' TERM; echo begun; wait"
    )
    ready.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "train")
    for worker in ("pod1-0", "pod1-1"):
        log, deadline = ready.folder / f"workers/{worker}/vllama2_run/log", time.monotonic() + 20
        while "begun" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert ready.run("tpu.sh", "stop", "--name=pod1").stdout.count("told to stop") == 2
    log = ready.run("tpu.sh", "logs", "--name=pod1", code=128 + signal.SIGTERM).stdout
    assert "saved" in log
    assert not list(ready.folder.glob("workers/*/child"))


def test_train_does_it_all_and_says_last_what_ends_the_costs(cloud):
    cloud.change(on_create=["WAITING_FOR_RESOURCES", "ACTIVE"])
    command = ["vllama2", "train", "--out", "gs://b/run"]
    done = cloud.run("tpu.sh", "train", *SMALL, "--", *command)
    assert verbs(cloud.calls) == [
        "create", "describe", "describe", "describe", "scp", "ssh", "ssh", "ssh", "ssh"
    ]  # fmt: skip
    assert [told["argv"] for told in cloud.told("pod1-0")] == [command[1:]]
    assert "step 1\nstep 2\n" in done.stdout
    assert "tpu.sh delete --name pod1" in done.stderr.splitlines()[-1]
    assert cloud.state["nodes"] == {"pod1": "READY"}


@pytest.mark.parametrize("code", [0, 3])
def test_train_deletes_the_tpus_when_the_run_has_ended_if_told_so(cloud, code):
    cloud.run_is(f"echo the reason; exit {code}")
    done = cloud.run(
        *("tpu.sh", "train", *SMALL, "--delete-when-done", "--", "vllama2"),
        code=code,
    )
    assert done.stdout.count("the reason") == (
        1 if code == 0 else 3
    )  # of every machine, if it failed
    assert cloud.state["requests"] == cloud.state["nodes"] == {}


def test_a_folder_on_the_machines_is_warned_of(ready):
    for out in (["--out", "runs/a"], ["--out=runs/a"]):
        done = ready.run("tpu.sh", "run", "--print", "--name=pod1", "--", "vllama2", *out)
        assert "--out=runs/a lies on the machines and goes with them" in done.stderr
    done = ready.run(
        "tpu.sh", "run", "--print", "--name=pod1", "--", "vllama2", "--out", "gs://b/a"
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", *SMALL[2:]], "--name is missing"),
        (["create", *SMALL, "--name=Pod_1"], "--name Pod_1: small letters, digits and hyphens"),
        (["create", "--name=p", "--zone=z", "--topology=v4-8"], "--project is missing"),
        (
            ["create", "--name=p", "--project=p", "--topology=v4-8"],
            "--zone is missing, as in --zone us-",
        ),
        (["create", *POD], "--topology is missing, as in --topology v5p-128"),
        (["create", *SMALL, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        (["create", *SMALL, "--topology=2xv4-8", "--direct"], "--direct makes one slice"),
        (
            ["create", *SMALL, "--direct", "--ssh-with=--tunnel-through-iap"],
            "--ssh-with=--tunnel-through-iap needs a queued resource",
        ),
        (["create", *POD, "--topology=v5p-100"], "no slice v5p-100; there are v5p-8"),
        (["create", *POD, "--topology=v9-8"], "unknown topology 'v9-8'"),
        (["create", *SMALL, "--sport"], "unknown option '--sport'"),
        (["create", "--name"], "--name has no value"),
        (["create", *SMALL, "--every", "soon"], "--every soon: must be a whole number"),
        (["train", *SMALL], "no command, as in -- vllama2 train"),
        (["run", *SMALL], "no command, as in -- vllama2 train"),
        (["resume", *SMALL], "it is not known here what ran on pod1"),
        (["begin"], "unknown action 'begin'"),
        ([], "no action"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_sent(cloud, arguments, words):
    done = cloud.run("tpu.sh", *arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tpu.sh: {words}") and line.endswith("; --help lists what there is")
    assert cloud.calls == []


def test_a_missing_gcloud_is_named_with_the_remedy(cloud):
    for program in ("bash", "dirname"):
        (cloud.bin / program).symlink_to(shutil.which(program))
    (cloud.bin / "gcloud").unlink()
    done = cloud.run("tpu.sh", "create", *SMALL, code=1, PATH=str(cloud.bin))
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "tpu.sh: gcloud is not installed; https://cloud.google.com/sdk/docs/install"
    )


def without_repetition(calls):
    """Looks that are repeated while waiting, once."""
    return [call for k, call in enumerate(calls) if call not in calls[:k]]


@pytest.mark.parametrize("topology", ["v5p-16", "2xv5e-16"])
def test_what_print_shows_is_what_is_run(cloud, topology):
    cloud.change(on_create=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    options = (*POD, "--topology", topology, "--spot", "--delete-when-done")
    shown = cloud.printed("tpu.sh", "train", *options, "--", *HARD)
    assert not (cloud.folder / "remembered").exists()
    cloud.run("tpu.sh", "train", *options, "--", *HARD)
    assert [command[0] for command in shown if command[0] != "gcloud"] == [
        "mkdir", "git", "rm"
    ]  # fmt: skip
    assert [command[1:] for command in shown if command[0] == "gcloud"] == without_repetition(
        cloud.calls
    )


@pytest.mark.parametrize("action", ["wait", "setup", "run", "logs", "status", "stop", "delete"])
def test_each_action_prints_what_it_runs(ready, action):
    ready.run("tpu.sh", "run", "--name=pod1", "--", *HARD)
    ready.run("tpu.sh", "logs", "--name=pod1")
    before = len(ready.calls)
    options = ("--name=pod1", *(["--commit=HEAD"] if action == "setup" else []))
    shown = ready.printed("tpu.sh", action, *options)
    ready.run("tpu.sh", action, *options)
    assert [command[1:] for command in shown if command[0] == "gcloud"] == ready.calls[before:]


def test_printed_commands_can_be_pasted_into_a_shell(cloud):
    text = cloud.run("tpu.sh", "train", "--print", *SMALL, "--", *HARD).stdout
    subprocess.run(["bash", "-e"], input=text, env=cloud.environment(), text=True, check=True)
    assert [call[1:] for call in commands_of(text) if call[0] == "gcloud"] == cloud.calls
    assert [told["argv"] for told in cloud.told("pod1-1")] == [HARD[1:]]
    assert cloud.state["nodes"] == {"pod1": "READY"}
