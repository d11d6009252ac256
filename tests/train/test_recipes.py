"""Recipes: what they refuse, what they save, and that the same seed saves the same model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from vllama2_jax.checkpoints import load_model
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train import recipes
from vllama2_jax.train.initial import initial_params
from vllama2_jax.train.optimizer import OptimizerConfig


@pytest.fixture
def short(monkeypatch):
    """`tiny` with two steps a stage and few rows."""
    recipe = recipes.RECIPES["tiny"]
    stages = tuple(
        dataclasses.replace(stage, rows=2, optimizer=OptimizerConfig(1e-3, 2, 1))
        for stage in recipe.stages
    )
    monkeypatch.setitem(recipes.RECIPES, "short", dataclasses.replace(recipe, stages=stages))


def test_recipe_saves_a_model_that_loads_and_logs_every_step(short, tmp_path, capsys):
    folder = recipes.run("config:short", tmp_path / "run")
    params, card = load_model(folder, lambda card: abstract_params(card.config))
    assert card.config == ZOO["tiny"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage.task, step) for stage in recipes.RECIPES["short"].stages for step in (1, 2)
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "Parameters" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not empty"):
        recipes.run("short", tmp_path / "run")


def test_unknown_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown recipe 'tinny'; known: tiny"):
        recipes.run("tinny", tmp_path / "run")


def test_tiny_fits_the_package():
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(ZOO["tiny"]))]
    assert 1.5e6 < sum(sizes) and 2 * sum(sizes) < 8e6


def test_narrow_decoder_starts_with_matrices_that_keep_their_inputs_size():
    params = initial_params(ZOO["tiny"], 0)["decoder"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 160)).astype(np.float32)
    for name in ("gate", "up"):
        out = x @ params["layers"]["mlp"][name]["kernel"][0]
        assert float(out.std()) == pytest.approx(1.0, rel=0.05)
    assert float(params["embed_tokens"]["embedding"].std()) == pytest.approx(0.5, rel=1e-3)


def test_position_embeddings_start_wide():
    params = initial_params(ZOO["tiny"], 0)
    assert float(params["vision"]["position_embed"].std()) == pytest.approx(0.5, rel=1e-3)
