"""Names of topologies, and the devices that libtpu describes for them."""

import importlib.metadata
import importlib.util
import math

import pytest

from vllama2_jax.parallel.chips import CHIPS
from vllama2_jax.parallel.topology import Topology, devices, topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.mark.parametrize(
    ("name", "shaped", "chips"),
    [
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v4-128", "v4:4x4x4", 64),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V6E-256", "v6e:16x16", 256),
        ("2xv5p-128", "2xv5p:4x4x4", 128),
        ("3xv5e:4x8", "3xv5e:4x8", 96),
        ("h100:8", "h100:8", 8),
        ("h200:8x4", "h200:8x4", 32),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_names_mean_the_slices_that_the_documentation_says(name, shaped, chips):
    found = topology(name)
    assert found.name == shaped
    assert found.num_chips == chips
    assert topology(shaped) == found


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:2x2x1", (False, False, False)),
        ("v5p:2x4x4", (False, False, False)),  # half a cube: no optical switch closes it
        ("v5p:4x4x8", (True, True, True)),
        ("v5e:8x8", (False, False)),
        ("v5e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
    ],
)
def test_a_torus_is_closed_in_whole_cubes_and_over_the_width_of_a_pod(name, rings):
    assert topology(name).rings == rings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9-8", "unknown topology 'v9-8'; known: v5p:4x4x4, v5p-128, .* of v4, v5p, v5e, v6e,"),
        ("v5p", "unknown topology 'v5p'"),
        ("v5p-100", "no default shape for v5p-100; known: v5p-8, .* or name it, v5p:4x4x4"),
        ("v5e:4x4x4", "v5e:4x4x4: a slice of v5e has 2 dimensions"),
        ("0xv5e-4", "a size of 0"),
        ("v5p:3x5x7", "no such slice .*; there are 2x2x1, .*, 2x4x4, and multiples of 4x4x4"),
        ("v5p:4x4x6", "no such slice of v5p"),
        ("v4-12288", "no default shape for v4-12288; known: v4-8, .*, v4-8192, or name it"),
        ("v4:16x16x24", "the largest slice of v4 has 4,096 chips"),
        ("v5e:100x3", "no such slice of v5e can be had; there are 1x1, .*, 16x16$"),
        ("h100-8", r"h100-8: write it as h100:8 \(one node\) or h100:8x4"),
        ("cpu:2x4", "cpu:2x4: write it as cpu:8"),
    ],
)
def test_a_name_that_means_nothing_is_one_clear_line(name, words):
    with pytest.raises(ValueError, match=words) as error:
        topology(name)
    assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:4x4x4", "2xv5p:2x2x1", "v5e:1x1", "v6e-256"])
def test_libtpu_describes_every_chip_of_a_slice_and_says_nothing(name, capfd):
    wanted = topology(name)
    found = devices(wanted)
    places = {(getattr(d, "slice_index", 0), *d.coords[: len(wanted.shape)]) for d in found}
    assert len(places) == len(found) == wanted.num_chips
    assert math.prod(max(axis) + 1 for axis in zip(*places, strict=True)) == wanted.num_chips
    assert {d.device_kind for d in found} == {wanted.chip.device_kind}
    assert capfd.readouterr() == ("", "")


@needs_libtpu
def test_a_slice_that_cannot_be_is_libtpus_word_in_one_line():
    with pytest.raises(
        ValueError, match=r"libtpu knows no slice v5p:3x2x1: .*not divisible"
    ) as error:
        devices(Topology(CHIPS["v5p"], (3, 2, 1)))
    assert "\n" not in str(error.value)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu.*pip install 'vllama2_jax\[tpu\]'"):
        devices(topology("v5p-8"))


def test_another_libtpu_than_jax_pins_is_refused(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0.99" if name == "libtpu" else version(name)
    )
    with pytest.raises(ValueError, match=r"jax [\d.]+ wants libtpu 0\.0\.\d+, not 0\.0\.99; pip"):
        devices(topology("v5p-8"))


def test_more_simulated_devices_than_there_are_name_the_flag():
    with pytest.raises(ValueError, match="XLA_FLAGS=--xla_force_host_platform_device_count=4096"):
        devices(topology("cpu:4096"))


def test_gpus_that_are_not_here_cannot_be_compiled_for():
    with pytest.raises(ValueError, match="h100:8: JAX sees 0 such devices here; estimate"):
        devices(topology("h100:8"))


@needs_libtpu
def test_a_flag_that_libtpu_does_not_know_is_named(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_no_such_flag=true")
    with pytest.raises(ValueError, match=r"Unknown .* flag 'xla_tpu_no_such_flag'.*unset"):
        devices(topology("v5e:2x2"))
