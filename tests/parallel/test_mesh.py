"""What a mesh may be, and what it refuses."""

import pytest
from jax.sharding import AbstractMesh, AxisType

from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.models.axes import Layout
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.rules import LAYOUTS, MESH_AXES
from vllama2_jax.parallel.topology import devices, topology


def layout(name="fsdp", **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Layout(mesh, LAYOUTS[name])


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


def test_a_mesh_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="mesh tensr=2: 'tensr=2' is not AXIS=SIZE"):
        resolve(["config:video_sft"], Shortcuts(mesh="tensr=2"))


def test_on_a_torus_with_an_odd_dimension_the_two_like_ones_vary_slowest(libtpu):
    """What is gathered over all chips is gathered along four of them, and then over a square."""
    found = make_layout(MeshConfig(), devices(topology("v5p:4x8x8")))
    (_, line), (_, square) = found.stages("embed")
    places = [device.coords for device in found.mesh.devices.flat]
    assert [places[i] for i in line[0]] == [[x, 0, 0] for x in range(4)]
    assert sorted(places[i] for i in square[0]) == [[0, y, z] for y in range(8) for z in range(8)]
