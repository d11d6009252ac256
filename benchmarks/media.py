"""16 sampled frames of a 60 s clip: ours beside plain PyAV and decord, frames compared bit for bit.

    python benchmarks/media.py [--repeats 7] [--folder DIR]     (the extra `bench` brings decord)

The clips are rendered here: textured background, moving shapes, film grain; H.264 at 30 frames per
second, with x264's own key frame interval (250) and with a dense one (30). Every side opens the
file, decodes the same 16 frames and resizes them for CLIP; ours does so in its guarded decoder
process, already running. The sides take turns in one run; a ratio is a side's median over ours. CPU
is the least processor time of all threads, our decoder process included: on a busy machine it tells
more than the clock.
"""

import argparse
import os
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from vllama2_jax.media import CLIP_336, Limits, load_clip, prepare
from vllama2_jax.media.guard import DECODER
from vllama2_jax.media.sampling import midpoint
from vllama2_jax.media.video import VideoFile

SECONDS, RATE, NUM_FRAMES = 60, 30, 16
CLIPS = (("640x360", 250), ("640x360", 30), ("1280x720", 250))


def render(path: Path, width: int, height: int, key_interval: int):
    """Write one clip."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    background = np.stack([96 + 60 * np.sin(x / s) * np.cos(y / (s + 7)) for s in (23, 41, 67)], -1)
    background += rng.normal(0, 12, background.shape)  # texture that stays
    grain = [rng.normal(0, 3, (height, width, 1)).astype(np.float32) for _ in range(8)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"g": str(key_interval), "crf": "23"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for number in range(SECONDS * RATE):
            frame = np.roll(background, number // 2, axis=1) + grain[rng.integers(8)]
            for shape in range(4):
                phase = number / (20 + 9 * shape) + shape
                left = int((0.5 + 0.4 * np.sin(phase)) * (width - width // 6))
                top = int((0.5 + 0.4 * np.cos(phase * 0.7)) * (height - height // 5))
                frame[top : top + height // 5, left : left + width // 6, shape % 3] += 70
            image = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def plain_frames(path: Path) -> list[np.ndarray]:
    """The frames by a plain decode from the start, full size."""
    with av.open(str(path)) as container:
        wanted = set(midpoint(container.streams.video[0].frames, NUM_FRAMES).tolist())
        found, last = [], max(wanted)
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if number == last:
                return found
    return found


def our_frames(path: Path) -> list[np.ndarray]:
    """The frames by our reader, full size, without the guard."""
    file, found = VideoFile(str(path), Limits()), []
    try:
        file.read(
            lambda total: midpoint(total, NUM_FRAMES), lambda _, image, __: found.append(image)
        )
    finally:
        file.close()
    return found


def decord_frames(path: Path, num_threads: int) -> np.ndarray:
    """The frames by decord, full size."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=num_threads)
    return reader.get_batch(midpoint(len(reader), NUM_FRAMES).tolist()).asnumpy()


def resized(frames) -> np.ndarray:
    """Full-size frames as CLIP gets them."""
    return np.stack([prepare(frame, CLIP_336, square_pad=False) for frame in frames])


def guarded(path: Path) -> np.ndarray:
    """What users call."""
    return load_clip(path, spec=CLIP_336, num_frames=NUM_FRAMES).frames


def sides() -> dict:
    """Name -> function from a path to the resized frames."""
    found = {
        "ours, guarded": guarded,
        "ours, in this process": lambda path: resized(our_frames(path)),
        "PyAV, from the start": lambda path: resized(plain_frames(path)),
    }
    try:
        import decord  # noqa: F401
    except ImportError:
        return found
    found["decord"] = lambda path: resized(decord_frames(path, 0))
    found["decord, 1 thread"] = lambda path: resized(decord_frames(path, 1))
    return found


def check_equal(path: Path):
    """All sides give the same full-size pixels, and ours the same through the guard."""
    truth = plain_frames(path)
    others = {"ours": our_frames(path)}
    if "decord" in sides():
        others["decord"] = decord_frames(path, 0)
    for name, frames in others.items():
        if not np.array_equal(np.stack(truth), np.stack(frames)):
            raise SystemExit(f"{name} gives other frames of {path}")
    if not np.array_equal(resized(truth), guarded(path)):
        raise SystemExit(f"the guard gives other frames of {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the rendered clips here")
    options = parser.parse_args()
    table = Table("clip", "side", "min ms", "median ms", "max ms", "ratio", "CPU ms", title=title())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size, key_interval in CLIPS:
            path = folder / f"{size}-key{key_interval}.mp4"
            if not path.exists():
                render(path, *map(int, size.split("x")), key_interval)
            check_equal(path)
            times = {name: [] for name in sides()}
            cpu = {name: [] for name in sides()}
            for _ in range(options.repeats):
                for name, side in sides().items():
                    start, cpu_start = time.perf_counter(), cpu_seconds()
                    side(path)
                    times[name].append(1e3 * (time.perf_counter() - start))
                    cpu[name].append(1e3 * (cpu_seconds() - cpu_start))
            ours = statistics.median(times["ours, guarded"])
            for name, values in times.items():
                middle = statistics.median(values)
                table.add_row(
                    f"{size}, key frame every {key_interval}",
                    name,
                    *(f"{value:.0f}" for value in (min(values), middle, max(values))),
                    f"{middle / ours:.2f}",
                    f"{min(cpu[name]):.0f}",
                )
            table.add_section()
    Console(width=110).print(table)


def cpu_seconds() -> float:
    """Processor time of this process and of the decoder process."""
    stat = Path(f"/proc/{DECODER.pid}/stat")
    if not stat.exists():
        return time.process_time()
    user, system = stat.read_text().rsplit(")", 1)[1].split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def title() -> str:
    return (
        f"{NUM_FRAMES} frames of {SECONDS} s at {RATE} fps, opened, decoded, resized for CLIP "
        f"({os.cpu_count()} cores)"
    )


if __name__ == "__main__":
    main()
