"""Imports a released checkpoint over eight simulated devices, and on one.

Run by `test_sharded_import.py` in a process of its own, since the number of devices is fixed when
JAX starts: `eight_devices.py FOLDER MESH ...`. Prints one JSON object, {mesh: {"differ": paths of
parameters that are not those of one device, bit for bit, "astray": of those that do not lie where
the layout says, "share": of all bytes that a device holds}}.
"""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert.huggingface import load_huggingface
from vllama2_jax.parallel.mesh import make_layout, parse_mesh
from vllama2_jax.parallel.sharding import param_shardings


def read(folder: str, scan_layers: bool, layout=None):
    """Parameters by path, and the network's shapes."""
    how = dict(dtype=np.float32, scan_layers=scan_layers, layout=layout)
    params, card, _ = load_huggingface(Path(folder), **how)
    return flatten(params), card.config


def compared(folder: str, mesh: str) -> dict:
    """What is different over the devices of a mesh, with layers stacked and apart."""
    layout, found = make_layout(parse_mesh(mesh), jax.devices()), {"differ": [], "astray": []}
    for scan_layers in (True, False):
        expected, _ = read(folder, scan_layers)
        params, config = read(folder, scan_layers, layout)
        assert params.keys() == expected.keys()
        where = param_shardings(layout, config, params, scan_layers=scan_layers)
        for path, leaf in params.items():
            if not np.array_equal(leaf, expected[path]):
                found["differ"].append(path)
            if not leaf.sharding.is_equivalent_to(where[path], leaf.ndim):
                found["astray"].append(path)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in params.values())
    return found | {"share": held / sum(leaf.nbytes for leaf in params.values())}


def main(folder: str, meshes: list[str]) -> None:
    """Compare and print."""
    print(json.dumps({mesh: compared(folder, mesh) for mesh in meshes}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
