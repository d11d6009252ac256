"""The files of launch/ by themselves: scripts, and what the container is made of."""

import configparser
import fnmatch
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import LAUNCH, ROOT


def scripts():
    found = [*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(found) >= 8
    return sorted(map(str, found))


def test_scripts_are_shellcheck_clean():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; make dev")
    for script in scripts():  # one by one, as they are run
        done = subprocess.run([program, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", scripts(), ids=lambda script: Path(script).name)
def test_bash_reads_every_script(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def told_to_docker(word):
    """Arguments of each such instruction of the Dockerfile."""
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split()[1:] for line in text.splitlines() if line.startswith(f"{word} ")]


def test_the_container_copies_what_is_there_and_is_sent():
    kept = [
        line[1:]
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = {source for words in told_to_docker("COPY") for source in words[:-1]}
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source.split("/")[0], name) for name in kept), source
    assert {source.split("/")[0] for source in copied} == set(kept)


def test_the_container_runs_as_a_user_unless_told_and_under_its_flags():
    assert told_to_docker("USER") == [["${RUN_AS}"]] and ["RUN_AS=vllama2"] in told_to_docker("ARG")
    (entry,), (command,) = told_to_docker("ENTRYPOINT"), told_to_docker("CMD")
    assert entry == ['["bash",', '"/opt/vllama2/launch/with_flags.sh"]']
    assert command[0] == '["gpu",'


@pytest.mark.parametrize("extras", ["cuda12,gcs", "cuda13", "tpu,gcs", ""])
def test_the_first_layer_installs_what_the_package_asks_for(extras):
    command = [sys.executable, "launch/requirements.py", extras]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = set()
    for line in importlib.metadata.requires("vllama2_jax"):
        name, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r'extra == [\'"](.*?)[\'"]', marker)
        if extra is None or extra[1] in extras.split(","):
            wanted.add(name)
    assert set(map(normal, done.stdout.split())) == set(map(normal, wanted))


def normal(requirement):
    """A requirement, however its parts are ordered."""
    name = re.match(r"[\w.-]+(\[.*\])?", requirement)[0]
    return name.replace("_", "-").lower(), frozenset(requirement[len(name) :].split(","))


def test_an_extra_that_is_not_there_is_named():
    command = [sys.executable, "launch/requirements.py", "cuda11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("setup.cfg has no extra 'cuda11'; known: tpu, cuda12, cuda13")


def test_extras_that_the_files_name_exist():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = "".join(p.read_text() for p in LAUNCH.rglob("*") if p.is_file() and p.suffix != ".py")
    named = set(re.findall(r"(?:EXTRAS=|extras\]:=|extras\]=\"?)([a-z0-9]+(?:,[a-z0-9]+)*)", text))
    assert {"cuda12,gcs", "cuda13,gcs", "tpu,gcs"} <= named
    for extras in named:
        assert set(extras.split(",")) <= set(config["options.extras_require"])
