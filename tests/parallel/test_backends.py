"""Backends by device, not by the default one."""

import importlib.util
import types
import warnings

import numpy as np
import pytest

from vllama2_jax.parallel.backends import moe_backend


def devices(platform):
    return np.array([types.SimpleNamespace(platform=platform)] * 4, object).reshape(2, 2)


@pytest.mark.parametrize(
    "platform, installed, backend",
    [("tpu", True, "megablox"), ("cpu", True, "blocks"), ("gpu", True, "tokamax")],
)
def test_experts_multiply_by_the_kernel_of_their_platform(
    monkeypatch, platform, installed, backend
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moe_backend(devices(platform)) == backend
        assert moe_backend(list(devices(platform).flat)) == backend


def test_gpus_without_tokamax_are_told_what_it_costs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="multiplies every token by every expert; pip install"):
        assert moe_backend(devices("gpu")) == "ragged_dot"
