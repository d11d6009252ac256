"""`vllama2 doctor`: is this machine fit, and does `tiny` still answer as it did when shipped?"""

import importlib.metadata
import platform
import sys

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
    import jax

    table.add_row(
        "devices", ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
    )
    question, wanted, got = golden_answer()
    same = got == wanted
    table.add_row("golden answer", f"{question} -> {got}" + ("" if same else f" (not {wanted})"))
    Console(file=sys.stdout).print(table)
    if not same:
        print(
            "tiny answers otherwise than when it was shipped: the installation is damaged, or this "
            "device computes differently",
            file=sys.stderr,
        )
    return 0 if healthy and same else 1


def golden_answer() -> tuple[str, str, str]:
    """(question, the true answer, what `tiny` says) for one clip rendered in memory."""
    from vllama2_jax.data.toybox import SIZE, toybox_scenes
    from vllama2_jax.data.toybox_scenes import render
    from vllama2_jax.loading import load

    scene, questions = next(toybox_scenes("heldout", clips=1, seed=0))
    question = questions[0]
    answer = load("tiny").ask(render(scene, SIZE), question.text)
    return question.text, question.answer, answer
