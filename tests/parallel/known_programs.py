"""Programs whose collectives are known, compiled for simulated devices or for TPUs; prints JSON.

Run by `test_collectives.py` in a process of its own, since the number of devices is fixed when JAX
starts: `python known_programs.py cpu`, or `tpu`. The object is {name: text}.
"""

import json
import os
import sys

if __name__ == "__main__":  # and not where a test reads the sizes below
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vllama2_jax.parallel.topology import devices, topology

ROWS, WIDTH, OUTER, INNER = 256, 512, 5, 3
LAYERS, NARROW, WIDE = 3, 512, 1024

SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter")
}
ASYNC_FUSION = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_enable_async_all_gather": "true",
}


def mesh_of(name, **sizes):
    found = topology(name)
    if found.platform == "cpu":
        grid = np.array(devices(found)).reshape(tuple(sizes.values()))
    elif found.num_slices > 1:
        across = (found.num_slices,) + (1,) * (len(sizes) - 1)
        inside = tuple(n // m for n, m in zip(sizes.values(), across, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices(found))
    else:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices(found))
    return Mesh(grid, tuple(sizes))


def compiled(function, mesh, specs, shapes, options=None, dtype=jnp.float32):
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for spec, shape in zip(specs, shapes, strict=True)
    ]
    return jax.jit(function).lower(*arguments).compile(options).as_text()


def every_kind(mesh, ragged, dtype):
    """Each kind of collective, some of them in nested loops."""
    n, e = mesh.shape["fsdp"], mesh.shape["expert"]

    def local(x, weights):
        x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % n) for i in range(n)])

        def outer(x, w):
            def inner(x, i):
                # Not the same in every turn, or XLA gathers once.
                whole = jax.lax.all_gather(w + i, "fsdp", axis=0, tiled=True)
                return jax.lax.psum(jnp.tanh(x @ whole), "tensor"), None

            return jax.lax.scan(inner, x, jnp.arange(INNER, dtype=dtype))

        x, _ = jax.lax.scan(outer, x, weights)
        y = jax.lax.psum_scatter(x, ("fsdp", "expert"), scatter_dimension=0, tiled=True)
        total = y.sum()
        if ragged:
            sizes = jnp.full((e,), ROWS // e, jnp.int32)
            starts = jnp.arange(e, dtype=jnp.int32) * (ROWS // e)
            rest = (starts, sizes, starts, sizes)
            total += jax.lax.ragged_all_to_all(x, x * 0, *rest, axis_name="expert").sum()
        return jax.lax.psum(total, ("fsdp", "expert", "tensor"))

    specs = (P(("fsdp", "expert")), P(None, "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return compiled(
        function, mesh, specs, ((ROWS * n * e, WIDTH), (OUTER, WIDTH, WIDTH)), dtype=dtype
    )


def layers(mesh, options=None, dtype=jnp.float32):
    """Gradients of layers whose weights are gathered inside, and computed again behind."""
    n = mesh.shape["fsdp"]

    def loss(up, down, x):
        def local(up, down, x):
            @jax.checkpoint
            def layer(x, weights):
                up, down = (jax.lax.all_gather(w, "fsdp", axis=0, tiled=True) for w in weights)
                return x + jax.nn.silu(x @ up) @ down, None

            return jax.lax.scan(layer, x, (up, down))[0]

        specs = (P(None, "fsdp"), P(None, "fsdp"), P("fsdp"))
        y = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), check_vma=False)(
            up, down, x
        )
        return (y.astype(jnp.float32) ** 2).sum()

    shapes = ((LAYERS, NARROW, WIDE), (LAYERS, WIDE, NARROW), (n, 128, NARROW))
    specs = (P(None, "fsdp"), P(None, "fsdp"), P("fsdp"))
    return compiled(jax.value_and_grad(loss, (0, 1)), mesh, specs, shapes, options, dtype)


def windowed(mesh):
    """A product that XLA itself splits into parts, to permute its factor meanwhile."""

    def function(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(
                jnp.tanh(x @ w), NamedSharding(mesh, P("fsdp"))
            ), None

        return jax.lax.scan(layer, x, weights)[0]

    n = mesh.shape["fsdp"]
    shapes = ((LAYERS, 2 * WIDE, 2 * WIDE), (32 * n, 512, 2 * WIDE))
    return compiled(function, mesh, (P(None, "fsdp"), P("fsdp")), shapes, dtype=jnp.bfloat16)


def kernels(mesh):
    """A grouped product three times, and attention with its gradient."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        CausalMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    def local(x, w, q):
        def turn(x, _):
            return gmm(x, w, jnp.full(2, 64, jnp.int32), jnp.bfloat16), None

        def score(q):
            attend = make_splash_mha_single_device(MultiHeadMask([CausalMask((256, 256))]))
            return attend(q, q, q).astype(jnp.float32).sum()

        return jax.lax.scan(turn, x, length=3)[0], jax.grad(score)(q)

    function = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    shapes = ((128, 128), (2, 128, 128), (1, 256, 128))
    return compiled(function, mesh, (P(),) * 3, shapes, dtype=jnp.bfloat16)


def two_slices(mesh):
    """Gathered within a slice, summed over slices and scattered over both."""

    def local(x):
        whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        y = jax.lax.psum(jnp.tanh(whole @ whole.T), "data")
        return jax.lax.psum_scatter(y, "fsdp", scatter_dimension=0, tiled=True)

    spec = P(("data", "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return compiled(function, mesh, (spec,), ((2 * WIDE, NARROW),), dtype=jnp.bfloat16)


def main(platform):
    if platform == "cpu":
        yield (
            "every kind",
            every_kind(mesh_of("cpu:8", fsdp=2, expert=2, tensor=2), False, jnp.float32),
        )
        yield "layers", layers(mesh_of("cpu:8", fsdp=8))
        return
    cube, square = mesh_of("v5p:2x2x2", fsdp=2, expert=2, tensor=2), mesh_of("v5p-8", fsdp=4)
    pod = mesh_of("v5p-128", fsdp=64)
    half = jnp.bfloat16
    yield "every kind", every_kind(cube, True, half)
    yield "layers", layers(square, dtype=half)
    yield "layers, sparse cores", layers(pod, SPARSE_CORES, half)
    yield "layers, async fusions", layers(pod, ASYNC_FUSION, half)
    yield "windowed", windowed(mesh_of("v5e-16", fsdp=16))
    yield "kernels", kernels(square)
    yield "two slices", two_slices(mesh_of("2xv5p-8", data=2, fsdp=4))


if __name__ == "__main__":
    print(json.dumps(dict(main(sys.argv[1]))))
