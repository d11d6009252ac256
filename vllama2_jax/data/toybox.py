"""Toybox: short synthetic videos with questions, to learn and measure video understanding on.

`write_toybox` makes a folder of real H.264 `.mp4` files with LLaVA-style conversation JSON; what is
in them lies in `toybox_scenes.py`, what is asked in `toybox_questions.py`. Everything is a function
of the seed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from vllama2_jax.data.records import Media, Record, write_records
from vllama2_jax.data.toybox_questions import Question, ask_about
from vllama2_jax.data.toybox_scenes import (
    FAMILIES,
    HOLD,
    SPLITS,
    Scene,
    render,
    sample_scene,
    strata,
)

FPS = 12
SIZE = 128  # pixels along a side of the written videos
PLACEHOLDER = "<video>\n"


def video_frames(scene: Scene, size: int = SIZE) -> np.ndarray:
    """All frames of a scene's video: uint8 [MOMENTS * HOLD, size, size, 3]."""
    return np.repeat(render(scene, size), HOLD, axis=0)


def write_video(path: str | Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Encode uint8 [T, H, W, 3] (even H and W) as H.264 in `.mp4`, near-lossless."""
    with av.open(str(path), "w") as container:
        # One thread, so that the file is a function of the frames alone.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def toybox_scenes(split: str, clips: int, seed: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes of a split with their questions, answers as balanced as `clips` allows.

    The families take turns; within a family, answers come in rounds of all of them.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for i in range(clips):
        family, turn = FAMILIES[i % len(FAMILIES)], i // len(FAMILIES)
        scene = sample_scene(rng, split, family, turn)
        # One more after each round, lest a pair always meets the same form of question.
        yield scene, ask_about(scene, rng, turn + turn // strata(family, split))


def golden_clip() -> tuple[np.ndarray, str, str]:
    """One held-out clip of a moving thing: (uint8 [MOMENTS, SIZE, SIZE, 3], question, answer)."""
    rng = np.random.default_rng(7)
    scene = sample_scene(rng, "heldout", "motion")
    question = next(q for q in ask_about(scene, rng) if q.kind == "direction")
    return render(scene, SIZE), question.text, question.answer


def write_toybox(
    folder: str | Path,
    clips: int,
    seed: int = 0,
    heldout: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write a Toybox: `train.json`, `heldout.json` and the videos, with `folder` as media root.

    A clip of a moving thing has three records (colour, shape, direction), any other clip one
    (order, count or change); a quarter of the clips each are about motion, order, count, change.

    Args:
      folder: where to; must not exist or be empty.
      clips: number of training clips.
      seed: the same seed writes the same files.
      heldout: number of held-out clips; None makes a quarter of `clips`, at least 4.
      progress: called with (clips done, all clips).

    Returns:
      Number of records per split.

    Raises:
      ValueError: for fewer than 4 clips, or a folder that holds something.
    """
    folder = Path(folder)
    if clips < len(FAMILIES):
        raise ValueError(f"{clips} clips are too few; Toybox needs at least {len(FAMILIES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder or empty it")
    heldout = max(clips // 4, len(FAMILIES)) if heldout is None else heldout
    counts = dict(zip(SPLITS, (clips, heldout), strict=True))
    done, total, written = 0, clips + heldout, {}
    for split, count in counts.items():
        (folder / "videos" / split).mkdir(parents=True)
        records = []
        for i, (scene, questions) in enumerate(toybox_scenes(split, count, seed)):
            name = f"{split}-{i:05d}"
            video = f"videos/{split}/{i:05d}.mp4"
            write_video(folder / video, video_frames(scene))
            for question in questions:
                turn = (PLACEHOLDER + question.text, question.answer)
                media = Media("video", video)
                records.append(Record(f"{name}-{question.kind}", (turn,), media, question.kind))
            done += 1
            if progress:
                progress(done, total)
        write_records(folder / f"{split}.json", records)
        written[split] = len(records)
    return written
