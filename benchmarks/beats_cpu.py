"""BEATs on 30 s of sound beside PyTorch, and its positional convolution by itself, on CPU.

    python benchmarks/beats_cpu.py [--repeats 5]

The published sizes with random weights, float32, the same number of threads. The sides take turns;
a ratio is PyTorch's median over ours, above 1 where we are faster. PyTorch's network is
speechbrain's (`make dev`).
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import audio_oracle
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from rich.console import Console
from rich.table import Table

from vllama2_jax.checkpoints.store import unflatten
from vllama2_jax.convert.tables import audio_rows
from vllama2_jax.models.beats import Beats
from vllama2_jax.models.long_convolution import overlap_save
from vllama2_jax.models.zoo import BEATS_ITER3


def parameters(config, tensors):
    """Released tensors as the network's parameters."""
    stacks = {}
    for row in audio_rows(config, "", "audio"):
        stacks.setdefault(row.target, {})[row.index] = row
    shapes = jax.eval_shape(
        Beats(config).init, jax.random.key(0), jnp.zeros((1, config.num_frames, 128))
    )
    shapes = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: x, shapes["params"]))
    shapes = {"/".join(k.key for k in path[:-1]): leaf.shape for path, leaf in shapes}
    params = {}
    for target, rows in stacks.items():
        whole = np.empty(shapes[target.removeprefix("audio/")], np.float32)
        for index, row in rows.items():
            whole[index] = row.to_parameter(tensors[row.source], whole[index].shape)
        params[target] = jnp.asarray(whole)
    return unflatten(params)["audio"]


def measure(sides, repeats):
    """Medians in ms of functions that take turns."""
    times = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if number:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def encoder(repeats, table):
    config = BEATS_ITER3
    network = audio_oracle.speechbrain_beats(config, std=0.03)
    params = parameters(config, audio_oracle.released_names(network))
    bank = np.random.default_rng(0).normal(size=(1, config.num_frames, 128)).astype(np.float32)
    forward = jax.jit(lambda params, bank: Beats(config).apply({"params": params}, bank))

    def theirs():
        with torch.no_grad():
            return audio_oracle.run_beats(network, bank).numpy()

    with jax.default_matmul_precision("highest"):
        difference = np.abs(forward(params, bank) - theirs()).max()
        sides = {
            "ours": lambda: jax.block_until_ready(forward(params, bank)),
            "torch": theirs,
        }
        found = measure(sides, repeats)
    ratio = found["torch"] / found["ours"]
    cells = f"{found['ours']:.0f}", f"{found['torch']:.0f}", f"{ratio:.2f}", f"{difference:.1e}"
    table.add_row("BEATs, 1,496 tokens, forward", *cells)


def convolution(repeats, table):
    width, window, groups, length = 768, 128, 16, 1496
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, length, width)).astype(np.float32)
    kernel = 0.05 * rng.normal(size=(window, width // groups, width)).astype(np.float32)

    def xla(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            [(64, 63)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    def pieces(x, kernel):
        return overlap_save(jnp.pad(x, ((0, 0), (64, 63), (0, 0))), kernel, groups)

    given = torch.from_numpy(x.transpose(0, 2, 1).copy()).requires_grad_()
    weight = torch.from_numpy(kernel.transpose(2, 1, 0).copy()).requires_grad_()

    def torch_forward():
        return torch.nn.functional.conv1d(given, weight, padding=64, groups=groups)[..., :-1]

    def torch_both():
        given.grad = weight.grad = None
        (torch_forward() ** 2).sum().backward()

    for name, both in (("forward", False), ("forward and backward", True)):
        for label, ours in (("overlap-save", pieces), ("XLA's own", xla)):
            function = ours
            if both:
                function = jax.grad(lambda x, k, f=ours: (f(x, k) ** 2).sum(), (0, 1))
            compiled = functools.partial(jax.jit(function), x, kernel)
            found = measure(
                {
                    "ours": lambda run=compiled: jax.block_until_ready(run()),
                    "torch": torch_both if both else torch_forward,
                },
                repeats,
            )
            ratio = found["torch"] / found["ours"]
            cells = f"{found['ours']:.0f}", f"{found['torch']:.0f}", f"{ratio:.2f}", ""
            table.add_row(f"positional convolution, {label}, {name}", *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    table = Table(title="ms, medians")
    for column in ("", "ours", "PyTorch", "PyTorch / ours", "differ by"):
        table.add_column(column, justify="right")
    encoder(options.repeats, table)
    convolution(options.repeats, table)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
