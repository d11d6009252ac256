"""What a stack of Mixtral's expert layers exchanges and holds on v5p chips, as XLA compiles it.

    python benchmarks/experts_on_v5p.py [--topology v5p:4x4x4] [--mesh fsdp=64] [--layout fsdp]
        [--exchange ring] [--rows 128] [--length 2048] [--layers 32] [--overlap]

Gradients of norm, experts and residual under full rematerialisation, bfloat16 throughout. It needs
no TPU, only libtpu (`make env EXTRAS=tpu`). `--overlap` gives the compiler the flags that let it
exchange while it computes. The table is of one layer: forward pass, then backward.
"""

import argparse
import math
import os
import re
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from vllama2_jax.models.axes import Layout, constrain, using
from vllama2_jax.models.decoder import RMSNorm
from vllama2_jax.models.moe import MoE
from vllama2_jax.models.remat import rematerialised
from vllama2_jax.models.zoo import MIXTRAL_8X7B
from vllama2_jax.parallel.backends import compiler_options, moe_backend
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
)


class Layer(nn.Module):
    """Norm, experts, residual."""

    backend: str
    exchange: str

    @nn.compact
    def __call__(self, x, _):
        x = constrain(x, "batch", "length", "act_embed")
        normed = RMSNorm(MIXTRAL_8X7B.norm_eps, x.dtype, x.dtype, name="norm")(x)
        moe = MoE(MIXTRAL_8X7B, x.dtype, x.dtype, self.backend, False, self.exchange, name="moe")
        return x + moe(normed)[0], None


def compiled(layout, args):
    """The gradients' program."""
    stack = nn.scan(
        rematerialised(Layer, "full", scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=args.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(moe_backend(layout.mesh.devices), args.exchange)
    shape = (args.rows, args.length, MIXTRAL_8X7B.width)
    boxed = jax.eval_shape(
        lambda: stack.init(jax.random.key(0), jnp.zeros((1, 1, shape[-1]), jnp.bfloat16), None)
    )

    def placed(names, leaf):
        sharding = layout.sharding(names, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    params = jax.tree.map(lambda box: placed(box.names, box.value), boxed, is_leaf=is_box)
    x = placed(("batch", "length", "act_embed"), jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    def loss(params, x):
        with using(layout):
            return jnp.square(stack.apply(params, x, None)[0].astype(jnp.float32)).sum()

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, x))
    lowered = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings).lower(params, x)
    options = compiler_options(layout.mesh.devices) if args.overlap else None
    return lowered.compile(compiler_options=options)


def collectives(hlo):
    """(kind, result, overlapped, bytes) of what loops exchange, above 1 MB."""
    computation = ""
    for line in hlo.splitlines():
        if heading := re.match(r"%(\S+) .*\{$", line):
            computation = heading[1]
        if "region" not in computation:
            continue
        found = (
            re.match(rf"\s+%\S+ = (\S+) ({'|'.join(COLLECTIVES)})\(", line)
            or re.match(r"\s+%\S+ = (\S+) fusion\(.*calls=%(all-reduce-scatter)", line)
            or re.match(r"\s+%async-collective-start\S* = \(\S+ (\S+), .*(fusion)\(", line)
        )
        if not found:
            continue
        kind = {"all-reduce-scatter": "reduce-scatter", "fusion": "all-gather"}.get(found[2])
        shape = [int(size) for size in re.search(r"\[([\d,]*)\]", found[1])[1].split(",")]
        if 2 * math.prod(shape) > 1e6:
            yield kind or found[2], f"bf16{shape}", found[2] == "fusion", 2 * math.prod(shape)


def main():
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--mesh", default="fsdp=64", help="axis=size,...")
    parser.add_argument("--layout", default="fsdp", choices=LAYOUTS)
    parser.add_argument("--exchange", default="ring")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--overlap", action="store_true")
    args = parser.parse_args()

    topology = topologies.get_topology_desc(args.topology, "tpu")
    sizes = dict(part.split("=") for part in args.mesh.split(","))
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    layout = Layout(topologies.make_mesh(topology, shape, MESH_AXES), LAYOUTS[args.layout])
    began = time.perf_counter()
    program = compiled(layout, args)
    seconds, memory, hlo = (
        time.perf_counter() - began,
        program.memory_analysis(),
        program.as_text(),
    )

    table = Table(
        "collective", "result", "overlapped", "MB", title=" ".join([args.topology, args.mesh])
    )
    for kind, result, overlapped, size in collectives(hlo):
        table.add_row(kind, result, "yes" if overlapped else "", f"{size / 1e6:,.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"GB per chip: {memory.argument_size_in_bytes / 1e9:.2f} arguments, "
        f"{memory.peak_memory_in_bytes / 1e9:.2f} peak; compiled in {seconds:.0f} s; "
        f"{hlo.count('tpu_custom_call')} calls of megablox"
    )


if __name__ == "__main__":
    main()
