"""A mesh that does not divide a network is refused in one line, before a weight is read."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.mesh import abstract_layout, parse_mesh
from vllama2_jax.parallel.sharding import param_shardings

ROOT = Path(__file__).resolve().parents[2]


def check(mesh, count, model, lengths=()):
    mesh = parse_mesh(mesh)
    check_network(mesh, abstract_layout(mesh, count), ZOO[model], lengths)


@pytest.mark.parametrize(
    ("mesh", "count", "model", "words", "remedy"),
    [
        (
            "fsdp",
            96,
            "2-8x7B",
            "fsdp 96 does not divide the width 4096 of 2-8x7B, so every device would hold all of "
            "it; say --mesh ",
            "data=3,fsdp=32",
        ),
        (
            "fsdp+tensor:tensor=8",
            64,
            "2.1-7B-AV",
            "tensor 8 does not divide the number of heads 28 of 2.1-7B-AV, so every device would "
            "hold all of it; say --mesh ",
            "fsdp+tensor:fsdp=16,tensor=4",
        ),
        (
            "fsdp+expert:expert=3,expert_exchange=all_to_all",
            96,
            "2-8x7B",
            "fsdp 32 x expert 3 does not divide the width 4096 of 2-8x7B, so every device would "
            "hold 128 of it; say --mesh ",
            "fsdp+expert:data=3,fsdp=32,expert=1,expert_exchange=all_to_all",
        ),
        (
            "fsdp+expert:expert=16",
            32,
            "2-8x7B",
            "expert 16 does not divide the number of experts 8 of 2-8x7B, so every device would "
            "hold all of it; say --mesh ",
            "fsdp+expert:fsdp=4,expert=8",
        ),
        (
            "dcn_data=2",
            48,
            "2-7B",
            "fsdp 24 does not divide the width 4096 of 2-7B, so every device would hold all of "
            "it; say --mesh ",
            "data=3,fsdp=8,dcn_data=2",
        ),
    ],
)
def test_sizes_that_a_mesh_does_not_divide_are_named_with_a_mesh_that_does(
    mesh, count, model, words, remedy
):
    with pytest.raises(ValueError) as refused:
        check(mesh, count, model)
    assert str(refused.value) == words + remedy
    check(remedy, count, model)


@pytest.mark.parametrize(
    ("mesh", "count", "model"),
    [
        ("fsdp", 512, "2.1-7B-AV"),
        ("fsdp+expert:expert=8", 64, "2-8x7B"),
        ("fsdp+tensor:tensor=16", 32, "2-72B"),  # of 8 key-value heads
    ],
)
def test_of_what_is_accepted_every_device_holds_its_share_but_for_norms_and_few_heads(
    mesh, count, model
):
    layout, network = abstract_layout(parse_mesh(mesh), count), ZOO[model]
    check(mesh, count, model, (2048,))
    leaves = flatten(abstract_params(network)["decoder"])
    leaves = {f"decoder/{path}": leaf for path, leaf in leaves.items()}
    where = param_shardings(layout, network, leaves)
    more = {
        path
        for path, leaf in leaves.items()
        if count * math.prod(where[path].shard_shape(leaf.shape)) > leaf.size
    }
    assert {path for path in more if not re.search("norm/|/bias|/(key|value)/", path)} == set()


def test_rows_that_pieces_of_a_row_do_not_divide_are_refused():
    check("sequence=2,fsdp=-1", 64, "2-7B", (640, 1024))
    with pytest.raises(ValueError, match=r"^sequence 4 does not divide rows of 642 slots; let all"):
        check("sequence=4,fsdp=-1", 64, "2-7B", (640, 642))


PROGRAM = """
import sys
from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.loading import load
from vllama2_jax.train.run import run
recipe = resolve(["config:tiny_video_sft"], Shortcuts(model="tiny", batch=12))
for action in (lambda: load("tiny", mesh="fsdp"), lambda: run(build(recipe), sys.argv[1])):
    try:
        action()
    except ValueError as error:
        print(error)
"""


def test_load_and_train_refuse_a_mesh_that_does_not_divide_the_model(tmp_path):
    flags = "--xla_force_host_platform_device_count=6"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "run"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = (
        "fsdp 6 does not divide the width 160 of tiny, so every device would hold all of it; "
        "say --mesh data=3,fsdp=2"
    )
    assert done.stdout.splitlines() == [expected] * 2
