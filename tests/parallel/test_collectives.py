"""Collectives of compiled programs against those that the programs were written with.

Sizes follow from the shapes in `known_programs.py`; XLA's own text is only read by what is tested.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import known_programs as programs
import pytest

from vllama2_jax.parallel.collectives import (
    Collective,
    communication,
    largest_gather,
    totals,
    wire_bytes,
)

CUBE = dict(fsdp=2, expert=2, tensor=2)
WEIGHTS = programs.LAYERS * 2 * programs.NARROW * programs.WIDE  # of both products of all layers


@functools.cache
def compiled(platform):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = str(Path(__file__).parent / "known_programs.py")
    child = subprocess.run(
        [sys.executable, script, platform], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.fixture
def on_cpu():
    return compiled("cpu")


@pytest.fixture
def on_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    return compiled("tpu")


def bytes_of(found):
    """{(kind, axis): (bytes, count)} without sums of scalars."""
    sums = totals(found.collectives)
    return {(t.kind, t.axis): (t.bytes, t.count) for t in sums if t.bytes > 8}


def every_kind(itemsize):
    rows, width = programs.ROWS, programs.WIDTH
    local, turns = rows * width * itemsize, programs.OUTER * programs.INNER
    return {
        ("all-to-all", "expert"): (local, 1),
        ("collective-permute", "fsdp"): (local, 1),
        ("all-gather", "fsdp"): (turns * width * width * itemsize, turns),
        ("all-reduce", "tensor"): (turns * local, turns),
        ("reduce-scatter", "fsdp+expert"): (local // 4, 1),
    }


def test_each_kind_is_found_with_its_axis_and_nested_loops_are_multiplied(on_cpu):
    found = communication(on_cpu["every kind"], CUBE)
    assert bytes_of(found) == every_kind(itemsize=4)
    assert found.uncounted_loops == ()
    scalar = found.collectives[-1]
    assert (scalar.axes, scalar.group_size, scalar.bytes) == (("fsdp", "expert", "tensor"), 8, 4)
    assert not any(one.overlapped for one in found.collectives)


def test_a_tpu_program_of_the_same_sends_the_same(on_tpu):
    found = communication(on_tpu["every kind"], CUBE)
    ragged = {("ragged-all-to-all", "expert"): (programs.ROWS * programs.WIDTH * 2, 1)}
    assert bytes_of(found) == every_kind(itemsize=2) | ragged


def test_layers_computed_again_gather_twice_and_scatter_once(on_cpu):
    found = communication(on_cpu["layers"], {"fsdp": 8})
    assert bytes_of(found) == {
        ("all-gather", "fsdp"): (4 * 2 * WEIGHTS, 4 * programs.LAYERS),
        ("reduce-scatter", "fsdp"): (4 * WEIGHTS // 8, 2 * programs.LAYERS),
    }
    assert sum(map(wire_bytes, found.collectives)) == pytest.approx(
        3 * 7 / 8 * 4 * WEIGHTS, rel=1e-6
    )
    assert largest_gather(found.collectives).bytes == 4 * programs.NARROW * programs.WIDE


@pytest.mark.parametrize(
    ("program", "chips"), [("layers", 4), ("layers, sparse cores", 64)], ids=["fused", "sparse"]
)
def test_scatters_in_fusions_and_on_sparse_cores_are_scatters(on_tpu, program, chips):
    found = communication(on_tpu[program], {"fsdp": chips})
    assert bytes_of(found) == {
        ("all-gather", "fsdp"): (2 * 2 * WEIGHTS, 4 * programs.LAYERS),
        ("reduce-scatter", "fsdp"): (2 * WEIGHTS // chips, 2 * programs.LAYERS),
    }


def test_what_sparse_cores_send_while_products_run_is_overlapped(on_tpu):
    found = communication(on_tpu["layers, sparse cores"], {"fsdp": 64})
    kinds = {(one.kind, one.overlapped) for one in found.collectives if one.bytes > 8}
    # The first weights of a layer are waited for; the others arrive during its first product.
    assert kinds == {("all-gather", True), ("all-gather", False), ("reduce-scatter", True)}
    plain = communication(on_tpu["layers"], {"fsdp": 4})
    assert not any(one.overlapped for one in plain.collectives if one.kind == "all-gather")


def test_a_gather_that_fusions_carry_along_counts_once(on_tpu):
    found = communication(on_tpu["layers, async fusions"], {"fsdp": 64})
    assert bytes_of(found)["all-gather", "fsdp"] == (2 * 2 * WEIGHTS, 4 * programs.LAYERS)
    assert any(one.overlapped for one in found.collectives if one.kind == "all-gather")


def test_a_product_that_xla_splits_permutes_as_many_parts_as_a_gather_would_bring(on_tpu):
    found = communication(on_tpu["windowed"], {"fsdp": 16})
    part = 2 * (2 * programs.WIDE) ** 2 // 16
    permutes = [one for one in found.collectives if one.kind == "collective-permute"]
    assert {(one.bytes, one.axis) for one in permutes} == {(part, "fsdp")}
    # 15 parts arrive; XLA's loop, unrolled and run in both directions, sends up to two more.
    assert 15 <= sum(one.count for one in permutes) / programs.LAYERS <= 17
    assert any(one.overlapped for one in permutes)


def test_kernels_are_named_and_counted_per_step(on_tpu):
    kernels = communication(on_tpu["kernels"], {"fsdp": 4}).kernels
    assert kernels["gmm"] == 3
    assert {name for name in kernels if name.startswith("splash_mha_")} == {
        "splash_mha_fwd_residuals",
        "splash_mha_dkv_no_residuals",
        "splash_mha_dq_no_residuals",
    }


def test_between_slices_go_sums_of_the_parts_within(on_tpu):
    mesh = dict(data=2, fsdp=4)
    found = communication(on_tpu["two slices"], mesh, across={"data": 2})
    between = [one for one in found.collectives if one.between_slices]
    scattered = 2 * programs.WIDE**2 // 4  # over the chips of a slice
    assert [(one.kind, one.axis, one.group) for one in between] == [("all-reduce", "data", (0, 4))]
    assert sum(one.bytes for one in between) == scattered
    assert bytes_of(found)["all-gather", "fsdp"] == (2 * programs.WIDE * programs.NARROW, 1)


def test_a_program_of_a_slice_needs_to_know_what_lies_across(on_cpu):
    with pytest.raises(ValueError, match=r"runs on 8 devices, not on a mesh of .*across slices"):
        communication(on_cpu["layers"], dict(data=2, fsdp=8))


@pytest.mark.parametrize(
    ("kind", "size", "wire"),
    [
        ("all-gather", 800, 700),
        ("reduce-scatter", 100, 700),
        ("all-reduce", 800, 1400),
        ("all-to-all", 800, 700),
        ("ragged-all-to-all", 800, 700),
        ("collective-permute", 800, 800),
    ],
)
def test_wire_bytes_are_those_of_ring_algorithms(kind, size, wire):
    one = Collective(kind, ("fsdp",), size, count=3, group=tuple(range(8)))
    assert wire_bytes(one) == 3 * wire
