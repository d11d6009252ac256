"""What is told of a machine's accelerators before JAX looks for them."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import pytest

from vllama2_jax import accelerators


@pytest.mark.parametrize(
    ("packages", "chips", "given", "expected"),
    [
        ({"libtpu"}, (), None, "cpu"),
        ({"libtpu"}, ("vfio/0",), None, None),
        ({"libtpu"}, ("accel0",), None, None),
        ({"libtpu", "jax_cuda12"}, (), None, None),
        (set(), (), None, None),
        ({"libtpu"}, (), "cuda", "cuda"),
    ],
)
def test_a_compiler_for_tpus_alone_does_not_make_jax_look_for_one(
    monkeypatch, tmp_path, packages, chips, given, expected
):
    for chip in chips:
        (tmp_path / "dev" / chip).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / chip).touch()
    monkeypatch.setattr(accelerators, "Path", lambda place: Path(f"{tmp_path}{place}"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: packages - {"libtpu"})
    monkeypatch.delenv("JAX_PLATFORMS")
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    accelerators.leave_out_tpus_that_are_not_there()
    assert os.environ.get("JAX_PLATFORMS") == expected
