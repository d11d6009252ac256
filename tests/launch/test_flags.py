"""The flags of each platform are taken by what reads them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import LAUNCH, ROOT

from vllama2_jax.parallel.backends import compiler_options

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


@pytest.mark.skipif(
    bool([*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]), reason="TPUs are here"
)
def test_a_machine_whose_tpus_do_not_start_is_an_error_and_no_slow_run_on_its_cpu():
    done = under("tpu", sys.executable, "-c", "import jax; jax.devices()", code=1)
    assert "Unable to initialize backend 'tpu'" in done.stderr


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_compiles_under_the_flags_of_tpus(name):
    assert int(under("tpu", *python(_COMPILE.format(name=name))).stdout) > 0


@needs_libtpu
def test_libtpu_would_refuse_a_flag_that_it_does_not_know():
    flags = {"LIBTPU_INIT_ARGS": "--xla_tpu_no_such_flag=true"}
    done = under("tpu", *python(_COMPILE.format(name="v5p:2x2x1")), code=1, **flags)
    assert done.returncode == 1 and not done.stdout  # it ends the process before anything compiles


def test_options_that_the_step_is_compiled_with_are_not_said_a_second_time():
    class Chip:
        platform = "tpu"

    options = compiler_options([Chip()])
    assert len(options) > 3
    said = "".join((LAUNCH / f"flags/{platform}.env").read_text() for platform in PLATFORMS)
    assert not [name for name in options if name in said]


def test_every_option_of_the_step_has_its_reason_above_it():
    text = (ROOT / "vllama2_jax/parallel/backends.py").read_text()
    lines = text.partition("_OVERLAP = {\n")[2].partition("\n}")[0].splitlines()
    options = [k for k, line in enumerate(lines) if not line.startswith("    # ")]
    assert len(options) > 3 and all(k and k - 1 not in options for k in options)


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
