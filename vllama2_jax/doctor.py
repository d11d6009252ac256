"""`vllama2 doctor`: is this machine fit, and does `tiny` still answer as it did when shipped?"""

import importlib.metadata
import platform
import sys
import tempfile
from pathlib import Path

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "av")


def report() -> int:
    """Print versions, devices and a known answer; returns 0 if all is well, else 1."""
    from rich.console import Console
    from rich.table import Table

    from vllama2_jax.version import __version__

    table = Table("what", "found", show_header=False)
    table.add_row("vllama2_jax", __version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    healthy = True
    for package in _PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "missing: run `make env`")
            healthy = False
    same = False
    if healthy:
        import jax

        devices = ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
        table.add_row("devices", devices)
        question, wanted, got = golden_answer()
        same = got == wanted
        verdict = "" if same else f" (not {wanted})"
        table.add_row("golden answer", f"{question} -> {got}{verdict}")
    Console(file=sys.stdout).print(table)
    if healthy and not same:
        print(
            "tiny answers otherwise than when it was shipped: the installation is damaged, or this "
            "device computes differently",
            file=sys.stderr,
        )
    return 0 if healthy and same else 1


def golden_answer() -> tuple[str, str, str]:
    """(question, what the shipped `tiny` says, what it says here) of one held-out video.

    The video is encoded and read again, so that the decoder's process is part of the check.
    """
    from vllama2_jax.data.toybox.files import golden_clip, write_video
    from vllama2_jax.loading import load

    frames, question, answer = golden_clip()
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "golden.mp4"
        write_video(video, frames)
        return question, answer, load("tiny").ask(video, question)
