"""`make demo`: ask the embedded model about videos and sounds that it has never met.

Renders a few held-out Toybox scenes to real `.mp4` and `.wav` files, asks `tiny` about each, shows
what it looked at and heard (frames in the terminal too, and pictures beside the files), and its
answers.
"""

import argparse
import sys
from pathlib import Path

from vllama2_jax.accelerators import leave_out_tpus_that_are_not_there

_FAMILIES = ("motion", "order", "count", "change", "beeps", "noise", "sync", "sounding")


def main(arguments=None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vllama2_jax.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder of files and pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=2026, help="other seeds show other scenes")
    options = parser.parse_args(arguments)
    leave_out_tpus_that_are_not_there()
    show(Path(options.out), options.seed)
    return 0


def show(folder: Path, seed: int) -> None:
    """Render, ask, and print; files go to `folder`."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from vllama2_jax.data.toybox.families import sample_scene
    from vllama2_jax.data.toybox.files import write_scene
    from vllama2_jax.data.toybox.questions import ask_about
    from vllama2_jax.loading import load

    console = Console()
    model = load("tiny")
    console.print(
        f"[bold]{model.config.name}[/bold] looks at {model.config.num_frames} frames of a video "
        f"and hears {model.card.sound.seconds:g} seconds of sound."
    )
    right = asked = 0
    for number, family in enumerate(_FAMILIES, start=1):
        rng = np.random.default_rng([seed, number])
        scene = sample_scene(rng, "heldout", family)
        file = folder / write_scene(folder, f"{number}-{scene.family}", scene, rng).source
        media = model.session(file).media
        console.print(f"\n[bold]{file}[/bold]  ({', '.join(_pictures(media, file))})")
        if console.is_terminal and media.clip is not None:
            from vllama2_jax.media.sheet import sketch

            print(sketch(media.clip, console.width))
        table = Table("question", "answer", "truth")
        for question in ask_about(scene, rng):
            answer = model.ask(file, question.text)
            same = answer == question.answer
            colour = "green" if same else "red"
            table.add_row(question.text, f"[{colour}]{answer}[/{colour}]", question.answer)
            right, asked = right + same, asked + 1
        console.print(table)
    console.print(f"\n{right} of {asked} right. Ask your own:")
    console.print(
        f'  .venv/bin/vllama2 ask {folder}/videos/1-motion.mp4 "What colour is the shape?"',
        soft_wrap=True,
    )


def _pictures(media, file: Path) -> list[str]:
    """Keep pictures of what was looked at and heard beside a file, and say where."""
    from vllama2_jax.media.sheet import contact_sheet, spectrum

    told = []
    if media.clip is not None:
        path = file.with_suffix(".frames.png")
        contact_sheet(media.clip).save(path)
        told.append(f"frames looked at: {path}")
    if media.sound is not None:
        path = file.with_suffix(".sound.png")
        spectrum(media.sound.bank).save(path)
        told.append(f"sound heard: {path}")
    return told


if __name__ == "__main__":
    sys.exit(main())
