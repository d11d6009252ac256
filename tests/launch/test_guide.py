"""docs/launch.md keeps its word: each of its commands is run against a cloud on this machine."""

import re
import shlex
import subprocess

import pytest
from fake_cloud import LAUNCH, ROOT, commands_of

from vllama2_jax.cli.main import _parser
from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve

GUIDE = ROOT / "docs" / "launch.md"


# Slices of fewer machines, each of which is a folder here.
SMALLER = {"v5p-128": "v5p-32", "2xv5e-256": "2xv5e-16"}


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def trained(words):
    """The `vllama2 ...` that is meant for other machines, or for this one."""
    starts = [k for k, word in enumerate(words[:-1]) if word == "vllama2" and words[k + 1] != "gpu"]
    return words[starts[0] :] if starts else []


@pytest.fixture
def told(cloud):
    """With programs that only write down what they are told."""
    for name in ("xpk", "docker", "kubectl"):
        text = f'#!/usr/bin/env bash\nprintf "{name} %s\\n" "$*" >>"$FAKE_CLOUD/others"\n'
        cloud.program(name, text)
    return cloud


def test_the_guide_shows_every_action_and_script():
    shown = {(words[1], words[2]) for words in commands() if words[0] == "bash"}
    for script in ("tpu.sh", "gke_xpk.sh"):
        help_text = subprocess.run(
            ["bash", str(LAUNCH / script), "--help"], capture_output=True, text=True, check=True
        ).stdout
        actions = re.findall(r"^  ([a-z][a-z-]*)  ", help_text, re.MULTILINE)
        assert len(actions) >= 7
        assert not {(f"launch/{script}", action) for action in actions} - shown
    assert {words[0] for words in commands()} == {"bash", "vllama2", "docker", "sbatch"}


def test_commands_of_the_guide_are_ones_that_vllama2_takes():
    found = [words for words in map(trained, commands()) if words]
    assert len(found) >= 6
    for words in found:
        options = _parser().parse_args(words[1:])
        assert options.command in ("train", "plan", "doctor")
        if getattr(options, "config", None):
            build(resolve(options.config, Shortcuts()))


def test_what_the_guide_says_is_what_its_cloud_is_told(told):
    """In the page's order; each is printed first, and the same is sent then."""
    done = []
    for words in commands():
        if words[:2] in (["bash", "launch/tpu.sh"], ["bash", "launch/gke_xpk.sh"]):
            script, action = words[1].removeprefix("launch/"), words[2]
            rest = [SMALLER.get(word, word) for word in words[3:]]
            if "--repo" in rest:  # it is cloned from here
                rest = ["--name", "pod2", "--repo", str(told.project), "--commit", "HEAD"]
            before = len(told.calls)
            shown = told.printed(script, action, *rest)
            told.run(script, action, *rest)
            sent = told.calls[before:]
            gcloud = [command[1:] for command in shown if command[0] == "gcloud"]
            if action != "resume":  # which prints what may be needed, and does what is
                assert gcloud == [call for k, call in enumerate(sent) if call not in sent[:k]]
            done.append(action)
        elif words[0] == "bash":
            shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            assert commands_of(shown.stdout)[0][0] == "srun"
    assert done.count("delete") == 4 and "train" in done
    assert told.state["requests"] == told.state["nodes"] == {}
    others = (told.folder / "others").read_text().split("\n")
    assert [line.split()[0] for line in others if line] == [
        *("xpk", "docker", "docker", "xpk", "kubectl", "xpk", "xpk", "xpk")
    ]


def test_a_readme_example_of_launching_is_one_that_prints(cloud):
    (line,) = re.findall(
        r"^    (bash launch/tpu\.sh train .*)$", (ROOT / "README.md").read_text(), re.M
    )
    words = shlex.split(line)
    shown = cloud.printed("tpu.sh", *words[2:])
    assert shown[0][:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
