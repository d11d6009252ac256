"""A model's name leads to its own files and to no others."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax import weights
from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.media.preset import PAPER, PAPER_SOUND, REFERENCE
from vllama2_jax.models.stacking import unstack_layers
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import TINY_DECODER, ZOO


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Repositories asked for, in a directory without files; nothing is on the network."""
    monkeypatch.chdir(tmp_path)
    names = []

    def resolve(name, near=None):
        names.append(str(name))
        return tmp_path

    monkeypatch.setattr(weights, "resolve", resolve)
    return names


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B"),
        ("VideoLLaMA2-7B", "DAMO-NLP-SG/VideoLLaMA2-7B"),
        ("VideoLLaMA2-7B-Base", "DAMO-NLP-SG/VideoLLaMA2-7B-Base"),
        ("2-7B-Base", "DAMO-NLP-SG/VideoLLaMA2-7B-Base"),
        ("2-7B-16F-Base", "DAMO-NLP-SG/VideoLLaMA2-7B-16F-Base"),
        ("2.1-7B-16F", "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F"),
        ("VideoLLaMA2.1-7B-16F-Base", "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F-Base"),
        ("owner/VideoLLaMA2-7B", "owner/VideoLLaMA2-7B"),
        ("owner/tiny", "owner/tiny"),
    ],
)
def test_a_published_name_is_its_own_repository(fetched, name, repository):
    weights.find(name)
    assert fetched == [repository]


@pytest.mark.parametrize(
    "name",
    [
        "tiny-Base",
        "VideoLLaMAtiny",
        "VideoLLaMA2tiny",
        "VideoLLaMA-tiny",
        "VideoLLaMA2-7B-Base-Base",
        "2-7b",
        "2-7B-AV",
    ],
)
def test_other_names_are_never_fetched(fetched, name):
    with pytest.raises(CheckpointError) as caught:
        weights.find(name)
    assert fetched == [] and "\n" not in str(caught.value)


def test_tiny_is_the_packaged_one_even_beside_a_directory_of_that_name(fetched):
    Path("tiny").mkdir()
    assert weights.find("tiny") == Path(vl.__file__).parent / "assets" / "tiny"
    assert fetched == []


def test_a_directory_wins_over_a_published_name(fetched):
    Path("2-7B").mkdir()
    weights.find("2-7B")
    assert fetched == ["2-7B"]


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
def test_layers_come_apart_one_array_at_a_time(experts, split):
    decoder = dataclasses.replace(
        TINY_DECODER, num_layers=2, num_experts=experts, family="mixtral" if experts else "qwen2"
    )
    shapes = abstract_params(dataclasses.replace(ZOO["tiny"], decoder=decoder))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    whole = {**params, "decoder": unstack_layers(params["decoder"], split_experts=split)}
    flat = flatten(params)
    apart = weights.unstack(flat, split)
    assert not flat
    wanted, found = flatten(whole), flatten(apart)
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("dtype", ["int8", "float99", "float64", np.int32])
def test_weights_are_never_cast_to_what_cannot_hold_them(dtype):
    with pytest.raises(ValueError, match="is not supported; known: float32"):
        vl.load("tiny", dtype=dtype)


def test_the_preset_is_the_callers_or_the_checkpoints():
    own = dataclasses.replace(REFERENCE, name="toybox", sound=PAPER_SOUND)
    assert vl.load("tiny").card.preset == own
    assert vl.load("tiny", preset="paper").card.preset == PAPER
    with pytest.raises(ValueError, match="unknown preset 'papyrus'"):
        vl.load("tiny", preset="papyrus")
    with pytest.raises(ValueError, match="hears 16 s of a video, the model takes 2; use preset"):
        vl.load("tiny", preset="reference")


def test_parameters_lie_on_the_meshs_device():
    (device,) = jax.devices()[-1:]
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    model = vl.load("tiny", mesh=mesh)
    leaves = jax.tree.leaves(model.generator.params)
    assert all(leaf.devices() == {device} for leaf in leaves)


def test_a_mesh_of_several_devices_is_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    with pytest.raises(ValueError, match="the mesh has 2 devices"):
        vl.load("tiny", mesh=mesh)
