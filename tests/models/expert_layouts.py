"""Checks of the mixture of experts on 8 simulated devices: `python expert_layouts.py CHECK`.

A program of its own, since a process has as many devices as it began with. It prints one JSON
object, which `test_moe_layouts.py` asserts about.
"""

import collections
import json
import math
import os
import re
import sys

# Compilers for TPUs need none; they shall not look for one.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from vllama2_jax.models.axes import Layout, using
from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.moe import MoE
from vllama2_jax.models.quantized import STORED_AS, dequantize, quantize
from vllama2_jax.models.remat import rematerialised
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES

EXPERTS, WIDTH, MLP = 8, 128, 64
CONFIG = DecoderConfig(
    family="mixtral",
    vocab_size=8,
    width=WIDTH,
    mlp_dim=MLP,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=WIDTH,
    rope_theta=1e4,
    norm_eps=1e-5,
    num_experts=EXPERTS,
    top_k=2,
)
KERNELS = {
    "gate": (EXPERTS, WIDTH, MLP),
    "up": (EXPERTS, WIDTH, MLP),
    "down": (EXPERTS, MLP, WIDTH),
}


def layout_of(name, **sizes):
    devices = np.array(jax.devices()).reshape([sizes.get(axis, 1) for axis in MESH_AXES])
    return Layout(jax.sharding.Mesh(devices, MESH_AXES), LAYOUTS[name])


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parameters():
    """Of a router that looks at the first inputs of a token, and of experts."""
    router = 0.01 * drawn(WIDTH, EXPERTS)
    router[:EXPERTS] += 3 * np.eye(EXPERTS)
    experts = {name: 0.2 * drawn(*KERNELS[name], seed=i) for i, name in enumerate(KERNELS, 1)}
    return {"router": {"kernel": router}, **experts}


def adapted(kind):
    """The same with adapters beside the experts' kernels, which are quantised if `kind` says so."""
    params = parameters()
    for seed, (name, (_, into, out)) in enumerate(KERNELS.items(), 10):
        params[f"{name}_lora_a"] = 0.2 * drawn(EXPERTS, into, 3, seed=seed)
        params[f"{name}_lora_b"] = 0.2 * drawn(EXPERTS, 3, out, seed=seed + 10)
        params[f"{name}_lora_scale"] = np.full(EXPERTS, 0.5, np.float32)
        if kind:
            for part, array in quantize(jnp.array(params.pop(name)), kind).items():
                params[f"{name}_{part}"] = np.asarray(array)
    return params


def tokens(load, rows, length):
    """[B, L, W] that choose: all experts, all but 2 and 5 ("empty"), or 0 and 1 ("overloaded")."""
    rng, count = np.random.default_rng(0), rows * length
    allowed = [e for e in range(EXPERTS) if load != "empty" or e not in (2, 5)]
    chosen = np.stack([rng.choice(allowed, 2, replace=False) for _ in range(count)])
    if load == "overloaded":
        chosen = np.tile([0, 1], (count, 1))
    x = 0.5 * drawn(count, WIDTH)
    x[:, :EXPERTS] += 4 * np.eye(EXPERTS)[chosen[:, 0]] + 3 * np.eye(EXPERTS)[chosen[:, 1]]
    return x.reshape(rows, length, WIDTH).astype(np.float32)


def loop_over_experts(params, x):
    """The oracle: every expert looks at every token."""

    def kernel(name):
        parts = next((kind for kind in STORED_AS if f"{name}_{kind}" in params), None)
        base = params.get(name)
        if parts:
            base = dequantize({p: params[f"{name}_{p}"] for p in STORED_AS[parts]}, jnp.float32)
        if f"{name}_lora_a" in params:
            a, b, scale = (params[f"{name}_lora_{part}"] for part in ("a", "b", "scale"))
            base = base + scale[:, None, None] * jnp.einsum("eir,ero->eio", a, b)
        return base

    gate, up, down = map(kernel, KERNELS)
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    top, chosen = jax.lax.top_k(probs, CONFIG.top_k)
    out = jnp.zeros_like(x)
    for e in range(EXPERTS):
        share = jnp.where(chosen == e, top, 0).sum(-1, keepdims=True) / top.sum(-1, keepdims=True)
        out += share * ((jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return out


def with_gradients(function, x):
    """A jitted (params, x) -> {name: array} of the result and all gradients."""
    cotangent = drawn(*x.shape, seed=99)

    @jax.jit
    def run(params, x):
        floats = {k: v for k, v in params.items() if k == "router" or v.dtype == np.float32}
        out, backward = jax.vjp(lambda floats, x: function({**params, **floats}, x), floats, x)
        grads, grad_x = backward(cotangent)
        return {"out": out, "x": grad_x, "router": grads.pop("router")["kernel"], **grads}

    return run


def experts(layout, how="ring", backend="ragged_dot"):
    module = MoE(CONFIG, jnp.float32, jnp.float32, backend, False, how)

    def run(params, x):
        with using(layout):
            return module.apply({"params": params}, x)[0]

    return run


def largest_error(found, expected):
    assert found.keys() == expected.keys()
    return max(
        float(jnp.abs(found[name] - expected[name]).max() / jnp.abs(expected[name]).max())
        for name in found
    )


def compare(cases):
    """{case: largest relative error}, of cases (title, layout, exchange, backend, params, xs)."""
    errors = {}
    for title, layout, how, backend, params, loads in cases:
        ours = with_gradients(experts(layout, how, backend), next(iter(loads.values())))
        theirs = with_gradients(loop_over_experts, next(iter(loads.values())))
        for load, x in loads.items():
            with jax.default_matmul_precision("highest"):
                found, expected = ours(params, x), theirs(params, x)
            errors[f"{title}, {load}"] = largest_error(found, expected)
    return errors


def training():
    """Every layout, with balanced, empty and overloaded experts."""
    loads = {load: tokens(load, 8, 6) for load in ("balanced", "empty", "overloaded")}
    cases = [
        ("fsdp", dict(fsdp=8), "ring", "blocks"),
        ("fsdp+tensor", dict(fsdp=4, tensor=2), "ring", "ragged_dot"),
        ("fsdp+expert", dict(fsdp=2, expert=4), "ring", "ragged_dot"),
        ("fsdp+expert", dict(fsdp=2, expert=4), "all_to_all", "ragged_dot"),
        ("fsdp+tensor", dict(data=2, expert=2, tensor=2), "ring", "ragged_dot"),
        ("fsdp+tensor", dict(data=2, expert=2, tensor=2), "all_to_all", "blocks"),
        ("fsdp+tensor", dict(fsdp=2, sequence=2, tensor=2), "ring", "ragged_dot"),
        ("2d", dict(data=2, fsdp=2, expert=2), "ring", "ragged_dot"),
    ]
    return compare(
        (f"{name} {sizes} {how}", layout_of(name, **sizes), how, backend, parameters(), loads)
        for name, sizes, how, backend in cases
    )


def decoding():
    """A few tokens, whose experts' weights stay where they are."""
    cases = [
        ("2d", dict(data=2, fsdp=2, tensor=2), 4),
        ("fsdp+tensor", dict(fsdp=2, expert=2, tensor=2), 1),
    ]
    return compare(
        (
            f"{name} {sizes}",
            layout_of(name, **sizes),
            "ring",
            "blocks",
            parameters(),
            {"balanced": tokens("balanced", rows, 1)},
        )
        for name, sizes, rows in cases
    )


def undivided():
    """Rows and slots that do not divide over the mesh axes of theirs."""
    cases = [
        ("fsdp", dict(fsdp=8), "blocks", (1, 24)),
        ("fsdp", dict(fsdp=8), "ragged_dot", (3, 8)),
        ("fsdp+expert", dict(fsdp=2, expert=4), "ragged_dot", (3, 8)),
        ("fsdp+tensor", dict(data=2, expert=2, tensor=2), "ragged_dot", (3, 8)),
        ("fsdp+tensor", dict(fsdp=2, sequence=2, tensor=2), "ragged_dot", (2, 17)),
    ]
    return compare(
        (
            f"{name} {sizes} {shape}",
            layout_of(name, **sizes),
            "ring",
            backend,
            parameters(),
            {"balanced": tokens("balanced", *shape)},
        )
        for name, sizes, backend, shape in cases
    )


def unread():
    """Products and conditions of a program of one token, by where they stand."""
    run = jax.jit(experts(layout_of("2d", fsdp=2, expert=2, tensor=2), backend="blocks"))
    text = run.lower(parameters(), tokens("balanced", 1, 1)).compile().as_text()
    branches, entry = text.split("\nENTRY", 1)
    return {
        "conditions": entry.count(" conditional("),
        "always": entry.count(" dot("),
        "under conditions": branches.count(" dot("),
    }


def adapters():
    """LoRA and quantised kernels; two blocks of nf4 are split over two devices, and not over 4."""
    cases = [
        ("fsdp+tensor", dict(fsdp=2, sequence=2, tensor=2), "nf4", (4, 6)),
        ("fsdp+tensor", dict(fsdp=4, tensor=2), "nf4", (4, 6)),
        ("fsdp+expert", dict(fsdp=2, expert=4), "int8", (8, 6)),
        ("2d", dict(data=2, fsdp=2, expert=2), "nf4", (2, 1)),
    ]
    return compare(
        (
            f"{name} {sizes} {kind}",
            layout_of(name, **sizes),
            "ring",
            "ragged_dot",
            adapted(kind),
            {"balanced": tokens("balanced", *shape)},
        )
        for name, sizes, kind, shape in cases
    )


class Layer(nn.Module):
    """Experts beside a residual stream."""

    backend: str
    how: str

    @nn.compact
    def __call__(self, x, _):
        module = MoE(CONFIG, x.dtype, x.dtype, self.backend, False, self.how, name="moe")
        return x + module(x)[0], None


def compiled(layout, backend, how, dtype, backward=True, rows=8, length=16):
    """The HLO of two scanned layers under full rematerialisation, or of their gradients."""
    scanned = nn.scan(
        rematerialised(Layer, "full", scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(backend, how)
    shape = (rows, length, WIDTH)
    boxed = jax.eval_shape(
        lambda: scanned.init(jax.random.key(0), jnp.zeros(shape, dtype), None)["params"]
    )

    def placed(names, leaf):
        sharding = layout.sharding(names, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(
        lambda box: placed(box.names, box.value),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
    x = placed(("batch", "length", None), jax.ShapeDtypeStruct(shape, dtype))

    def forward(params, x):
        with using(layout):
            return scanned.apply({"params": params}, x, None)[0].astype(jnp.float32).sum()

    run = jax.grad(forward, (0, 1)) if backward else forward
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, x)) if backward else None
    return jax.jit(run, out_shardings=shardings).lower(params, x).compile().as_text()


def counts(hlo, devices):
    """Collectives whose result is as large as a kernel of all experts, or as one device's part."""
    size = math.prod(KERNELS["gate"])
    names = {size: "", size // devices: " to parts"}
    found = collections.Counter()
    for shape, kind in re.findall(
        r"= \w+\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter)\(", hlo
    ):
        count = math.prod(map(int, shape.split(",")))
        if count in names:
            found[kind + names[count]] += 1
    return found


def collectives():
    """Of weights, in a training step and in a decoding step whose weights stay."""
    decoding = compiled(
        layout_of("2d", fsdp=4, tensor=2), "blocks", "ring", jnp.float32, False, rows=2, length=1
    )
    return {
        "training": counts(compiled(layout_of("fsdp", fsdp=8), "blocks", "ring", jnp.float32), 8),
        "decoding": counts(decoding, 8),
    }


def v5p():
    """The same for 4 chips of a v5p, and the kernels that it calls."""
    topology = topologies.get_topology_desc("v5p:2x2x1", "tpu")
    layouts = {
        name: Layout(topologies.make_mesh(topology, shape, MESH_AXES), LAYOUTS["fsdp+expert"])
        for name, shape in {"fsdp": (1, 4, 1, 1, 1), "expert": (1, 1, 4, 1, 1)}.items()
    }
    split = compiled(layouts["fsdp"], "megablox", "ring", jnp.bfloat16)
    sent = compiled(layouts["expert"], "megablox", "all_to_all", jnp.bfloat16)
    return {
        "collectives": counts(split, 4),
        "gmm": len(re.findall(r"%gmm\S* = .* custom-call\(", split)),
        "tgmm": len(re.findall(r"%tgmm\S* = .* custom-call\(", split)),
        "ragged": len(re.findall(r" ragged-all-to-all\(", sent)),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
