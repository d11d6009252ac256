"""launch/tpu.sh brings back what was taken away, and starts the very same command on it."""

import json

import pytest
from fake_cloud import Cloud, commit, small_project

SPOT = (
    *("--name", "pod1", "--project", "mine", "--zone", "us-east5-a", "--every", "0"),
    *("--topology", "v5p-16", "--spot", "--create-with=--network=mine"),
)
COMMAND = ["vllama2", "train", "it's mine", "--out", "gs://b/run"]


def verbs(calls):
    return [call[3] for call in calls]


def take_away(cloud, states, node=None):
    """The cloud takes a spot slice: its machines are lost, with all that was on them."""
    state = cloud.state
    state["requests"]["pod1"]["states"] = states
    if node is None:
        state["nodes"] = {}
    else:
        state["nodes"]["pod1"] = node
    cloud.change(**state)


@pytest.fixture
def ran(cloud):
    """A spot slice on which a run has ended."""
    cloud.run("tpu.sh", "train", *SPOT, "--", *COMMAND)
    return cloud


@pytest.mark.parametrize(
    ("states", "node"),
    [
        (["SUSPENDED"], None),
        (["SUSPENDING", "SUSPENDING", "SUSPENDED"], None),
        (["FAILED\tinternal error"], None),
        (["ACTIVE"], "PREEMPTED"),
        (["ACTIVE"], "TERMINATED"),
    ],
)
def test_resume_makes_anew_what_is_gone_and_starts_the_same_command(ran, states, node):
    before = ran.calls
    take_away(ran, states, node)
    ran.run("tpu.sh", "resume", "--name=pod1")
    since = ran.calls[len(before) :]
    made = [call for call in since if call[3] == "create"]
    assert made == [call for call in before if call[3] == "create"]
    assert verbs(since)[-6:] == ["create", "describe", "describe", "scp", "ssh", "ssh"]
    assert since[-3:] == before[3:6]  # the same code, set up and started in the same words
    assert verbs(since).index("delete") < verbs(since).index("create")
    ran.run("tpu.sh", "logs", "--name=pod1")
    for worker in ("pod1-0", "pod1-1"):
        assert [told["argv"] for told in ran.told(worker)] == [COMMAND[1:]]


def test_resume_sets_up_the_commit_that_the_run_began_with_and_setup_the_newest(tmp_path):
    cloud = Cloud(tmp_path / "cloud", small_project(tmp_path / "mine"))
    cloud.run("tpu.sh", "train", *SPOT, "--", *COMMAND)
    (cloud.project / "launch/new.sh").touch()
    assert "are not committed stay here" in cloud.run("tpu.sh", "setup", "--name=pod1").stderr
    commit(cloud.project, "Second")
    take_away(cloud, ["SUSPENDED"])
    cloud.run("tpu.sh", "resume", "--name=pod1")
    home = cloud.folder / "workers/pod1-1/vllama2_jax"
    assert (home / "launch/worker.sh").exists() and not (home / "launch/new.sh").exists()
    cloud.run("tpu.sh", "logs", "--name=pod1")
    cloud.run("tpu.sh", "setup", "--name=pod1")
    assert (home / "launch/new.sh").exists()


def test_resume_also_brings_back_what_was_deleted_by_hand(ran):
    ran.change(requests={}, nodes={})
    ran.run("tpu.sh", "resume", "--name=pod1")
    assert "delete" not in verbs(ran.calls)
    assert ran.state["nodes"] == {"pod1": "READY"}


def test_resume_starts_again_a_run_that_died_on_machines_that_are_still_there(ran):
    before = len(ran.calls)
    ran.run("tpu.sh", "resume", "--name=pod1")
    assert not {"create", "delete"} & set(verbs(ran.calls[before:]))
    ran.run("tpu.sh", "logs", "--name=pod1")
    assert [told["argv"] for told in ran.told("pod1-0")] == [COMMAND[1:]] * 2


def test_resume_leaves_a_run_alone_that_is_under_way(cloud):
    cloud.run_is("until [ -e $FAKE_CLOUD/end ]; do sleep 0.05; done")
    cloud.run("tpu.sh", "create", *SPOT)
    cloud.run("tpu.sh", "setup", "--name=pod1")
    cloud.run("tpu.sh", "run", "--name=pod1", "--", *COMMAND)
    done = cloud.run("tpu.sh", "resume", "--name=pod1")
    assert "its run is under way" in done.stderr
    (cloud.folder / "end").touch()
    cloud.run("tpu.sh", "logs", "--name=pod1")
    assert len(cloud.told("pod1-0")) == 1


def test_resume_prints_the_way_back_from_a_pre_emption(ran):
    before = ran.calls
    shown = ran.printed("tpu.sh", "resume", "--name=pod1")
    sent = [command[1:] for command in shown if command[0] == "gcloud"]
    assert verbs(sent) == [
        "describe", "describe", "delete", "create", "describe", "describe", "scp", "ssh", "ssh"
    ]  # fmt: skip
    assert sent[3] == before[0] and sent[-3:] == before[3:6]


# The first time, the run on the first machine ends behind one step, since the slice is taken away.
_TAKEN_ONCE = """
echo step 1
if [ $FAKE_WORKER = pod1-0 ] && [ ! -e $FAKE_CLOUD/taken ]; then
  touch $FAKE_CLOUD/taken
  cp $FAKE_CLOUD/suspended.json $FAKE_CLOUD/cloud.json
  exit 1
fi
echo step 2
"""


@pytest.fixture
def to_be_taken(cloud):
    cloud.run_is(_TAKEN_ONCE)
    request = {"pod1": {"states": ["SUSPENDED"], "nodes": ["pod1"]}}
    (cloud.folder / "suspended.json").write_text(json.dumps(cloud.state | {"requests": request}))
    return cloud


def test_train_goes_on_by_itself_after_pre_emption_as_often_as_it_is_told(to_be_taken):
    done = to_be_taken.run(*("tpu.sh", "train", *SPOT, "--restarts=1", "--", *COMMAND))
    assert "step 2\n" in done.stdout
    assert verbs(to_be_taken.calls).count("create") == 2
    assert [told["argv"] for told in to_be_taken.told("pod1-1")] == [COMMAND[1:]]


def test_train_without_restarts_says_how_to_go_on(to_be_taken):
    done = to_be_taken.run("tpu.sh", "train", *SPOT, "--", *COMMAND, code=1)
    assert "pod1 is SUSPENDED; this makes it anew, and the run goes on:" in done.stderr
    assert "tpu.sh resume --name pod1\n" in done.stderr
    assert "tpu.sh delete --name pod1" in done.stderr.splitlines()[-1]
    done = to_be_taken.run("tpu.sh", "resume", "--name=pod1")
    assert "step 2\n" in to_be_taken.run("tpu.sh", "logs", "--name=pod1").stdout
