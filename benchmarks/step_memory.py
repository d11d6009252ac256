"""Memory of one training step: chunked cross entropy or whole logits, decoder frozen or trained.

    python benchmarks/step_memory.py [--rows 4] [--length 2048] [--chunk 256]

The network is narrow, but its vocabulary is Qwen2's, so that the logits stand out. Every step is
compiled for this CPU and asked for its size (`memory_analysis`); none is run, nothing is allocated.
"""

import argparse
import dataclasses
import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train.loss import LossConfig, batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, partition

VOCAB, WIDTH = 152_064, 128
STAGES = {
    "connector": (Rule("connector/.*", "train"), Rule(".*", "freeze")),
    "connector, decoder": (Rule("vision/.*", "freeze"), Rule(".*", "train")),
}


def narrow_config():
    """The tower of `tiny` in front of a narrow Qwen2 with its whole vocabulary."""
    tiny = ZOO["tiny"]
    decoder = DecoderConfig(
        family="qwen2",
        vocab_size=VOCAB,
        width=WIDTH,
        mlp_dim=4 * WIDTH,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
    )
    connector = dataclasses.replace(tiny.connector, out_dim=WIDTH)
    return dataclasses.replace(tiny, connector=connector, decoder=decoder)


def abstract_batch(config, rows, length):
    """Shapes of rows with one clip each."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    size, frames = config.vision.image_size, config.num_frames
    return Batch(
        tokens=array(length),
        positions=array(length),
        segment_ids=array(length),
        media_index=array(length),
        frames=array(frames, size, size, 3, dtype=jnp.uint8),
        clip_frames=array(1, frames),
        clip_mask=array(1, dtype=jnp.bool_),
        targets=array(length),
        target_weights=array(length, dtype=jnp.float32),
    )


def compiled_step(config, rules, batch, chunk):
    """The step of `make_step`, compiled: bfloat16 compute, float32 masters, layers recomputed."""
    assigned = assign_rules(rules, abstract_params(config))
    trainable, frozen = partition(abstract_params(config), assigned)
    frozen = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in frozen.items()}
    optimizer = make_optimizer(OptimizerConfig(2e-5), 100, assigned)
    model = VLlama2(config, dtype=jnp.bfloat16, remat="full")
    loss = functools.partial(batch_loss, model, config=LossConfig(chunk=chunk))
    step = make_step(loss, optimizer, compute_dtype=jnp.bfloat16)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    return step.lower(state, frozen, batch).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk)
    options = parser.parse_args()
    config = narrow_config()
    batch = abstract_batch(config, options.rows, options.length)
    table = Table(
        *("what trains", "cross entropy", "temporary MiB", "state, weights MiB"),
        title=f"one step, {options.rows} rows of {options.length:,} slots",
    )
    for name, rules in STAGES.items():
        for chunk in (None, options.chunk):
            memory = compiled_step(config, rules, batch, chunk).memory_analysis()
            sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
            how = f"{chunk} slots a time" if chunk else "whole logits"
            table.add_row(name, how, *(f"{size / 2**20:,.0f}" for size in sizes))
    console = Console()
    logits = 4 * options.rows * options.length * VOCAB / 2**20
    console.print(
        f"jax {jax.__version__} on CPU; vocabulary {VOCAB:,}, width {WIDTH}; "
        f"float32 logits would take {logits:,.0f} MiB"
    )
    console.print(table)


if __name__ == "__main__":
    main()
