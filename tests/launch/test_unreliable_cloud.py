"""launch/tpu.sh where the cloud does not do, or not at once, what it is told."""

import contextlib
import json
import os
import signal
import subprocess

import pytest

POD = ("--name", "pod1", "--project", "mine", "--zone", "us-east5-a", "--every", "0")
SMALL = (*POD, "--topology", "v5p-16")
TWO = (*POD, "--topology", "2xv5p-16")
COMMAND = ("--", "vllama2", "train", "--out", "gs://b/run")
UNAVAILABLE = "UNAVAILABLE: The service is currently unavailable."


def verbs(cloud):
    return [call[3] for call in cloud.calls]


def nothing_costs(cloud):
    return cloud.state["requests"] == cloud.state["nodes"] == {}


def when_it_runs(cloud, script, first=":", **change):
    """All machines do what a script says; the first changes the cloud before, and does more."""
    (cloud.folder / "changed.json").write_text(json.dumps(change))
    code = (
        "import json, sys; file = sys.argv[1] + '/cloud.json'; state = json.load(open(file)); "
        "state.update(json.load(open(sys.argv[1] + '/changed.json'))); "
        "json.dump(state, open(file, 'w'))"
    )
    once = "[ $FAKE_WORKER = pod1-0 ] && [ ! -e $FAKE_CLOUD/done ]"
    change = f'touch $FAKE_CLOUD/done; python3 -c "{code}" $FAKE_CLOUD'
    cloud.run_is(f"if {once}; then {change}; {first}; fi; {script}")


@pytest.mark.parametrize("action", ["setup", "run", "stop"])
def test_a_pod_that_nobody_reached_is_an_error_though_gcloud_ends_with_0(cloud, action):
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.change(nodes={"pod1": "PREEMPTED"})
    done = cloud.run("tpu.sh", action, "--name=pod1", *COMMAND, code=1)
    assert "Attempting to SSH into 0 nodes" in done.stderr
    assert "tpu.sh: only 0 of 2 machines of pod1 have answered; tpu.sh status" in done.stderr


def test_a_slice_that_was_left_out_is_an_error(cloud):
    cloud.run("tpu.sh", "create", *TWO)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.change(nodes={"pod1-0": "READY", "pod1-1": "STOPPED"})
    done = cloud.run("tpu.sh", "run", "--name=pod1", *COMMAND, code=1)
    assert "only 2 of 4 machines of pod1 have answered" in done.stderr
    cloud.change(nodes={"pod1-0": "READY", "pod1-1": "READY"})
    cloud.run("tpu.sh", "run", "--name=pod1", *COMMAND)


def test_a_slice_that_is_reached_late_is_started_with_the_others(cloud):
    cloud.run_is("until [ -e $FAKE_CLOUD/end ]; do sleep 0.05; done")
    cloud.run("tpu.sh", "create", *TWO)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.change(nodes={"pod1-0": "READY", "pod1-1": "STOPPED"})
    cloud.run("tpu.sh", "run", "--name=pod1", *COMMAND, code=1)
    cloud.change(nodes={"pod1-0": "READY", "pod1-1": "READY"})
    resumed = cloud.run("tpu.sh", "resume", "--name=pod1", code=1)
    assert "2 of 4 machines of pod1 say that they run it; if that stays so, tpu.sh stop" in (
        resumed.stderr
    )
    cloud.run("tpu.sh", "run", "--name=pod1", *COMMAND)
    (cloud.folder / "end").touch()
    cloud.run("tpu.sh", "logs", "--name=pod1")
    assert [len(cloud.told(f"pod1-{k}-{w}")) for k in (0, 1) for w in (0, 1)] == [1] * 4


def test_logs_of_a_machine_that_nobody_reached_are_no_success(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.change(nodes={"pod1": "PREEMPTED"})
    done = cloud.run("tpu.sh", "logs", "--name=pod1", code=1)
    assert "its machine did not answer" in done.stderr


def test_code_that_did_not_arrive_whole_leaves_what_is_there(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.program("tar", "#!/usr/bin/env bash\nexit 2\n")
    cloud.run("tpu.sh", "setup", "--name=pod1", code=1)
    assert (cloud.folder / "workers/pod1-1/vllama2_jax/launch/worker.sh").exists()
    assert (cloud.folder / "workers/pod1-1/vllama2_jax/.venv").exists()


def test_no_copy_of_the_code_stays_behind_here(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    assert list((cloud.folder / "remembered/.code").iterdir()) == []


def test_an_error_that_passes_does_not_end_a_wait_and_is_told_once(cloud):
    cloud.change(on_create=["WAITING_FOR_RESOURCES", "ACTIVE"])
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.change(fail={"describe": [None, UNAVAILABLE, UNAVAILABLE]})
    done = cloud.run("tpu.sh", "wait", "--name=pod1")
    assert done.stderr.count(UNAVAILABLE) == 1
    assert "pod1 is ACTIVE, its TPU READY" in done.stderr


def test_an_error_that_stays_ends_a_wait(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    cloud.change(fail={"describe": UNAVAILABLE})
    done = cloud.run("tpu.sh", "wait", "--name=pod1", code=1)
    assert done.stderr.count(UNAVAILABLE) == 1
    assert "this failed 10 times, at last with exit code 1: gcloud compute tpus" in done.stderr


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        ({"ssh": "Permission denied (publickey)."}, 1),
        ({"scp": "Permission denied (publickey)."}, 1),
        ({"describe": UNAVAILABLE}, 1),
        ({"describe": [UNAVAILABLE]}, 0),
        ({"delete": [UNAVAILABLE, UNAVAILABLE]}, 0),
    ],
)
def test_delete_when_done_deletes_whatever_fails(cloud, fail, code):
    cloud.change(fail=fail)
    cloud.run("tpu.sh", "train", *SMALL, "--delete-when-done", *COMMAND, code=code)
    assert nothing_costs(cloud)


@pytest.mark.parametrize(
    ("script", "lost", "code"),
    [
        ("exit 3", ["pod1-1"], 3),  # its report cannot be had
        ("exit 0", ["pod1-0"], 1),  # the first machine is silent
    ],
)
def test_delete_when_done_deletes_where_machines_do_not_answer(cloud, script, lost, code):
    when_it_runs(cloud, script, lost=lost)
    cloud.run("tpu.sh", "train", *SMALL, "--delete-when-done", *COMMAND, code=code)
    assert nothing_costs(cloud)


def test_a_deletion_that_does_not_work_is_said_and_is_a_failure(cloud):
    cloud.change(fail={"delete": UNAVAILABLE})
    done = cloud.run("tpu.sh", "train", *SMALL, "--delete-when-done", *COMMAND, code=1)
    assert verbs(cloud).count("delete") == 10
    *_, said, costs, command = done.stderr.splitlines()
    assert said == "tpu.sh: pod1 could not be deleted, though it was tried 10 times"
    assert "cost money until this" in costs and "tpu.sh delete --name pod1" in command


def test_after_a_failure_resume_makes_anew_what_was_deleted(cloud):
    cloud.change(fail={"ssh": ["Permission denied (publickey)."]})
    cloud.run("tpu.sh", "train", *SMALL, "--delete-when-done", *COMMAND, code=1)
    cloud.run("tpu.sh", "resume", "--name=pod1")
    cloud.run("tpu.sh", "logs", "--name=pod1")
    assert cloud.told("pod1-1")


def test_a_train_that_fails_says_that_resume_goes_on(cloud):
    cloud.change(fail={"ssh": ["Permission denied (publickey)."]})
    done = cloud.run("tpu.sh", "train", *SMALL, *COMMAND, code=1)
    assert "what is there goes on with: bash " in done.stderr
    assert "tpu.sh resume --name pod1\n" in done.stderr


def test_a_second_train_says_that_it_is_there_already_and_deletes_nothing(cloud):
    cloud.run("tpu.sh", "create", *SMALL)
    done = cloud.run("tpu.sh", "train", *SMALL, "--delete-when-done", *COMMAND, code=1)
    assert "tpu.sh: there is a pod1 already; tpu.sh resume goes on with it" in done.stderr
    assert cloud.state["nodes"] == {"pod1": "READY"}


@contextlib.contextmanager
def training(cloud, *options):
    """A `train` on two machines, while its run goes on there."""
    cloud.run_is(
        "echo begun; trap 'exit 143' TERM; until [ -e $FAKE_CLOUD/end ]; do sleep 0.05; done"
    )
    train = subprocess.Popen(
        ["bash", str(cloud.project / "launch/tpu.sh"), "train", *SMALL, *options, *COMMAND],
        env=cloud.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while train.stdout.readline() != "begun\n":
            assert train.poll() is None
        yield train
    finally:
        train.kill()
        (cloud.folder / "end").touch()


def interrupted(train, told) -> str:
    """What it says at last; who has closed a terminal in vain presses a key again.

    A shell that has just begun, and not yet set aside its parent's traps, loses a signal.
    """
    for _ in range(6):
        os.killpg(train.pid, told)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return train.communicate(timeout=10)[1]
    raise AssertionError("it goes on")


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--delete-when-done",)])
def test_an_interrupted_train_deletes_nothing_while_the_run_goes_on(cloud, told, options):
    with training(cloud, *options) as train:
        said = interrupted(train, told)
        assert "tpu.sh delete --name pod1" in said.splitlines()[-1]
    assert train.returncode == 128 + told and "delete" not in verbs(cloud)
    assert cloud.state["nodes"] == {"pod1": "READY"}


_SUSPENDED = {"pod1": {"states": [*["ACTIVE"] * 5, "SUSPENDED"], "nodes": ["pod1"]}}


@pytest.mark.parametrize("code", [1, 143])
def test_a_spot_run_that_ends_before_its_loss_is_known_goes_on(cloud, code):
    when_it_runs(cloud, "echo step 2", first=f"exit {code}", requests=_SUSPENDED)
    done = cloud.run("tpu.sh", "train", *SMALL, "--spot", "--restarts=1", *COMMAND)
    assert verbs(cloud).count("create") == 2 and "step 2" in done.stdout


def test_a_spot_run_that_fails_by_itself_is_believed_in_the_end(cloud):
    cloud.run_is("exit 3")
    done = cloud.run("tpu.sh", "train", *SMALL, "--spot", "--restarts=1", *COMMAND, code=3)
    assert "the run has ended 3; was its slice taken away? (10 looks)" in done.stderr
    assert verbs(cloud).count("create") == 1


def test_a_spot_run_that_was_told_to_stop_is_believed_at_once(cloud):
    with training(cloud, "--spot", "--restarts=1") as train:
        cloud.run("tpu.sh", "stop", "--name=pod1")
        log, said = train.communicate(timeout=30)
    assert train.returncode == 143 and "vllama2 on pod1-0: stopped 143" in log
    assert "was its slice taken away?" not in said and verbs(cloud).count("create") == 1
