"""Training runs by name. So far there is one, `tiny`: the model embedded in the package.

    vllama2 train --config tiny --out runs/tiny

A recipe is a list of stages; a stage is a task (a loss and its batches), rules that say what
trains, and an optimizer. `docs/tiny.md` tells how the recipe of `tiny` differs from the paper's.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from vllama2_jax.checkpoints import GenerationDefaults, ModelCard, save_model
from vllama2_jax.data.toybox_tokenizer import END_OF_TEXT, TURN_END, train_tokenizer
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import REFERENCE
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import Tokenizer, load_tokenizer, tokenizer_files
from vllama2_jax.train import schooling
from vllama2_jax.train.initial import initial_params
from vllama2_jax.train.loop import run_steps
from vllama2_jax.train.loss import batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.train.toybox_feed import TEMPLATE, ToyboxFeed
from vllama2_jax.train.trainable import Rule, assign_rules, combine, parameter_table, partition

TASKS = ("tower", "connector", "text", "clips")
_HEADS = "heads"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
      task: one of `TASKS`: "tower" and "connector" of `schooling.py`, conversations in words
        ("text"), or about clips.
      rules: what trains; the heads of `schooling.py` are parameters `heads/...`.
      optimizer: how.
      rows: of a batch.
      length: slots of a row of conversations.
    """

    task: str
    rules: tuple[Rule, ...]
    optimizer: OptimizerConfig
    rows: int
    length: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run from random parameters to a saved model.

    Attributes:
      config: the network.
      stages: one after the other.
    """

    config: VLlama2Config
    stages: tuple[Stage, ...]


def _adam(learning_rate: float, steps: int, warmup_steps: int) -> OptimizerConfig:
    return OptimizerConfig(learning_rate, steps, warmup_steps, b2=0.95, clip_norm=1.0)


def _only(*parts: str) -> tuple[Rule, ...]:
    return (*(Rule(f"{part}/.*", "train") for part in parts), Rule(".*", "freeze"))


RECIPES = {
    "tiny": Recipe(
        ZOO["tiny"],
        (
            Stage("tower", _only("vision", _HEADS), _adam(2e-3, 1200, 50), rows=32),
            Stage("connector", _only("connector", _HEADS), _adam(3e-3, 1200, 30), rows=24),
            Stage("text", _only("decoder"), _adam(2e-3, 900, 30), rows=16, length=192),
            Stage(
                "clips", _only("connector", "decoder"), _adam(1.5e-3, 1500, 30), rows=24, length=168
            ),
        ),
    )
}


def run(name: str, out: str | Path, seed: int = 0) -> Path:
    """Train the recipe `name` and save its model.

    Args:
      name: of `RECIPES`; "config:tiny" is "tiny", too.
      out: a new directory: `metrics.jsonl`, `tokenizer/`, and the model in `model/`.
      seed: of parameters and data.

    Returns:
      The saved model's directory.

    Raises:
      ValueError: for an unknown recipe, or a directory that holds something.
    """
    name = name.removeprefix("config:")
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; choose another directory or remove it")
    (out / "tokenizer").mkdir(parents=True)
    train_tokenizer(out / "tokenizer" / "tokenizer.model")
    tokenizer = load_tokenizer(out / "tokenizer")
    start = time.perf_counter()
    with (out / "metrics.jsonl").open("w") as lines:

        def log(record: dict) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        params = train(RECIPES[name], tokenizer, seed, log)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
    model = out / "model"
    save_model(
        model,
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
        model_card(RECIPES[name].config, tokenizer),
        tokenizer_files(out / "tokenizer"),
    )
    return model


def train(recipe: Recipe, tokenizer: Tokenizer, seed: int, log: Callable[[dict], None]) -> dict:
    """Run all stages of a recipe; returns the parameters, a nested dict of float32 arrays."""
    params = initial_params(recipe.config, seed)
    console = Console()
    for stage in recipe.stages:
        params = {**params, **new_heads(recipe.config, stage.task, seed)}
        assigned = assign_rules(stage.rules, params)
        console.print(f"Stage {stage.task}", parameter_table(params, assigned))
        trainable, frozen = partition(params, assigned)
        optimizer = make_optimizer(stage.optimizer, assigned)
        loss, batches = make_task(recipe.config, stage, tokenizer, seed)
        state = run_steps(
            make_step(loss, optimizer),
            init_state(trainable, optimizer),
            frozen,
            batches,
            label=stage.task,
            num_steps=stage.optimizer.steps,
            log=lambda record, task=stage.task: log({"stage": task, **record}),
        )
        params = combine(state.trainable, frozen)
        params.pop(_HEADS, None)
    return params


def new_heads(config: VLlama2Config, task: str, seed: int) -> dict:
    """{"heads": ...} for the tasks of `schooling.py`, {} for the others."""
    if task == "tower":
        return {_HEADS: schooling.make_heads(schooling.PATCH_HEADS, config.vision.width, seed)}
    if task == "connector":
        return {_HEADS: schooling.make_heads(schooling.CLIP_HEADS, config.connector.out_dim, seed)}
    return {}


def make_task(
    config: VLlama2Config, stage: Stage, tokenizer: Tokenizer, seed: int
) -> tuple[Callable, Iterator]:
    """The loss of a stage, as `make_step` takes it, and its endless batches."""
    if stage.task == "tower":
        batches = schooling.picture_batches(config, stage.rows, seed)
        return functools.partial(schooling.tower_loss, config), batches
    if stage.task == "connector":
        batches = schooling.labelled_clips(config, stage.rows, seed)
        return functools.partial(schooling.connector_loss, config), batches
    if stage.task not in TASKS:
        raise ValueError(f"unknown task {stage.task!r}; known: {', '.join(TASKS)}")
    feed = ToyboxFeed(
        tokenizer=tokenizer,
        media_tokens=config.num_media_tokens(),
        image_size=config.vision.image_size,
        length=stage.length,
        rows=stage.rows,
        seed=seed,
    )
    batches = feed.text() if stage.task == "text" else feed.clips()
    return functools.partial(batch_loss, VLlama2(config)), batches


def model_card(config: VLlama2Config, tokenizer: Tokenizer) -> ModelCard:
    """What a saved model of these recipes says about itself."""
    vision = config.vision
    return ModelCard(
        config=config,
        image=ImageSpec(vision.image_size, "stretch", vision.image_mean, vision.image_std),
        preset=REFERENCE,
        generation=GenerationDefaults(
            stop_ids=tuple(tokenizer.encode(text)[0] for text in (TURN_END, END_OF_TEXT))
        ),
        template=TEMPLATE,
        tokenizer=tokenizer.fingerprint(),
    )
