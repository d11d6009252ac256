"""What a run would do, said without reading a weight or taking a step."""

import collections
import sys
import tempfile
from typing import NamedTuple

import jax
import yaml
from rich.console import Console
from rich.table import Table

from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.config import TrainConfig, to_json
from vllama2_jax.train.feeding import Feeding, feeding_of
from vllama2_jax.train.lora import adapt
from vllama2_jax.train.report import StepReport
from vllama2_jax.train.start import describe_start, trained_card
from vllama2_jax.train.trainable import assign_rules, parameter_table, partition

_SAMPLED = 2000  # steps that the mean is over, of a longer run


class Bucket(NamedTuple):
    """Steps of one shape.

    Attributes:
      length: slots of a row.
      steps: how many of those looked at.
      records, tokens: of them together; tokens are slots that are not padding.
    """

    length: int
    steps: int
    records: int
    tokens: int


def dry_run(config: TrainConfig, console: Console | None = None) -> None:
    """Print the configuration, what trains, the shapes of batches, tokens and FLOPs.

    Args:
      config: of the run.
      console: where to; stdout by default.

    Raises:
      ValueError: for what `run` would refuse before it reads weights.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    card, folder = describe_start(config.start)
    tokenizer = load_tokenizer(folder)
    card = trained_card(card, config, tokenizer)
    console.print(yaml.safe_dump(to_json(config), sort_keys=False), markup=False, highlight=False)
    params = abstract_params(card.config)
    params = jax.eval_shape(lambda p: adapt(p, config.rules, jax.random.key(0)), params)
    assigned = assign_rules(config.rules, params)
    console.print(parameter_table(params, assigned))
    trainable, _ = partition(params, assigned)
    with tempfile.TemporaryDirectory() as index:
        feeding = feeding_of(config, card, tokenizer, index)
    report = StepReport(config, card.config, feeding, assigned, trainable)
    buckets, steps = look_at(feeding), len(feeding.schedule)
    console.print(_shapes(config, card, feeding, buckets, report))
    looked = sum(bucket.steps for bucket in buckets)
    tokens = sum(bucket.tokens for bucket in buckets) / looked
    slots = sum(bucket.steps * bucket.length for bucket in buckets) * config.rows / looked
    flops = sum(report.model_flops(b.length) * b.steps for b in buckets) / looked
    console.print(
        f"{steps:,} steps; per step {tokens:,.0f} tokens in {slots:,.0f} slots "
        f"({tokens / slots:.0%} filled) and {flops:.3g} model FLOPs; "
        f"the whole run: {steps * tokens:.3g} tokens, {steps * flops:.3g} model FLOPs"
        + (f" (means of the first {looked:,} steps)" if looked < steps else ""),
        highlight=False,
    )


def look_at(feeding: Feeding) -> list[Bucket]:
    """The steps of a run, by their rows' length; of a long run the first ones."""
    found: dict[int, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for number in range(min(len(feeding.schedule), _SAMPLED)):
        step = feeding.schedule[number]
        counts = found[step.length]
        counts[0] += 1
        for row in step.rows:
            counts[1] += len(row)
            counts[2] += sum(feeding.schedule.slots(*place) for place in row)
    return [Bucket(length, *counts) for length, counts in sorted(found.items())]


def _shapes(config: TrainConfig, card, feeding: Feeding, buckets, report: StepReport) -> Table:
    """One line per shape: every array of the batch, how often, what it costs."""
    clips, sounds = feeding.schedule.max_clips, feeding.schedule.max_sounds
    size, tower = card.image.size, card.config.audio
    table = Table(title="Batches", caption="each line is one compiled program")
    for name in ("tokens", "frames", "clips", *(["audio"] if sounds else [])):
        table.add_column(name)
    for name in ("steps", "records a step", "model FLOPs"):
        table.add_column(name, justify="right")
    frames = clips * card.config.num_frames
    for bucket in buckets:
        table.add_row(
            f"[{config.rows}, {bucket.length}]",
            f"[{config.rows}, {frames}, {size}, {size}, 3]" if clips else "-",
            f"[{config.rows}, {clips}, {card.config.num_frames}]" if clips else "-",
            *([f"[{config.rows}, {sounds}, {tower.num_frames}, 128]"] if sounds else []),
            f"{bucket.steps:,}",
            f"{bucket.records / bucket.steps:.1f}",
            f"{report.model_flops(bucket.length):.3g}",
        )
    return table
