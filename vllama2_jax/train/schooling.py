"""Give a small model the past that the published parts come with, from random parameters.

    python -m vllama2_jax.train.schooling --out runs/tiny_start
    python -m vllama2_jax.train.schooling --hearing runs/tiny_video_sft --out runs/tiny_ears

The published towers come trained on captioned pictures and labelled sounds, the published language
models have read the internet. At the size of `tiny` neither is so: behind a decoder, towers and
connectors learn slowly. So each first learns by itself, towers and connectors behind heads of their
own (`heads.py`), and the decoder from scenes told in words, with questions about them. What comes
out is a saved model that sees, with which `configs/tiny_video_pretrain.py` begins; one that has
learnt to see is then given ears, with which `configs/tiny_audio_pretrain.py` begins.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optax

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults, ModelCard, save_model
from vllama2_jax.data.toybox.labels import labelled_clips, labelled_sounds, picture_batches
from vllama2_jax.data.toybox.tokenizer import END_OF_TEXT, TURN_END, train_tokenizer
from vllama2_jax.media.fbank import FRAME_SECONDS
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import PAPER_SOUND, REFERENCE
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.models.zoo import model_config
from vllama2_jax.text import Tokenizer, load_tokenizer, tokenizer_files
from vllama2_jax.train.config import DataConfig, ToyboxConfig
from vllama2_jax.train.feeding import make_feeding
from vllama2_jax.train.heads import HEADS_OF, connector_loss, make_heads, sound_loss, tower_loss
from vllama2_jax.train.loop import run_steps
from vllama2_jax.train.loss import batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.start import random_parts
from vllama2_jax.train.step import TrainState, init_state, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition
from vllama2_jax.weights import find, read

_HEADS = "heads"
_TAUGHT = {"audio": ("audio", "audio_connector")}  # the others are parts by themselves
_TEMPLATE = "chatml"
_READING = DataConfig(
    sources=(ToyboxConfig("text", records=30_000, kind="text", media="all"),),
    max_length=192,
    buckets=(192,),
    packing=True,
    workers=0,
)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one part of the network learns by itself.

    Attributes:
      part: "vision", "connector", "audio" (with its connector) or "decoder"; it and its heads
        train, the rest is frozen.
      steps: how many.
      rows: of a batch.
      optimizer: how.
    """

    part: str
    steps: int
    rows: int
    optimizer: OptimizerConfig


def _lesson(part, learning_rate, warmup_ratio, steps, rows) -> Lesson:
    optimizer = OptimizerConfig(learning_rate, warmup_ratio, b2=0.95, clip_norm=1.0)
    return Lesson(part, steps, rows, optimizer)


SEEING = (
    _lesson("vision", 2e-3, 0.04, steps=1200, rows=32),
    _lesson("connector", 3e-3, 0.025, steps=1500, rows=24),
    _lesson("decoder", 2e-3, 0.03, steps=850, rows=16),
)
HEARING = (_lesson("audio", 2e-3, 0.04, steps=1100, rows=32),)


def school(
    config: VLlama2Config,
    out: str | Path,
    lessons: Sequence[Lesson] = SEEING,
    seed: int = 0,
    start: str | Path | None = None,
) -> None:
    """Make a model, teach it, and save it with float32 arrays.

    Args:
      config: the network.
      out: a new directory for the model.
      lessons: one after the other.
      seed: of parameters and data.
      start: a model to go on from, whose tokenizer is kept; parts that it lacks are new.

    Raises:
      CheckpointError: if `out` holds something, or `start` cannot be read or is another network.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not empty; choose another or remove it")
    with tempfile.TemporaryDirectory() as folder:
        if start is None:
            params, words = {}, Path(folder)
            train_tokenizer(words / "tokenizer.model")
        else:
            params, words = _begin_with(start, config)
        tokenizer = load_tokenizer(words)
        new = [part for part in config.parts if part not in params]
        params |= random_parts(config, new, seed, None, narrow=True)
        for lesson in lessons:
            begin = time.perf_counter()
            params, losses = teach(lesson, params, model_card(config, tokenizer), tokenizer, seed)
            seconds = time.perf_counter() - begin
            print(
                f"{lesson.part}: {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
                f"{seconds:.0f} s"
            )
        save_model(out, params, model_card(config, tokenizer), tokenizer_files(words))


def _begin_with(start: str | Path, config: VLlama2Config) -> tuple[dict, Path]:
    """Parameters of a model that `config` describes, or some parts of it, and its tokenizer."""
    params, card, tokenizer = read(find(str(start)), "float32", scan_layers=True)
    others = {part: None for part in config.parts if part not in card.config.parts}
    if card.config != dataclasses.replace(config, **others) or not others:
        raise CheckpointError(
            f"{start}: is not {config.name} without what it is to be given; make one with "
            "`make tiny`"
        )
    return params, tokenizer


def teach(
    lesson: Lesson, params: dict, card: ModelCard, tokenizer: Tokenizer, seed: int
) -> tuple[dict, list[float]]:
    """Train one part.

    Args:
      lesson: which part, and how.
      params: of the network, a nested dict of float32 arrays.
      card: of the model.
      tokenizer: of the model.
      seed: of heads and data.

    Returns:
      The parameters, and the loss of every step.
    """
    state, frozen, optimizer = begin_lesson(lesson, params, card.config, seed)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        loss, batches = make_task(lesson, card, tokenizer, seed, folder)
        state = run_steps(
            make_step(loss, optimizer),
            state,
            frozen,
            batches,
            label=lesson.part,
            num_steps=lesson.steps,
            log=lambda record: losses.append(record["loss"]),
        )
    params = combine(state.trainable, frozen)
    params.pop(_HEADS, None)
    return params, losses


def begin_lesson(
    lesson: Lesson, params: dict, config: VLlama2Config, seed: int
) -> tuple[TrainState, dict, optax.GradientTransformation]:
    """What trains, new heads included, what is frozen, and the optimizer (see `teach`)."""
    heads = HEADS_OF[lesson.part]
    if heads:
        width = config.vision.width if lesson.part == "vision" else config.connector.out_dim
        params = {**params, _HEADS: make_heads(heads, width, seed)}
    taught = "|".join((*_TAUGHT.get(lesson.part, (lesson.part,)), *([_HEADS] if heads else ())))
    assigned = assign_rules((Rule(f"({taught})/.*", "train"), Rule(".*", "freeze")), params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(lesson.optimizer, lesson.steps, assigned)
    return init_state(trainable, optimizer), frozen, optimizer


def make_task(
    lesson: Lesson, card: ModelCard, tokenizer: Tokenizer, seed: int, folder: str | Path
) -> tuple[Callable, Iterator]:
    """The loss of a lesson, as `make_step` takes it, and its batches; `folder` keeps an index."""
    config, size = card.config, card.config.vision.image_size
    if lesson.part == "vision":
        batches = picture_batches(size, config.vision.grid, lesson.rows, seed)
        return functools.partial(tower_loss, config), batches
    if lesson.part == "connector":
        return functools.partial(connector_loss, config), labelled_clips(size, lesson.rows, seed)
    if lesson.part == "audio":
        tower = config.audio
        steps = tower.num_frames // tower.patch_size
        along = steps, tower.patch_size * FRAME_SECONDS
        batches = labelled_sounds(tower.seconds, *along, lesson.rows, seed)
        return functools.partial(sound_loss, config), batches
    feeding = make_feeding(
        _READING,
        card,
        tokenizer,
        rows=lesson.rows,
        seed=seed,
        index_folder=folder,
        steps=lesson.steps,
    )
    return functools.partial(batch_loss, VLlama2(config)), feeding.batches(0)


def model_card(config: VLlama2Config, tokenizer: Tokenizer) -> ModelCard:
    """What the saved model says about itself."""
    vision = config.vision
    return ModelCard(
        config=config,
        image=ImageSpec(vision.image_size, "stretch", vision.image_mean, vision.image_std),
        preset=dataclasses.replace(REFERENCE, name="toybox", sound=PAPER_SOUND),
        generation=GenerationDefaults(
            stop_ids=tuple(tokenizer.encode(text)[0] for text in (TURN_END, END_OF_TEXT))
        ),
        template=_TEMPLATE,
        tokenizer=tokenizer.fingerprint(),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """School the zoo's `tiny`."""
    parser = argparse.ArgumentParser(description="Make the model that `tiny` begins with.")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--hearing", metavar="MODEL", help="one that sees, to learn to hear; else a new one"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tiny = model_config("tiny")
    if options.hearing:
        school(tiny, options.out, HEARING, options.seed, options.hearing)
    else:
        seeing = dataclasses.replace(tiny, audio=None, audio_connector=None)
        school(seeing, options.out, SEEING, options.seed)


if __name__ == "__main__":
    main()
