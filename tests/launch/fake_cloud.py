"""A cloud on this machine: a fake gcloud and a few fake programs in front of the PATH."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

# What `make env` leaves behind on a machine; its `vllama2` is the one below.
_MAKE = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$HOME/made"
bin=$HOME/vllama2_jax/.venv/bin
mkdir -p "$bin" && cp "$FAKE_CLOUD/bin/.vllama2" "$bin/vllama2"
"""
# Writes down how it was called, then does what $FAKE_CLOUD/run.sh says.
_VLLAMA2 = """#!{python} -IS
import json, os, pathlib, subprocess, sys
told = dict(argv=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd())
with open(os.path.join(os.environ["HOME"], "told.jsonl"), "a") as file:
    file.write(json.dumps(told) + "\\n")
os.execvp("bash", ["bash", os.path.join(os.environ["FAKE_CLOUD"], "run.sh")])
"""


def small_project(folder: Path) -> Path:
    """A repository of its own: launch/ as it lies here, and little else to copy."""
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "Makefile").write_text("env:\n")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    commit(folder, "First")
    return folder


def commit(project: Path, message: str) -> None:
    """All that lies in a project."""
    git = ("git", "-C", str(project), "-c", "user.name=me", "-c", "user.email=me@mine")
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", f"--message={message}"], check=True)


class Cloud:
    """Where scripts of a project's launch/ run, and what became of it."""

    def __init__(self, folder: Path, project: Path):
        self.folder, self.bin, self.project = folder, folder / "bin", project
        self.bin.mkdir(parents=True)
        self.program("make", _MAKE)
        self.program(".vllama2", _VLLAMA2.format(python=sys.executable))
        self.program("sudo", '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$HOME/sudone"; cat >&2\n')
        self.program("hostname", '#!/usr/bin/env bash\necho "${FAKE_WORKER:-here}"\n')
        self.fake("gcloud", "fake_gcloud.py")
        self.run_is("echo step 1; echo step 2")
        self.change(workers={}, requests={}, nodes={}, on_create=["ACTIVE"], fail={}, lost=[])

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def fake(self, name, file):
        code = Path(__file__).with_name(file)
        self.program(name, f'#!/usr/bin/env bash\nexec {sys.executable} -IS {code} "$@"\n')

    def run_is(self, script):
        (self.folder / "run.sh").write_text(script)

    @property
    def state(self):
        return json.loads((self.folder / "cloud.json").read_text())

    def change(self, **fields):
        path = self.folder / "cloud.json"
        path.write_text(json.dumps((self.state if path.exists() else {}) | fields))

    def lines(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def calls(self):
        """Arguments of each call of gcloud (or xpk) so far."""
        return self.lines("calls.jsonl")

    def told(self, worker):
        """How `vllama2` was called on a machine, as "pod1-0"."""
        return self.lines(f"workers/{worker}/told.jsonl")

    def runs(self):
        """Processes of what was started on machines, also of those that are lost."""
        return [int(file.read_text()) for file in self.folder.glob("*/*/vllama2_run/pid")]

    def close(self):
        """End what a failed test has left running."""
        for pid in self.runs():
            with contextlib.suppress(OSError):
                # The number may be another's by now.
                if str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def environment(self, **more):
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSDK", "JAX", "XLA"))},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.folder),
            "VLLAMA2_LAUNCH_STATE": str(self.folder / "remembered"),
            "TMPDIR": str(self.folder),
            **more,
        }

    def run(self, script, *words, code=0, **environment):
        """Run a script of launch/; what it wrote."""
        done = subprocess.run(
            ["bash", str(self.project / "launch" / script), *words],
            env=self.environment(**environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def printed(self, script, *words):
        """The commands that --print shows, split as a shell does, and that nothing was run."""
        before = self.calls
        done = self.run(script, words[0], "--print", *words[1:])
        assert self.calls == before
        return commands_of(done.stdout)


def commands_of(text):
    """Commands of a text, each a list of words; a quoted word may hold line breaks."""
    commands, pending = [], ""
    for line in text.splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending)
        except ValueError:  # a quote is still open
            continue
        commands.append(words)
        pending = ""
    assert not pending
    return commands
