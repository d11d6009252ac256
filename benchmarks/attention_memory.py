"""What attention costs a chip: compiled for TPU v5p without one, nothing is timed.

    JAX_PLATFORMS=cpu python benchmarks/attention_memory.py

Needs `pip install 'jax[tpu]'`. Memory is `memory_analysis()` of the program for four chips, per
chip. Attention has the heads of Mistral-7B in bfloat16; towers are whole, with full remat.
"""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vllama2_jax.models.attention import attend
from vllama2_jax.models.axes import Layout, using
from vllama2_jax.models.vit import VisionTower
from vllama2_jax.models.zoo import CLIP_L_336, MISTRAL_7B, SIGLIP_SO400M_384
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES
from vllama2_jax.parallel.topology import devices, topology

_MIB = 2**20


@functools.cache
def layout(**sizes):
    """The `fsdp+tensor` layout on four chips."""
    shape = np.reshape(devices(topology("v5p:2x2x1")), [sizes.get(axis, 1) for axis in MESH_AXES])
    return Layout(jax.sharding.Mesh(shape, MESH_AXES), LAYOUTS["fsdp+tensor"])


def compiled(function, layout, *arguments):
    """`function` of arrays [shape, dtype, names] under a layout."""
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(names))
        for shape, dtype, names in arguments
    ]

    def program(*args):
        with using(layout):
            return function(*args)

    return jax.jit(program).lower(*arrays).compile()


def temporaries(program):
    """MiB per chip, beside arguments and results."""
    return f"{program.memory_analysis().temp_size_in_bytes / _MIB:,.0f}"


def decoder(table, rows, length, backend, backward, **mesh):
    config = MISTRAL_7B
    token, head = ("batch", "length"), ("batch", "length", "heads", None)

    def forward(q, k, v, positions, segments):
        return attend(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            q_segments=segments,
            kv_segments=segments,
            aligned=True,
            backend=backend,
        )

    def loss(*args):
        return forward(*args).astype(jnp.float32).sum()

    program = compiled(
        jax.grad(loss, argnums=(0, 1, 2)) if backward else forward,
        layout(**mesh),
        ((rows, length, config.num_heads, config.head_dim), jnp.bfloat16, head),
        *[((rows, length, config.num_kv_heads, config.head_dim), jnp.bfloat16, head)] * 2,
        *[((rows, length), jnp.int32, token)] * 2,
    )
    where = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    passes = "forward and backward" if backward else "forward"
    table.add_row(where, f"{length:,}", f"{rows}", backend, passes, temporaries(program))


def tower(table, name, config, backend, backward, images=16):
    network = VisionTower(config, jnp.bfloat16, jnp.bfloat16, "full", backend)
    where = layout(fsdp=4)
    shape = (4 * images, config.image_size, config.image_size, 3)
    parameters = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape[1:])))

    def forward(parameters, frames):
        return network.apply(parameters, frames)

    def loss(parameters, frames):
        return forward(parameters, frames).astype(jnp.float32).sum()

    def program(frames, *leaves):
        tree = jax.tree.unflatten(jax.tree.structure(parameters), leaves)
        return (jax.grad(loss) if backward else forward)(tree, frames)

    program = compiled(
        program,
        where,
        (shape, jnp.bfloat16, ("images", None, None, None)),
        *((leaf.shape, leaf.dtype, [None] * leaf.ndim) for leaf in jax.tree.leaves(parameters)),
    )
    passes = "forward and backward" if backward else "forward"
    table.add_row(name, backend, passes, temporaries(program))


def main():
    console = Console()
    table = Table("mesh", "slots", "rows", "backend", "", "temporaries, MiB")
    for backend in ("xla", "splash"):
        for backward in (False, True):
            decoder(table, 4, 2048, backend, backward, fsdp=4)
            decoder(table, 4, 32768, backend, backward, fsdp=4)
            decoder(table, 1, 32768, backend, backward, sequence=4)
    console.print(table)
    table = Table("tower, 16 images", "backend", "", "temporaries, MiB")
    for name, config in (("CLIP-L 336", CLIP_L_336), ("SigLIP 384", SIGLIP_SO400M_384)):
        for backend in ("xla", "splash"):
            for backward in (False, True):
                tower(table, name, config, backend, backward)
    console.print(table)


if __name__ == "__main__":
    main()
