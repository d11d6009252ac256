"""What a mesh may be, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.miniature import MINIATURE
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.parallel.mesh import MeshConfig, abstract_layout, make_layout, make_mesh
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES
from vllama2_jax.parallel.sharding import param_shardings
from vllama2_jax.parallel.topology import devices, topology


def layout(name="fsdp", **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Layout(mesh, LAYOUTS[name])


@dataclasses.dataclass(frozen=True)
class Chip:
    platform: str
    slice_index: int
    process_index: int
    id: int


def chips(platform, slices, each=4):
    return [Chip(platform, n, n, each * n + i) for n in range(slices) for i in range(each)]


def test_the_axis_that_is_left_open_takes_the_other_devices():
    sizes = MeshConfig(layout="fsdp+tensor", tensor=4).sizes(64)
    assert sizes == {"data": 1, "fsdp": 16, "expert": 1, "sequence": 1, "tensor": 4}


def test_slices_split_the_slow_axes():
    assert MeshConfig(dcn_data=2).sizes(64)["fsdp"] == 32


@pytest.mark.parametrize(
    ("options", "devices", "words"),
    [
        ({"fsdp": 3}, 8, "a mesh of fsdp 3 does not fit 8 devices"),
        ({"fsdp": 4}, 8, "a mesh of fsdp 4 does not fit 8 devices"),
        ({"dcn_data": 3}, 8, "in 3 slices"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(options, devices, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**options).sizes(devices)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "fsdq"}, "unknown layout 'fsdq'; known: fsdp"),
        ({"data": -1}, "only one axis"),
        ({"tensor": 0}, "mesh.tensor 0 must be at least 1"),
        ({"tensor": 4}, "'fsdp' splits nothing over tensor; .* another layout: fsdp, fsdp.tensor"),
        ({"dcn_data": -1}, "mesh.dcn_data -1 must be at least 1"),
        ({"rules": (("mlp", ("tensr",)),)}, "mesh axes tensr; known: data"),
        ({"rules": (("mpl", ("tensor",)),)}, "axes mpl, which no array has"),
        ({"expert_exchange": "post"}, "unknown mesh.expert_exchange 'post'; known: ring, all_to"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(options, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**options)


def test_two_axes_of_one_array_may_not_share_a_mesh_axis():
    with pytest.raises(ValueError, match=r"'embed' and 'conv_in'.*over 'fsdp'"):
        layout(fsdp=8).spec(("embed", "conv_in"))


def test_an_axis_that_no_rule_knows_is_refused():
    with pytest.raises(ValueError, match="no rule says how the axis 'emded' is split"):
        layout(fsdp=8).spec(("emded",))


def test_an_axis_is_split_as_far_as_its_size_divides():
    mesh = layout(data=2, fsdp=4, expert=2)
    assert mesh.spec(("batch",), (16,))[0] == ("data", "fsdp", "expert")
    assert mesh.spec(("batch",), (8,))[0] == ("data", "fsdp")
    assert mesh.spec(("batch",), (3,))[0] is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fsdp+tensor:tensor=4,fsdp=-1", ("fsdp+tensor", -1, 4)),
        ("fsdp=8", ("fsdp", 8, 1)),
        ("fsdp+tensor", ("fsdp+tensor", -1, 1)),
    ],
)
def test_the_command_line_says_a_mesh_in_one_word(text, wanted):
    mesh = build(resolve(["config:video_sft"], Shortcuts(mesh=text))).mesh
    assert (mesh.layout, mesh.fsdp, mesh.tensor) == wanted


def test_the_command_line_says_how_tokens_travel_to_experts():
    text = "fsdp+expert:expert=4,expert_exchange=all_to_all"
    mesh = build(resolve(["config:video_sft"], Shortcuts(mesh=text))).mesh
    assert (mesh.layout, mesh.expert, mesh.expert_exchange) == ("fsdp+expert", 4, "all_to_all")
    assert abstract_layout(mesh, 8).expert_exchange == "all_to_all"


def test_a_mesh_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="mesh tensr=2: 'tensr=2' is not AXIS=SIZE"):
        resolve(["config:video_sft"], Shortcuts(mesh="tensr=2"))


def test_simulated_slices_lie_along_the_slowest_part_of_their_axis():
    """Of eight devices of two slices, 0-3 and 4-7, only copies or the outer halves are apart."""
    simulated = chips("cpu", 2)

    def numbers(**options):
        grid = make_mesh(MeshConfig(**options), simulated).devices
        return np.vectorize(lambda device: device.id)(grid).squeeze().tolist()

    assert numbers(dcn_data=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert numbers(dcn_fsdp=2) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert numbers(dcn_data=2, data=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert numbers(layout="fsdp+tensor", dcn_fsdp=2, tensor=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (
            chips("tpu", 2),
            {},
            "of 2 slices and the mesh says dcn_data 1 x .* dcn_data=2",
        ),
        (chips("tpu", 1), {"dcn_fsdp": 2}, "of 1 slices .* --mesh dcn_data=1"),
        (chips("gpu", 4), {"dcn_data": 2}, "of 4 processes .* --mesh dcn_data=4"),
    ],
)
def test_devices_of_several_slices_need_a_mesh_that_says_what_lies_across(devices, options, words):
    with pytest.raises(ValueError, match=words):
        make_layout(MeshConfig(**options), devices)


def test_a_rule_of_ones_own_takes_effect():
    """Hidden width whole under tensor parallelism, and the vocabulary over `fsdp`."""
    rules = (("mlp", ()), ("vocab", ("tensor", "fsdp")), ("embed", ()))
    mesh = abstract_layout(MeshConfig(layout="fsdp+tensor", tensor=2, rules=rules), 8)
    assert mesh.size("heads") == 2 and mesh.size("mlp") == 1
    assert mesh.spec(("embed", "vocab"), (16, 64)) == PartitionSpec(None, ("tensor", "fsdp"))
    where = param_shardings(mesh, MINIATURE, flatten(abstract_params(MINIATURE)))
    assert where["decoder/layers/mlp/gate/kernel"].is_fully_replicated
    assert where["decoder/lm_head/kernel"].spec == PartitionSpec(None, ("tensor", "fsdp"))


def test_on_a_torus_with_an_odd_dimension_the_two_like_ones_vary_slowest(libtpu):
    """What is gathered over all chips is gathered along four of them, and then over a square."""
    found = make_layout(MeshConfig(), devices(topology("v5p:4x8x8")))
    (_, line), (_, square) = found.stages("embed")
    places = [device.coords for device in found.mesh.devices.flat]
    assert [places[i] for i in line[0]] == [[x, 0, 0] for x in range(4)]
    assert sorted(places[i] for i in square[0]) == [[0, y, z] for y in range(8) for z in range(8)]
