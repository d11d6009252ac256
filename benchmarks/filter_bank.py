"""The filter bank of 30 s of sound beside torchaudio's, on one core.

    python benchmarks/filter_bank.py [--repeats 30]

Both read the same samples in turn; what they give is compared first. torchaudio's one file is taken
from `.venv/oracle_files` (`make dev`).
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from audio_oracle import torchaudio_kaldi

from vllama2_jax.media.fbank import filter_bank

_SECONDS = 30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kaldi = torchaudio_kaldi()
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(_SECONDS * 16_000)
    table = Table(title=f"{_SECONDS} s of sound, one core, ms: least and median")
    for column in ("samples", "ours", "", "torchaudio", "", "ratio of medians", "differ by"):
        table.add_column(column, justify="right")
    for dtype in (np.float32, np.float64):
        samples = noise.astype(dtype)
        given = torch.from_numpy(samples)[None] * 2**15
        sides = {
            "ours": functools.partial(filter_bank, samples),
            "torchaudio": functools.partial(
                kaldi.fbank, given, num_mel_bins=128, sample_frequency=16000.0
            ),
        }
        found = {name: side() for name, side in sides.items()}
        worst = np.abs(found["ours"] - found["torchaudio"].numpy()).max()
        times = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                times[name].append(1e3 * (time.perf_counter() - begin))
        cells = [f"{f(times[name]):.1f}" for name in sides for f in (min, statistics.median)]
        ratio = statistics.median(times["torchaudio"]) / statistics.median(times["ours"])
        table.add_row(np.dtype(dtype).name, *cells, f"{ratio:.2f}", f"{worst:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
