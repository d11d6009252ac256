"""`make demo`: ask the embedded model about videos that it has never seen.

Renders a few held-out Toybox scenes to real `.mp4` files, asks `tiny` about each, shows the frames
that it looked at (in the terminal, and as pictures beside the videos), and its answers.
"""

import argparse
import sys
from pathlib import Path


def main(arguments=None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vllama2_jax.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder of videos and pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=2026, help="other seeds show other scenes")
    options = parser.parse_args(arguments)
    show(Path(options.out), options.seed)
    return 0


def show(folder: Path, seed: int) -> None:
    """Render, ask, and print; files go to `folder`."""
    from rich.console import Console
    from rich.table import Table

    from vllama2_jax.data.toybox import toybox_scenes, video_frames, write_video
    from vllama2_jax.data.toybox_scenes import FAMILIES
    from vllama2_jax.loading import load
    from vllama2_jax.media.sheet import contact_sheet, sketch

    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    model = load("tiny")
    console.print(
        f"[bold]{model.config.name}[/bold] looks at {model.config.num_frames} frames of each video."
    )
    right = asked = 0
    for number, (scene, questions) in enumerate(toybox_scenes("heldout", len(FAMILIES), seed)):
        video = folder / f"video-{number + 1}.mp4"
        write_video(video, video_frames(scene))
        session = model.session(video)
        picture = video.with_suffix(".png")
        contact_sheet(session.media.clip).save(picture)
        console.print(f"\n[bold]{video}[/bold]  (frames looked at: {picture})")
        if console.is_terminal:
            print(sketch(session.media.clip, console.width))
        table = Table("question", "answer", "truth")
        for question in questions:
            answer = model.ask(video, question.text)
            same = answer == question.answer
            colour = "green" if same else "red"
            table.add_row(question.text, f"[{colour}]{answer}[/{colour}]", question.answer)
            right, asked = right + same, asked + 1
        console.print(table)
    console.print(f"\n{right} of {asked} right. Ask your own:")
    console.print(f'  .venv/bin/vllama2 ask {folder}/video-1.mp4 "What colour is the shape?"')


if __name__ == "__main__":
    sys.exit(main())
