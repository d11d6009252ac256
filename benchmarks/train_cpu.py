"""Seconds per training step of `tiny` on this CPU, stage by stage.

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
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console
from rich.table import Table

from vllama2_jax.data.toybox_tokenizer import train_tokenizer
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.initial import initial_params
from vllama2_jax.train.optimizer import make_optimizer
from vllama2_jax.train.recipes import RECIPES, make_task, new_heads
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.train.trainable import assign_rules, partition

_BATCHES = 4  # made before the clock starts


def seconds_per_step(recipe, stage, tokenizer, repeats):
    """Seconds of each of `repeats` steps, behind one that compiles."""
    params = initial_params(recipe.config, 0) | new_heads(recipe.config, stage.task, 0)
    assigned = assign_rules(stage.rules, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(stage.optimizer, assigned)
    loss, batches = make_task(recipe.config, stage, tokenizer, 0)
    batches = list(itertools.islice(batches, _BATCHES))
    step, state = make_step(loss, optimizer), init_state(trainable, optimizer)
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
    recipe = RECIPES["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder) / "tokenizer.model")
        tokenizer = load_tokenizer(folder)
        table = Table("stage", "rows", "median s", "min", "max", "rows / s", title="tiny, one step")
        for stage in recipe.stages:
            seconds = seconds_per_step(recipe, stage, tokenizer, options.repeats)
            median = statistics.median(seconds)
            figures = (f"{v:.3f}" for v in (median, min(seconds), max(seconds)))
            table.add_row(stage.task, str(stage.rows), *figures, f"{stage.rows / median:.0f}")
    console = Console()
    console.print(
        f"{len(os.sched_getaffinity(0))} threads; jax {jax.__version__}; "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
