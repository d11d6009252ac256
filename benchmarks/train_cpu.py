"""Seconds per training step of `tiny` on this CPU: its lessons, and its five recipes.

    python benchmarks/train_cpu.py [--repeats 12]
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train_cpu.py

The second line takes memory in huge pages, as `vllama2 train` and every target of the Makefile do.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console
from rich.table import Table

from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.configs import build, parse
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.feeding import make_feeding
from vllama2_jax.train.optimizer import make_optimizer
from vllama2_jax.train.run_step import make_run_step
from vllama2_jax.train.schooling import HEARING, SEEING, begin_lesson, make_task
from vllama2_jax.train.start import prepare
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.weights import TINY, read

_BATCHES = 4  # made before the clock starts
_RECIPES = (
    "tiny_video_pretrain",
    "tiny_video_sft",
    "tiny_audio_pretrain",
    "tiny_audio_sft",
    "tiny_av_joint",
)


def lesson(lesson, params, card, tokenizer, folder):
    """(step, state, frozen, batches) of a lesson."""
    state, frozen, optimizer = begin_lesson(lesson, params, card.config, 0)
    loss, batches = make_task(lesson, card, tokenizer, 0, folder)
    return make_step(loss, optimizer), state, frozen, batches


def recipe(config, params, card, tokenizer, folder):
    """(step, state, frozen, batches) of a recipe."""
    dtype = float_dtype(config.dtype)
    prepared = prepare(dict(params), config.start, config.rules, dtype, config.seed)
    optimizer = make_optimizer(config.optimizer, 1000, prepared.assigned)
    feeding = make_feeding(
        config.data,
        card,
        tokenizer,
        rows=config.rows,
        seed=0,
        index_folder=folder,
        steps=_BATCHES,
    )
    step = make_run_step(config, card.config, feeding.datasets, optimizer)
    state = init_state(prepared.trainable, optimizer)
    return step, state, prepared.frozen, feeding.batches(0)


def seconds_per_step(step, state, frozen, batches, repeats):
    """Seconds of each of `repeats` steps, behind one that compiles."""
    batches = list(itertools.islice(batches, _BATCHES))
    state = jax.device_put(state, jax.devices()[0])  # as results are, or the second step compiles
    state, _ = step(state, frozen, batches[0])
    seconds = []
    for batch, _ in zip(itertools.cycle(batches), range(repeats), strict=False):
        begin = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    params, card, folder = read(TINY, "float32", scan_layers=True)
    tokenizer = load_tokenizer(folder)
    table = Table("stage", "rows", "median s", "min", "max", "rows / s", title="tiny, one step")
    configs = [build(parse([f"config:{name}"])) for name in _RECIPES]
    stages = [(part.part, lesson, part) for part in (*SEEING, *HEARING)]
    stages += [(config.name, recipe, config) for config in configs]
    with tempfile.TemporaryDirectory() as index:
        for name, make, stage in stages:
            made = make(stage, params, card, tokenizer, index)
            seconds = seconds_per_step(*made, options.repeats)
            median = statistics.median(seconds)
            figures = (f"{v:.3f}" for v in (median, min(seconds), max(seconds)))
            table.add_row(name, str(stage.rows), *figures, f"{stage.rows / median:.0f}")
    console = Console()
    console.print(
        f"{len(os.sched_getaffinity(0))} threads; jax {jax.__version__}; "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
