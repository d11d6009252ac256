"""Toybox: short synthetic videos and sounds with questions, to learn and measure understanding on.

`write_toybox` makes a folder of real H.264 `.mp4` files, with AAC sound where there is some, and
`.wav` files, with LLaVA-style conversation JSON; what is in them stands in `scenes.py`, what is
asked in `questions.py`. Everything is a function of the seed.
"""

import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from vllama2_jax.data.records import Media, Record, write_records
from vllama2_jax.data.toybox.drawing import render
from vllama2_jax.data.toybox.families import FAMILIES, MEDIA_OF, sample_scene, strata
from vllama2_jax.data.toybox.questions import Question, ask_about
from vllama2_jax.data.toybox.scenes import FPS, HOLD, SPLITS, Scene
from vllama2_jax.data.toybox.synthesis import SAMPLE_RATE, synthesise

SIZE = 128  # pixels along a side of the written videos
_FOLDERS = {"video": "videos", "av": "videos", "audio": "sounds"}
_AUDIO_BITS = 64_000  # a second
_SCENES, _SOUNDS = 1, 2  # what a generator is for, so that no two are the same


def video_frames(scene: Scene, size: int = SIZE) -> np.ndarray:
    """All frames of a scene's video: uint8 [MOMENTS * HOLD, size, size, 3]."""
    return np.repeat(render(scene, size), HOLD, axis=0)


def write_video(
    path: str | Path, frames: np.ndarray, fps: int = FPS, samples: np.ndarray | None = None
) -> None:
    """Encode uint8 [T, H, W, 3] (even H and W) as H.264 in `.mp4`, near-lossless.

    Args:
      path: to write to.
      frames: the pictures.
      fps: of them in a second.
      samples: of the sound, float32 [n] at `SAMPLE_RATE`, encoded as AAC; None is no sound track.
    """
    with av.open(str(path), "w") as container:
        # One thread, so that the file is a function of its arguments alone.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        track = None
        if samples is not None:
            track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            track.bit_rate = _AUDIO_BITS
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts = SAMPLE_RATE, 0
            container.mux(track.encode(sound))
            container.mux(track.encode())


def write_sound(path: str | Path, samples: np.ndarray) -> None:
    """Write float32 [n] at `SAMPLE_RATE` as a `.wav` of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


def write_scene(folder: Path, name: str, scene: Scene, rng: np.random.Generator) -> Media:
    """Write a scene's file under `folder`; `rng` decides the noise in its sound."""
    media = MEDIA_OF[scene.family]
    samples = None if media == "video" else synthesise(scene.events, rng)
    path = f"{_FOLDERS[media]}/{name}.{'wav' if media == 'audio' else 'mp4'}"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if media == "audio":
        write_sound(folder / path, samples)
    else:
        write_video(folder / path, video_frames(scene), samples=samples)
    return Media(media, path)


def toybox_scenes(
    split: str, clips: int, seed: int, families: Sequence[str] = FAMILIES
) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes of a split with their questions, answers as balanced as `clips` allows.

    The families take turns; within a family, answers come in rounds of all of them.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), _SCENES])
    for i in range(clips):
        family, turn = families[i % len(families)], i // len(families)
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
    families: Sequence[str] = FAMILIES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write a Toybox: `train.json`, `heldout.json` and the media, with `folder` as media root.

    A clip of a moving thing has three records (colour, shape, direction), any other clip one; the
    families take turns.

    Args:
      folder: where to; must not exist or be empty.
      clips: number of training clips: videos, sounds, and videos with sound.
      seed: the same seed writes the same files.
      heldout: number of held-out clips; None makes a quarter of `clips`, at least one per family.
      families: of `families.FAMILIES`, what the clips are about.
      progress: called with (clips done, all clips).

    Returns:
      Number of records per split.

    Raises:
      ValueError: for fewer clips than families, or a folder that holds something.
    """
    folder = Path(folder)
    if clips < len(families):
        raise ValueError(f"{clips} clips are too few; Toybox needs at least {len(families)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder or empty it")
    heldout = max(clips // 4, len(families)) if heldout is None else heldout
    counts = dict(zip(SPLITS, (clips, heldout), strict=True))
    done, total, written = 0, clips + heldout, {}
    for number, (split, count) in enumerate(counts.items()):
        records = []
        for i, (scene, questions) in enumerate(toybox_scenes(split, count, seed, families)):
            rng = np.random.default_rng([seed, number, _SOUNDS, i])
            media = write_scene(folder, f"{split}/{i:05d}", scene, rng)
            for question in questions:
                turn = (f"{media.placeholder}\n{question.text}", question.answer)
                name = f"{split}-{i:05d}-{question.kind}"
                records.append(Record(name, (turn,), media, question.kind))
            done += 1
            if progress:
                progress(done, total)
        write_records(folder / f"{split}.json", records)
        written[split] = len(records)
    return written
