"""Backends by device, not by the default one."""

import dataclasses
import importlib.util
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.miniature import MINIATURE
from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.infer.model import Model
from vllama2_jax.infer.programs import Programs
from vllama2_jax.loading import load
from vllama2_jax.parallel.backends import moe_backend, network_options
from vllama2_jax.parallel.mesh import abstract_layout, parse_mesh
from vllama2_jax.train.run_step import run_network


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


EXPERTS = dataclasses.replace(
    MINIATURE, decoder=dataclasses.replace(MINIATURE.decoder, family="mixtral", num_experts=4)
)
KERNELS = {"tpu": ("splash", "megablox"), "cpu": ("xla", "blocks")}


@pytest.mark.parametrize("platform", KERNELS)
def test_training_validation_and_inference_take_the_kernels_of_the_one_device_that_runs_them(
    platform,
):
    config = build(resolve(["config:tiny_video_sft"], Shortcuts()))
    there = [devices(platform).flat[0]]
    for network in (
        run_network(config, EXPERTS, devices=there),
        Programs(EXPERTS, jnp.float32, devices=there).network,
    ):
        assert (network.attention_backend, network.moe_backend) == KERNELS[platform]


def test_a_model_runs_where_its_parameters_lie_and_not_on_the_default_device(monkeypatch):
    tiny = load("tiny")
    monkeypatch.setattr(jax, "devices", lambda *_: list(devices("tpu").flat))
    moved = Model(tiny.generator.params, tiny.card, tiny.tokenizer, jnp.float32)
    assert moved.generator.programs.network.attention_backend == "xla"


def test_the_shape_of_a_mesh_chooses_no_kernel_and_caches_have_their_places_in_it():
    layout = abstract_layout(parse_mesh("fsdp+tensor:tensor=2,fsdp=2"), 4)
    assert network_options(EXPERTS, layout) == {"expert_exchange": "ring"}
    cache = Programs(MINIATURE, jnp.float32, layout=layout).abstract_cache(8, 64)
    assert cache.positions.sharding.spec == PartitionSpec("fsdp", None)


def test_how_tokens_travel_is_the_meshs_to_say():
    layout = abstract_layout(parse_mesh("fsdp+expert:expert=4,expert_exchange=all_to_all"), 8)
    config = build(resolve(["config:tiny_video_sft"], Shortcuts()))
    for network in (
        run_network(config, EXPERTS, layout),
        Programs(EXPERTS, jnp.float32, layout=layout).network,
    ):
        assert network.expert_exchange == "all_to_all"
