"""How every published model lies on every mesh is what lies in `golden/`: a change shows as a diff.

UPDATE_GOLDEN=1 make test   writes the files anew
"""

import functools
import math
import os
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.vllama2 import named_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES
from vllama2_jax.parallel.tables import sharding_table

GOLDEN = Path(__file__).parent / "golden"
MESHES = {
    "fsdp": dict(fsdp=64),
    "fsdp+tensor": dict(fsdp=16, tensor=4),
    "fsdp+expert": dict(fsdp=8, expert=8),
    "2d": dict(fsdp=8, tensor=8),
}
TABLES = [
    (model, layout)
    for model, config in ZOO.items()
    for layout in MESHES
    if model != "tiny" and (config.decoder.num_experts or layout != "fsdp+expert")
]


def layout_of(name, **sizes):
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    return Layout(AbstractMesh(tuple(sizes.values()), MESH_AXES), LAYOUTS[name])


@functools.cache
def parameters(model):
    boxes = flax.traverse_util.flatten_dict(
        named_params(ZOO[model], param_dtype=jnp.bfloat16), sep="/"
    )
    return nn.meta.unbox(boxes), {path: box.names for path, box in boxes.items()}


@pytest.mark.parametrize(("model", "layout"), TABLES)
def test_every_parameter_lies_where_it_was_agreed(model, layout):
    mesh = MESHES[layout]
    table = sharding_table(layout_of(layout, **mesh), *parameters(model))
    on = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    lines = "".join(f"{line}\n" for line in (f"{model} on {on}", *table))
    path = GOLDEN / model / f"{layout}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    assert lines == path.read_text()


def test_golden_files_are_those_of_the_published_models():
    found = {(path.parent.name, path.stem) for path in GOLDEN.glob("*/*.txt")}
    assert found == set(TABLES)


def test_devices_hold_the_model_once_where_every_parameter_is_split():
    leaves, named = parameters("2-8x7B")
    experts = {path: leaf for path, leaf in leaves.items() if path.split("/")[-2] == "moe"}
    *lines, total = sharding_table(layout_of("fsdp", fsdp=64), experts, named)
    count = sum(math.prod(leaf.shape) for leaf in experts.values())
    assert len(lines) == 3
    assert total == f"{count} parameters, {2 * count // 64} bytes on each device"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"dense/kernel": ("embed", "wings")}, "dense/kernel: no rule says how the axis 'wings'"),
        (
            {"dense/kernel": ("embed", "conv_in")},
            "dense/kernel: 'embed' and 'conv_in', axes of one",
        ),
        ({}, "dense/kernel: no parameter of this network, so nothing says how it is split"),
    ],
    ids=["unknown", "collision", "nameless"],
)
def test_axes_that_no_rule_splits_name_the_parameter(named, words):
    leaves = {"dense/kernel": jnp.zeros((64, 64))}
    with pytest.raises(ValueError, match=words):
        sharding_table(layout_of("fsdp", fsdp=8), leaves, named)


def test_blocks_of_the_same_shape_share_a_line_and_others_do_not():
    leaves = {f"block_{i}/w": jnp.zeros((8, 4)) for i in range(3)} | {
        "block_3/w": jnp.zeros((8, 5))
    }
    named = dict.fromkeys(leaves, ("embed", "mlp"))
    assert sharding_table(layout_of("fsdp", fsdp=4), leaves, named)[:-1] == [
        "block_*/w  8x4  fsdp,-  32  x3",
        "block_3/w  8x5  fsdp,-  40",
    ]
