"""A step laid out over eight devices gives the numbers of one device, in every layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One that splits along every axis for each network; the others take as long again.
SOON = (
    "mixtral, fsdp 8",
    "mixtral, fsdp 2, expert 4",
    "mixtral, fsdp 4, tensor 2",
    "qwen2, fsdp 8",
    "qwen2, fsdp 2, sequence 2, tensor 2",
)
LATER = (
    "mixtral, data 2, fsdp 4",
    "mixtral, fsdp 4, sequence 2",
    "mixtral, fsdp 2, sequence 2, tensor 2",
    "mixtral, fsdp 4, sequence 2, half the rows",
    "mixtral, fsdp 4, two slices",
    "mixtral, fsdp 2, expert 4, all to all",
    "qwen2, data 2, fsdp 4",
    "qwen2, fsdp 4, tensor 2",
    "qwen2, fsdp 4, sequence 2",
)


def differences(cases):
    command = [sys.executable, "-m", "tests.parallel.eight_devices", *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def soon():
    return differences(SOON)


def check(found):
    assert found["loss"] <= 1e-5
    assert max(found["gradients"].values()) <= 1e-4, found["gradients"]
    assert max(found["parameters"].values()) <= 1e-4, found["parameters"]


@pytest.mark.parametrize("case", SOON)
def test_loss_gradients_and_steps_are_those_of_one_device(soon, case):
    check(soon[case])


@pytest.mark.slow
def test_loss_gradients_and_steps_are_those_of_one_device_in_other_layouts():
    found = differences(LATER)
    assert set(found) == set(LATER)
    for case in LATER:
        check(found[case])
