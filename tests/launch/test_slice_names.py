"""launch/lib/topology.sh reads names of slices as vllama2_jax/parallel/topology.py does."""

import subprocess

import pytest
from fake_cloud import LAUNCH

from vllama2_jax.parallel.topology import topology


def read_topology(name, what="$ACCELERATOR $SLICES $CHIPS $RUNTIME"):
    """What launch/lib/topology.sh makes of a name, or its complaint."""
    code = (
        f'source "$1/lib/common.sh"; source "$1/lib/topology.sh"; read_topology "$2"; echo "{what}"'
    )
    command = ["bash", "-euc", code, "tpu.sh", str(LAUNCH), name]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split() or done.stderr


SIZES = {
    "v4": [2**k for k in range(3, 14)] + [384, 768, 1536],
    "v5p": [2**k for k in range(3, 14)] + [384, 768, 1536, 12288],
    "v5e": [2**k for k in range(9) if k != 1],
    "v6e": [2**k for k in range(9) if k != 1],
}


@pytest.mark.parametrize("generation", list(SIZES))
def test_names_mean_the_slices_that_plan_plans_for(generation):
    google = {"v5e": "v5litepod"}.get(generation, generation)
    for size in SIZES[generation]:
        wanted = topology(f"{generation}-{size}")
        for name in (f"{generation}-{size}", wanted.name):
            kind, slices, chips, _ = read_topology(name)
            assert (kind, slices, int(chips)) == (f"{google}-{size}", "1", wanted.num_chips)
    with pytest.raises(ValueError):
        topology(f"{generation}-2")
    assert f"no slice {generation}-2; there are {generation}-" in read_topology(f"{generation}-2")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("2xv5p-128", ["v5p-128", "2", "128", "v2-alpha-tpuv5"]),
        ("3xv5e:4x8", ["v5litepod-32", "3", "96", "v2-alpha-tpuv5-lite"]),
        ("v5litepod-256", ["v5litepod-256", "1", "256", "v2-alpha-tpuv5-lite"]),
        ("Trillium-8", ["v6e-8", "1", "8", "v2-alpha-tpuv6e"]),
        ("v4-64", ["v4-64", "1", "32", "tpu-ubuntu2204-base"]),
    ],
)
def test_a_name_says_type_slices_chips_and_software(name, found):
    assert read_topology(name) == found
    wanted = topology(name)
    assert [str(wanted.num_slices), str(wanted.num_chips)] == found[1:3]


@pytest.mark.parametrize(
    ("name", "machines"),
    [
        *[("v4-8", 1), ("v5p-16", 2), ("v5p-12288", 1536), ("2xv5p-128", 32)],
        *[("v5e-1", 1), ("v5e-4", 1), ("v5e-8", 1), ("v5e-16", 4), ("2xv6e-8", 2), ("v6e-256", 64)],
    ],
)
def test_a_name_says_how_many_machines_have_to_answer(name, machines):
    assert read_topology(name, "$MACHINES") == [str(machines)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9-8", "unknown topology 'v9-8'; TPUs that can be had: v4, v5e (v5litepod), v5p, v6e"),
        ("h100:8", "unknown topology 'h100:8'; TPUs that can be had"),
        ("v5p", "unknown topology 'v5p'; known: v5p-128, v5p:4x4x4, 2xv5p-128"),
        ("v5p-100", "no slice v5p-100; there are v5p-8, v5p-16, v5p-32"),
        ("v4-12288", "no slice v4-12288; there are v4-8"),  # v4 ends at 4,096 chips
        ("v5p:3x3x3", "no slice v5p:3x3x3; there are v5p-8"),
        ("0xv5p-8", "0xv5p-8: a size of 0"),
    ],
)
def test_a_name_that_means_nothing_is_one_line(name, words):
    (line,) = read_topology(name).splitlines()
    assert words in line
