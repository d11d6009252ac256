"""`vllama2 data ingest`: its options, and the environment of tensorflow-io that does the work.

tensorflow-io loads only beside an old TensorFlow and NumPy 1 (docs/tfio.md), so the work is done by
another Python, which runs `tfio_ingest.py`. This module is read by both and needs neither.
"""

import argparse
import dataclasses
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-tfio"

# The other Python finds this package behind its own packages, and nothing else of ours: `-I` keeps
# it from our PYTHONPATH, whose NumPy is not its NumPy.
_START = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from vllama2_jax.data.tfio_ingest import main; sys.exit(main(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Names of an Example's features; "" is for one that is not to be read.

    None of them must be in every Example: it may hold any media or none, as long as its words go
    with them.
    """

    video: str = "video"
    image: str = "image"
    audio: str = "audio"
    rate: str = "rate"
    conversations: str = "conversations"
    caption: str = "caption"
    question: str = "question"
    id: str = "id"


_HELP = {
    "video": "bytes of a video file; several values are its frames, an image file each",
    "image": "bytes of an image file",
    "audio": "bytes of a sound file, or one channel's samples as floats in [-1, 1]",
    "rate": "hertz of an audio of samples",
    "conversations": "LLaVA's list of sentences as JSON; goes before captions",
    "caption": "what is answered; several values make as many records",
    "question": "what is asked, one for each caption",
    "id": "text or a whole number",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of one ingest.

    Attributes:
      source: TFRecord files: one, a glob or a folder, local or of a bucket.
      folder: where the pack goes.
      keys: {field of `Keys`: name} of what was typed; the others have their usual names.
      rate: hertz of samples in Examples that do not say it.
      first_channel: take a sound's first channel, not the mean of all.
      prompt: what is asked where a caption has no question.
      dataset: where the records say that they are from.
      max_bad: how many Examples may be left out because they cannot be used.
      debug: show the traceback of an error.
    """

    source: str
    folder: str
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    rate: int | None = None
    first_channel: bool = False
    prompt: str = ""
    dataset: str = ""
    max_bad: int = 0
    debug: bool = False


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add what `run_job` takes."""
    parser.add_argument(
        "source", metavar="TFRECORDS", help="a file, a glob or a folder; may be gs://"
    )
    parser.add_argument("folder", metavar="DST", help="a new directory")
    group = parser.add_argument_group("features", 'names of an Example\'s features; "" reads none')
    for field in dataclasses.fields(Keys):
        words = f"{_HELP[field.name]} ({field.default})"
        group.add_argument(f"--{field.name}-key", metavar="NAME", help=words)
    parser.add_argument("--rate", type=int, metavar="HZ", help="of samples that do not say it")
    parser.add_argument(
        "--first-channel",
        action="store_true",
        help="take a sound's first channel, as the original does with files, not the mean of all",
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="what is asked where a caption has no question"
    )
    parser.add_argument("--dataset", default="", metavar="NAME", help="what the records are from")
    parser.add_argument(
        "--max-bad", type=int, default=0, metavar="N", help="leave out up to N bad Examples (0)"
    )
    parser.add_argument("--python", help="an environment's Python (that of `make tfio`)")


def run_job(options: argparse.Namespace) -> int:
    """Run one ingest in the environment of tensorflow-io.

    Args:
      options: of `add_job_options`, and `debug`.

    Returns:
      The command's exit code: 1 if something was left out, 2 if the process has said an error.

    Raises:
      ValueError: if there is no such environment, or its process was killed.
    """
    python = _python(options.python)
    typed = {
        field.name: getattr(options, f"{field.name}_key") for field in dataclasses.fields(Keys)
    }
    shared = [f.name for f in dataclasses.fields(Job) if f.name != "keys"]
    job = Job(
        keys={name: value for name, value in typed.items() if value is not None},
        **{name: getattr(options, name) for name in shared},
    )
    command = [python, "-I", "-c", _START, str(ROOT), json.dumps(dataclasses.asdict(job))]
    code = subprocess.run(command).returncode
    if code < 0:
        raise ValueError(f"{python}: was killed by signal {-code}; is there too little memory?")
    return code


def _python(given: str | None) -> str:
    path = given or str(ENVIRONMENT / "bin" / "python")
    if not os.access(path, os.X_OK) or os.path.isdir(path):
        raise ValueError(
            f"{path}: no such Python; `make tfio` makes the environment of tensorflow-io, and "
            "--python names another"
        )
    return path
