"""docs/train_your_own.md keeps its word: its own commands, and a run killed twice on the way."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vllama2_jax.data.toybox.files import toybox_scenes, video_frames, write_video
from vllama2_jax.train.metrics import read_metrics

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "train_your_own.md"
# Steps behind which the run is killed; at 40 a save begins, for which that of 20 must be whole.
KILLS = (8, 42)


def blocks(kind):
    """The fenced blocks of a kind, in the guide's order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """What the guide tells to type, split as a shell does."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def option(command, name):
    return command[command.index(name) + 1]


@pytest.fixture
def desk(request, tmp_path):
    """A folder as the guide's reader has it: clips.json, and beside it the clips that it names."""
    (text,) = blocks("json")
    (tmp_path / "clips.json").write_text(text)
    paths = {record.get("video") or record.get("image") for record in json.loads(text)} - {None}
    clips = tmp_path / "clips"
    clips.mkdir()
    try:
        real = request.getfixturevalue("real_media")
    except pytest.skip.Exception:  # a clone comes without them: rendered ones take their names
        for path, (scene, _) in zip(sorted(paths), toybox_scenes("train", 30, 5), strict=False):
            frames = video_frames(scene)
            if path.endswith(".jpg"):
                Image.fromarray(frames[0]).save(clips / path)
            else:
                write_video(clips / path, frames, fps=3)  # 8 s
    else:
        for path in paths:
            shutil.copyfile(real / path, clips / path)
    return tmp_path


@pytest.fixture
def start(desk):
    """Begins a command of the guide, `vllama2 ...`, at the desk."""
    environment = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **os.environ,
        # Programs are compiled once for all processes.
        "JAX_COMPILATION_CACHE_DIR": str(desk / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "200",
    }

    def start(command):
        assert command[0] == "vllama2"
        return subprocess.Popen(
            [sys.executable, "-m", "vllama2_jax.cli", *command[1:]],
            cwd=desk,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def kill_behind(process, run, step):
    """SIGKILL, once so many steps are logged."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 480
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(process):
    """What a command printed, when it ended well."""
    said, complained = process.communicate(timeout=480)
    assert process.returncode == 0, complained
    return said, complained


def taught(desk, command):
    """The answer that clips.json has for what a command asks."""
    path, question = command[2].removeprefix("clips/"), command[3]
    for record in json.loads((desk / "clips.json").read_text()):
        asked, answer = (sentence["value"] for sentence in record["conversations"])
        if path in record.values() and asked.endswith(question):
            return answer
    raise AssertionError(f"{shlex.join(command)} asks what clips.json does not teach")


def test_the_guide_leads_from_clips_to_a_model_through_two_kills(desk, start):
    done, answers = [], {}
    for command in commands():
        action = command[1]
        if action == "train" and "--dry-run" not in command:
            run, steps = desk / option(command, "--out"), int(option(command, "--steps"))
            for step in KILLS:
                kill_behind(start(command), run, step)
            _, complained = finish(start(command))
            assert re.search(rf"going on behind step \d+ of {steps}", complained)
            assert [record["step"] for record in read_metrics(run)] == [*range(1, steps + 1)]
            assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
        else:
            said, _ = finish(start(command))
            if action == "ask":
                answers[option(command, "--model")] = said.strip(), taught(desk, command)
            if "--dry-run" in command:
                assert "model FLOPs" in said and not (desk / "runs").exists()
        done.append(action)
    assert done == ["data", "train", "train", "ask", "convert", "ask", "convert", "ask"]
    assert len(answers) == 3, "the run and both exports are asked"
    assert all(answer == wanted for answer, wanted in answers.values()), answers
