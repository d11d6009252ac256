"""The data pipeline beside a plain loop that does the same decode and the same transform.

    python benchmarks/pipeline.py [--repeats 7] [--steps 12] [--folder DIR]

Clips of 640x360, H.264, 10 s at 30 frames per second with x264's own key frame interval are
rendered here; of each, 8 frames are decoded and resized for CLIP. The plain loop does that and
nothing else, clip after clip, in this process; in two processes it shows what a second one can give
on this machine. The pipeline also parses, tokenizes, packs and hands over whole batches, and
decodes in guarded processes. Decoders have one FFmpeg thread everywhere. The sides take turns in
one run, each with workers of its own that end with the turn; ratios are medians over the turns.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from vllama2_jax.data.assemble import Assembler, ClipReader
from vllama2_jax.data.cache_frames import cache_frames
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.frame_cache import CachedClipReader
from vllama2_jax.data.index import build_index
from vllama2_jax.data.mixture import Mixture
from vllama2_jax.data.pipeline import Feed
from vllama2_jax.data.schedule import Schedule
from vllama2_jax.data.sources import open_source
from vllama2_jax.media import CLIP_336, Limits, prepare
from vllama2_jax.media.sampling import midpoint
from vllama2_jax.media.video import VideoFile
from vllama2_jax.text import load_tokenizer

WIDTH, HEIGHT, SECONDS, RATE, CLIPS = 640, 360, 10, 30, 4
NUM_FRAMES, MEDIA_TOKENS, TEXT_TOKENS, ROWS = 8, 676, 348, 4
LIMITS = Limits(max_threads=1)


def render(path: Path, seed: int, sound: bool = False):
    """Write one clip: a moving texture with film grain; in stereo at 44.1 kHz, if with sound."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    texture = np.stack([96 + 60 * np.sin(x / s) * np.cos(y / (s + 7)) for s in (23, 41, 67)], -1)
    texture = (texture + rng.normal(0, 12, texture.shape)).clip(8, 240).astype(np.uint8)
    grain = rng.integers(0, 8, (8, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track = container.add_stream("aac", rate=44_100, layout="stereo") if sound else None
        for number in range(SECONDS * RATE):
            picture = np.roll(texture, number, axis=1) + grain[rng.integers(8)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            samples = rng.normal(0, 0.1, (2, SECONDS * 44_100)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44_100, 0
            container.mux(track.encode(frame))
            container.mux(track.encode())


def write_records(folder: Path, sound: bool = False) -> Path:
    """Render the clips and write their records."""
    records = []
    for number in range(CLIPS):
        name = f"{number}{'-sound' if sound else ''}.mp4"
        if not (folder / name).exists():
            render(folder / name, number, sound)
        question = {"from": "human", "value": "<video>\nWhat happens in the video?"}
        answer = {"from": "gpt", "value": "A pattern of many colours moves to the right. " * 4}
        records.append({"id": name, "video": name, "conversations": [question, answer]})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def plain_clip(path: str) -> np.ndarray:
    """One clip by the plain loop: uint8 [NUM_FRAMES, 336, 336, 3]."""
    found, file = {}, VideoFile(path, LIMITS)
    try:
        wanted = file.read(
            lambda total: midpoint(total, NUM_FRAMES),
            lambda number, pixels, _: found.update(
                {number: prepare(pixels, CLIP_336, square_pad=False)}
            ),
        )
    finally:
        file.close()
    return np.stack([found[number] for number in wanted.tolist()])


def plain_shape(path: str) -> tuple[int, ...]:
    """The same where frames need not travel back to who asked."""
    return plain_clip(path).shape


class PlainLoop:
    """Clip after clip, in this process or shared by a pool's."""

    def __init__(self, paths: list[str], pool=None):
        self._paths = itertools.cycle(paths)
        self._pool = pool

    def seconds(self, steps: int) -> float:
        """Time of so many batches."""
        paths = list(itertools.islice(self._paths, steps * ROWS))
        begin = time.perf_counter()
        if self._pool is None:
            for path in paths:
                plain_shape(path)
        else:
            self._pool.map(plain_shape, paths, chunksize=1)
        return time.perf_counter() - begin


class Pipeline:
    """Batches of a feed."""

    def __init__(
        self,
        source,
        read_clip,
        workers: int,
        *,
        num_frames: int = NUM_FRAMES,
        size: int = CLIP_336.size,
        media_tokens: int = MEDIA_TOKENS,
        hearing=None,
        sound_tokens: int = 0,
    ):
        tokenizer = load_tokenizer(resources.files("vllama2_jax") / "assets/tiny/tokenizer")
        self._length = TEXT_TOKENS + media_tokens + sound_tokens
        self._format = RecordFormat(
            tokenizer,
            "chatml",
            "sft",
            media_tokens,
            max_tokens=TEXT_TOKENS,
            max_length=self._length,
            sound_tokens=sound_tokens,
        )
        self._source, self._read_clip, self._workers = source, read_clip, workers
        self._clips, self._hearing = (num_frames, size, 1), hearing
        self._index = build_index(source, self._format)

    def feed(self, steps: int) -> Feed:
        """Of so many batches."""
        schedule = Schedule(
            Mixture.by_weights((len(self._source),), (1,), 0),
            [self._format.slots(self._index.text_tokens, self._index.clips, self._index.sounds)],
            [self._index.clips],
            [self._index.sounds],
            rows=ROWS,
            max_length=self._length,
            max_clips=1,
            max_sounds=1 if self._hearing else 0,
            packing=False,
            buckets=(self._length,),
            num_steps=steps,
        )
        readers = (self._read_clip,)
        maker = Assembler(
            (self._source,), self._format, readers, *self._clips, hearing=self._hearing
        )
        return Feed(schedule, maker, workers=self._workers)

    def seconds(self, steps: int) -> float:
        """Time of so many batches, once all workers are at work and nothing lies ready."""
        first = 2 * max(self._workers, 1)
        # More than are taken, so that no worker is done before the clock stops.
        with contextlib.closing(self.feed(first + steps + 8 * first).batches()) as batches:
            for _ in itertools.islice(batches, first):
                pass
            begin = time.perf_counter()
            for _ in itertools.islice(batches, steps):
                pass
            return time.perf_counter() - begin


def check_equal(pipeline: Pipeline, folder: Path):
    """The pipeline's frames are the plain loop's."""
    for batch in pipeline.feed(1).batches():
        for (name,), frames in zip(batch.records, batch.arrays["frames"], strict=True):
            if batch.faults or not np.array_equal(frames, plain_clip(str(folder / name))):
                raise SystemExit(f"the pipeline gives other frames of {name}")


def measure(folder: Path, repeats: int, steps: int) -> dict[str, list[float]]:
    """Clips per second of each side's turns."""
    source = open_source(write_records(folder))
    reader = ClipReader(CLIP_336, NUM_FRAMES, root=str(folder), limits=LIMITS)
    kept = folder / "kept"
    if not kept.exists():
        cache_frames(source, reader, kept)
    cached = CachedClipReader(kept, source, reader)
    paths = [str(folder / f"{number}.mp4") for number in range(CLIPS)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sides = {"plain loop": PlainLoop(paths), "plain loop, 2 processes": PlainLoop(paths, pool)}
        for name, read in (("pipeline", reader), ("cached frames", cached)):
            for workers in (0, 1, 2):
                sides[f"{name}, {workers} workers"] = Pipeline(source, read, workers)
            check_equal(sides[f"{name}, 0 workers"], folder)
        rates = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                # Long enough to be measured, although frames that are kept come quickly.
                batches = steps * (10 if name.startswith("cached") else 1)
                rates[name].append(batches * ROWS / side.seconds(batches))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help=f"batches of {ROWS} clips in a turn")
    parser.add_argument("--folder", type=Path, help="keep the rendered clips here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rates = measure(folder, options.repeats, options.steps)
    names = ("side", "clips / s", "min", "max", "frames / s", "of the plain loop", "of 1 worker")
    table = Table(*names, title=title())
    for name, turns in rates.items():
        middle = statistics.median(turns)
        one = f"{name.rsplit(', ', 1)[0]}, 1 workers"
        table.add_row(
            name,
            *(f"{rate:.1f}" for rate in (middle, min(turns), max(turns))),
            f"{middle * NUM_FRAMES:.0f}",
            ratio(turns, rates["plain loop"]),
            ratio(turns, rates[one]) if one in rates else "",
        )
    Console(width=120).print(table)


def ratio(turns: list[float], base: list[float]) -> str:
    """How much faster than `base`, turn by turn."""
    return f"{statistics.median(t / b for t, b in zip(turns, base, strict=True)):.2f}"


def title(num_frames: int = NUM_FRAMES, tower: str = "CLIP") -> str:
    return (
        f"{num_frames} frames of {WIDTH}x{HEIGHT} H.264, {SECONDS} s at {RATE} fps, resized for "
        f"{tower}; batches of {ROWS} ({len(os.sched_getaffinity(0))} cores)"
    )


if __name__ == "__main__":
    main()
