"""What hearing costs the data pipeline: videos with their sound beside the same videos alone.

    python benchmarks/sound_pipeline.py [--repeats 7] [--steps 12] [--folder DIR]

The clips of `pipeline.py`, with a stereo AAC track at 44.1 kHz, read as joint training of
VideoLLaMA2.1-7B-AV reads them: 16 frames for SigLIP, and with sound eight pieces of two seconds for
BEATs as well (preset "reference"). How it is measured is as in `pipeline.py`.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from pipeline import LIMITS, ROWS, Pipeline, ratio, title, write_records
from rich.console import Console
from rich.table import Table

from vllama2_jax.data.assemble import ClipReader, Hearing, SoundReader
from vllama2_jax.data.sources import open_source
from vllama2_jax.media import SIGLIP_384, SoundSpec
from vllama2_jax.models.zoo import model_config

MODEL = model_config("2.1-7B-AV")
WORKERS = (0, 1, 2)


def measure(folder: Path, repeats: int, steps: int) -> dict[str, list[float]]:
    """Clips per second of each side's turns."""
    alone = write_records(folder, sound=True)
    records = [record | {"audio": True} for record in json.loads(alone.read_text())]
    both = folder / "both.json"
    both.write_text(json.dumps(records))
    read = ClipReader(SIGLIP_384, MODEL.num_frames, root=str(folder), limits=LIMITS)
    listen = SoundReader(SoundSpec(MODEL.audio.seconds), root=str(folder), limits=LIMITS)
    hearing = Hearing((listen,), MODEL.audio.num_frames, max_sounds=1)
    clips = {
        "num_frames": MODEL.num_frames,
        "size": SIGLIP_384.size,
        "media_tokens": MODEL.num_media_tokens(),
    }
    sound = {"hearing": hearing, "sound_tokens": MODEL.num_sound_tokens}
    sides = {}
    for workers in WORKERS:
        named = f"{workers} workers"
        sides[f"alone, {named}"] = Pipeline(open_source(alone), read, workers, **clips)
        sides[f"with sound, {named}"] = Pipeline(open_source(both), read, workers, **clips, **sound)
    check_heard(sides["with sound, 0 workers"])
    rates = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(steps * ROWS / side.seconds(steps))
    return rates


def check_heard(pipeline: Pipeline):
    """Every row of a batch has its sound, and it is no silence."""
    (batch,) = pipeline.feed(1).batches()
    if batch.faults or not (np.ptp(batch.arrays["audio"], axis=(-1, -2)) > 0).all():
        raise SystemExit(f"the pipeline hears nothing: {batch.faults}")


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
    table = Table(
        "side",
        "clips / s",
        "min",
        "max",
        "of the video alone",
        title=title(MODEL.num_frames, "SigLIP"),
    )
    for name, turns in rates.items():
        base = rates[name.replace("with sound", "alone")]
        cells = (statistics.median(turns), min(turns), max(turns))
        table.add_row(name, *(f"{rate:.1f}" for rate in cells), ratio(turns, base))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
