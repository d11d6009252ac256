"""A released checkpoint that is read part by part over eight devices is the one that lies there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllama2_jax.convert.export import export_huggingface

pytest.importorskip("torch")
from small_models import small_model

ROOT = Path(__file__).resolve().parents[2]
MESHES = ("fsdp+expert:expert=2,fsdp=4", "fsdp+tensor:tensor=2,fsdp=4")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `eight_devices.py` finds of a small Mixtral."""
    tokenizers, folder = (tmp_path_factory.mktemp(name) for name in ("tokenizers", "released"))
    params, card, files = small_model(tokenizers, "2-8x7B", "stc_connector", 1)
    export_huggingface(folder, params, card, files, dtype="float32")
    command = [sys.executable, "-m", "tests.convert.eight_devices", folder, *MESHES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_parameter_is_that_of_one_device_and_lies_where_the_layout_says(found, mesh):
    assert found[mesh]["differ"] == found[mesh]["astray"] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_holds_its_part_of_an_imported_model(found, mesh):
    assert 1 / 8 <= found[mesh]["share"] <= 0.25
