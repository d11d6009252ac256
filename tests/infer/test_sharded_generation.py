"""A model that is split over eight devices answers as it does on one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vllama2_jax.loading import load

ROOT = Path(__file__).resolve().parents[2]
# Of the parameters, what a device holds at most: norms and what does not divide lie on all.
MESHES = {"fsdp": 0.2, "fsdp+tensor:tensor=2,fsdp=-1": 0.2, "2d:fsdp=2,tensor=4": 0.25}


def printed_by(program, *arguments):
    """What a program of eight devices finds."""
    command = [sys.executable, "-m", f"tests.infer.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return printed_by("eight_devices", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_over_eight_devices_answers_as_on_one(found, mesh):
    assert found[mesh]["alone"] and found[mesh]["together"]
    assert found[mesh]["logits"] <= 1e-5


@pytest.mark.parametrize(("mesh", "share"), MESHES.items())
def test_a_device_holds_its_part_of_the_parameters(found, mesh, share):
    assert 1 / 8 <= found[mesh]["share"] <= share


def test_prompts_of_a_mixture_of_experts_need_not_divide_over_the_devices():
    errors = printed_by("mixtral_prefills", "fsdp", "fsdp+expert:expert=4,fsdp=2")
    assert len(errors) == 2 and {rows for one in errors.values() for rows in one} == {"1", "3"}
    assert max(max(one.values()) for one in errors.values()) <= 1e-5, errors


def test_a_mesh_that_the_devices_cannot_form_is_one_line():
    with pytest.raises(ValueError, match="a mesh of tensor 16 does not fit 1 devices"):
        load("tiny", mesh="fsdp+tensor:tensor=16,fsdp=1")
    with pytest.raises(ValueError, match="is not AXIS=SIZE"):
        load("tiny", mesh="fsdp:tensr=2")
    assert load("tiny", mesh="fsdp").generator.programs.layout.mesh.size == jax.device_count()
