"""The mixture of experts on many devices: simulated ones, and TPUs as their compiler sees them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from vllama2_jax.models.axes import Layout, _stages, using
from vllama2_jax.models.config import DecoderConfig
from vllama2_jax.models.moe import MoE
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES

PROGRAM = Path(__file__).parent / "expert_layouts.py"


def checked(name):
    """What a check of `expert_layouts.py` printed."""
    run = subprocess.run([sys.executable, PROGRAM, name], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", ["training", "decoding", "undivided", "adapters"])
def test_every_layout_equals_a_loop_over_experts_forward_and_backward(check):
    errors = checked(check)
    assert len(errors) == {"training": 24, "decoding": 2, "undivided": 5, "adapters": 4}[check]
    assert {case: error for case, error in errors.items() if not error <= 1e-5} == {}


def test_experts_that_no_token_chose_are_not_read_on_any_device():
    """Each device has four: they enter and leave under conditions, and only the router always."""
    assert checked("unread") == {"conditions": 2 * 4, "always": 1, "under conditions": 3 * 4}


def test_weights_are_gathered_twice_and_their_gradients_scattered_once_under_full_remat():
    """Three kernels; none of them travels where a few tokens are decoded."""
    found = checked("collectives")
    assert found["training"] == {"all-gather": 6, "reduce-scatter to parts": 3}
    assert found["decoding"] == {}


def test_a_v5p_multiplies_by_megablox_and_exchanges_as_the_simulation_does():
    """The last product is not computed again: its output is no part of any gradient."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs comes with vllama2_jax[tpu]")
    found = checked("v5p")
    assert found["collectives"] == {"all-gather": 6, "reduce-scatter to parts": 3}
    assert found["gmm"] == 3 + 2 + 3 and found["tgmm"] == 3
    assert found["ragged"] == 2 + 1 + 2


def torus(*sizes):
    """Slice and coordinates of chips in row-major order, [1, chips, 4]."""
    return np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(1, -1, 4)


def test_a_torus_of_three_dimensions_is_gathered_along_one_and_then_two():
    line, plane = _stages(torus(1, 4, 4, 4))
    assert line[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]] and len(line) == 16
    assert plane[1] == list(range(1, 64, 4)) and len(plane) == 4
    assert [len(stage[0]) for stage in _stages(torus(2, 4, 4, 8))] == [8, 16, 2]


def test_planes_are_squares_where_the_torus_has_some():
    plane, line = _stages(torus(1, 4, 8, 8))
    assert plane[1] == list(range(64, 128)) and line[1] == [1, 65, 129, 193]
    assert [len(stage[0]) for stage in _stages(torus(1, 4, 8, 12))] == [12, 8, 4]


def test_two_dimensions_or_no_torus_at_all_take_one_step():
    assert _stages(torus(1, 1, 4, 8)) == [None]
    assert _stages(torus(1, 1, 16, 16)) == _stages(torus(2, 1, 1, 1)) == _stages(None) == [None]
    unordered = torus(1, 2, 2, 2)[:, [0, 7]]
    assert _stages(unordered) == [None]


def summed_over_devices(top_k, name, *shape):
    """Types of sums [.., 16] that a program in bfloat16 makes over devices."""
    config = DecoderConfig("mixtral", 8, 16, 16, 1, 1, 1, 16, 1e4, 1e-5, num_experts=8, top_k=top_k)
    module = MoE(config, jnp.bfloat16, jnp.float32, "blocks", False)
    x = jax.ShapeDtypeStruct((8, 32, 16), jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    with using(Layout(AbstractMesh(shape, MESH_AXES), LAYOUTS[name])):
        text = str(jax.make_jaxpr(module.apply)(nn.meta.unbox(params), x))
    return re.findall(r":(\w+)\[[\d,]*16\] = (?:reduce_scatter|psum)", text)


@pytest.mark.parametrize(
    ("name", "shape"), [("fsdp+expert", (1, 2, 4, 1, 1)), ("2d", (2, 1, 4, 1, 1))]
)
def test_sums_of_more_than_two_experts_travel_in_float32(name, shape):
    """Two numbers, and zeros, add up to the same in bfloat16."""
    assert summed_over_devices(4, name, *shape) == ["f32"]
    assert summed_over_devices(2, name, *shape) == ["bf16"]


def apply(layout, split_experts=False, exchange="ring"):
    config = DecoderConfig("mixtral", 8, 16, 16, 1, 1, 1, 16, 1e4, 1e-5, num_experts=8)
    module = MoE(config, np.float32, np.float32, "blocks", split_experts, exchange)
    x = jax.ShapeDtypeStruct((8, 4, 16), np.float32)
    with using(layout):
        jax.eval_shape(module.init, jax.random.key(0), x)


def layout(*shape):
    return Layout(AbstractMesh(shape, MESH_AXES), LAYOUTS["fsdp+expert"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((layout(1, 1, 3, 1, 1),), "8 experts cannot be split over 3 devices"),
        ((layout(1, 2, 2, 1, 1), True), "split_experts=True keeps experts in arrays of their own"),
        ((layout(1, 2, 2, 1, 1), False, "post"), "unknown exchange of experts 'post'; known: ring"),
    ],
)
def test_what_cannot_be_split_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply(*arguments)
