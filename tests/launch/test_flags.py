"""The flags of each platform are taken, and processes find each other under them."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import LAUNCH, ROOT

from vllama2_jax.parallel.backends import compiler_options
from vllama2_jax.parallel.topology import topology

PLATFORMS = sorted(file.stem for file in (LAUNCH / "flags").glob("*.env"))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
# One program for 4 chips that are not here: libtpu reads LIBTPU_INIT_ARGS when it is loaded.
_COMPILE = """
import jax, jax.numpy as jnp
from vllama2_jax.parallel.backends import compiler_options
from vllama2_jax.parallel.topology import devices, topology
found = devices(topology("{name}"))
mesh = jax.sharding.Mesh(found, "x")
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=place)
step = jax.jit(lambda x: x @ x, compiler_options=compiler_options(found))
print(step.lower(x).compile().as_text().count("all-gather"))
"""


def under(platform, *command, code=0, **more):
    """Run a command as with_flags.sh does."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        ["bash", str(LAUNCH / "with_flags.sh"), platform, *command],
        env={**kept, "PYTHONPATH": str(ROOT), **more},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done


def python(code):
    """A program that runs on the CPU, whatever the flags say of platforms."""
    return sys.executable, "-c", f"import os; os.environ['JAX_PLATFORMS'] = 'cpu'\n{code}"


def test_xla_takes_the_flags_of_gpus_and_refuses_one_that_it_does_not_know():
    devices = python("import jax; print(len(jax.devices()), os.environ['XLA_FLAGS'])")
    said = under("gpu", *devices).stdout
    assert re.fullmatch(r"1 +--xla_gpu_enable_latency_hiding_scheduler=true\n", said)
    done = under("gpu", *devices, code=1, XLA_FLAGS="--xla_gpu_no_such_flag=true")
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=true" in done.stderr


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_compiles_under_the_flags_of_tpus(name):
    assert int(under("tpu", *python(_COMPILE.format(name=name))).stdout) > 0


@needs_libtpu
def test_libtpu_would_refuse_a_flag_that_it_does_not_know():
    flags = {"LIBTPU_INIT_ARGS": "--xla_tpu_no_such_flag=true"}
    under("tpu", *python(_COMPILE.format(name="v5p:2x2x1")), code=1, **flags)


def test_options_that_the_step_is_compiled_with_are_not_said_a_second_time():
    class Chip:
        platform = "tpu"

    options = compiler_options([Chip()])
    assert len(options) > 3
    said = "".join((LAUNCH / f"flags/{platform}.env").read_text() for platform in PLATFORMS)
    assert not [name for name in options if name in said]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_flag_has_its_reason_above_it(platform):
    lines = (LAUNCH / f"flags/{platform}.env").read_text().splitlines()
    settings = [k for k, line in enumerate(lines) if line and not line.startswith("#")]
    assert settings and all(lines[k - 1].startswith("# ") for k in settings)


def test_what_the_user_has_set_counts():
    show = ("bash", "-c", 'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION|$XLA_FLAGS|$NCCL_DEBUG"')
    mine = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "XLA_FLAGS": "--a=1", "NCCL_DEBUG": "INFO"}
    fraction, flags, debug = under("gpu", *show, **mine).stdout.strip().split("|")
    assert (fraction, debug) == ("0.5", "INFO") and flags.startswith("--a=1 --xla_gpu")


@pytest.mark.parametrize("arguments", [[], ["tpu"], ["abacus", "true"]])
def test_with_flags_says_how_it_is_used(arguments):
    done = subprocess.run(
        ["bash", str(LAUNCH / "with_flags.sh"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: with_flags.sh tpu|gpu COMMAND")


def test_processes_on_machines_of_a_slice_find_each_other_without_being_told(cloud, tmp_path):
    """What `tpu.sh run` starts sets no JAX_* variable but which platforms may be used."""
    (tmp_path / "chips/dev/vfio").mkdir(parents=True)
    (tmp_path / "chips/dev/vfio/0").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(__file__).with_name("pod_worker.py")
    cloud.run_is(
        f"cd {ROOT} && PYTHONPATH={ROOT} JAX_COORDINATOR_PORT={port} exec {sys.executable} "
        f"{program} ${{FAKE_WORKER##*-}} 2 {tmp_path}/chips"
    )
    place = ("--name=pod1", "--project=mine", "--zone=z", "--topology=v5p-16")
    cloud.run("tpu.sh", "create", *place)
    cloud.run("tpu.sh", "setup", "--name=pod1", "--commit=HEAD")
    cloud.run("tpu.sh", "run", "--name=pod1", "--", "vllama2", "train")
    logs = [cloud.run("tpu.sh", "logs", "--name=pod1", f"--worker={k}").stdout for k in (0, 1)]
    found = [json.loads(re.search(r"^\{.*\}$", log, re.MULTILINE)[0]) for log in logs]
    assert [(one["process"], one["processes"]) for one in found] == [(0, 2), (1, 2)]
    for one in found:  # the port is this test's, since both are on one machine
        assert one["variables"] == ["JAX_COORDINATOR_PORT", "JAX_PLATFORMS"]


def read_topology(name):
    """(accelerator type, slices, chips) of launch/lib/topology.sh, or its complaint."""
    code = (
        'source "$1/lib/common.sh"; source "$1/lib/topology.sh"; read_topology "$2"; '
        'echo "$ACCELERATOR $SLICES $CHIPS $RUNTIME"'
    )
    command = ["bash", "-euc", code, "tpu.sh", str(LAUNCH), name]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split() or done.stderr


SIZES = {
    "v4": [2**k for k in range(3, 14)] + [384, 768, 1536, 12288],
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
    assert f"no slice {generation}-2; known sizes" in read_topology(f"{generation}-2")


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
    ("name", "words"),
    [
        ("v9-8", "unknown topology 'v9-8'; TPUs that can be had: v4, v5e (v5litepod), v5p, v6e"),
        ("h100:8", "unknown topology 'h100:8'; TPUs that can be had"),
        ("v5p", "unknown topology 'v5p'; known: v5p-128, v5p:4x4x4, 2xv5p-128"),
        ("v5p-100", "no slice v5p-100; known sizes of v5p: 8:2x2x1 16:2x2x2"),
        ("v5p:3x3x3", "no slice v5p:3x3x3; known sizes of v5p"),
        ("0xv5p-8", "0xv5p-8: a size of 0"),
    ],
)
def test_a_name_that_means_nothing_is_one_line(name, words):
    (line,) = read_topology(name).splitlines()
    assert words in line


def scripts():
    found = [*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(found) >= 8
    return sorted(map(str, found))


def test_scripts_are_shellcheck_clean():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; make dev")
    for script in scripts():  # one by one, as they are run
        command = [program, "--external-sources", "--source-path=SCRIPTDIR", script]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", scripts(), ids=lambda script: Path(script).name)
def test_bash_reads_every_script(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
