"""Prefills a small Mixtral on one device and, laid out in several ways, on eight simulated ones.

Run by `test_sharded_generation.py` in a process of its own, since the number of devices is fixed
when JAX starts. Prints one JSON object, {mesh: {rows: how logits behind the prompts differ}}.
"""

import dataclasses
import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.miniature import MINIATURE
from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.infer.programs import Programs, Prompt
from vllama2_jax.models.vllama2 import init_params
from vllama2_jax.parallel.mesh import make_layout, parse_mesh
from vllama2_jax.parallel.sharding import param_shardings

MIXTRAL = dataclasses.replace(
    MINIATURE,
    decoder=dataclasses.replace(
        MINIATURE.decoder, family="mixtral", qkv_bias=False, num_layers=1, num_experts=8
    ),
)
ROWS = (1, 3)  # neither divides over eight devices
LENGTH = 40  # slots of a row, too many to skip the sort


def prefilled(mesh: str | None) -> dict[int, np.ndarray]:
    """Logits behind prompts, by how many rows there are."""
    layout = make_layout(parse_mesh(mesh), jax.devices()) if mesh else None
    params = nn.meta.unbox(init_params(MIXTRAL, jax.random.key(0), scan_layers=False))
    # Larger than usual, so that experts' parts do not drown.
    flat = {path: leaf * 4 if leaf.ndim > 1 else leaf for path, leaf in flatten(params).items()}
    if layout:
        flat = jax.device_put(flat, param_shardings(layout, MIXTRAL, flat, scan_layers=False))
    programs, found = Programs(MIXTRAL, jnp.float32, layout=layout), {}
    for rows in ROWS:
        tokens = np.random.default_rng(rows).integers(0, 32, (rows, LENGTH), np.int32)
        slots = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
        prompt = Prompt(tokens, slots, np.ones_like(slots), np.full_like(slots, -1))
        cache = programs.new_cache(rows, 64)
        found[rows] = np.asarray(programs.prefill(unflatten(flat), prompt, None, cache)[0])
    return found


def main(meshes: list[str]) -> None:
    """Compare and print."""
    expected, found = prefilled(None), {}
    for mesh in meshes:
        got = prefilled(mesh)
        found[mesh] = {
            rows: float(np.abs(got[rows] - wanted).max() / np.abs(wanted).max())
            for rows, wanted in expected.items()
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
