"""What a run's own records say that a recipe cannot: how many steps, and how full its rows are."""

import tempfile
from typing import NamedTuple

from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.dry_run import look_at
from vllama2_jax.train.feeding import feeding_of
from vllama2_jax.train.start import describe_start, trained_card


class Records(NamedTuple):
    """What a run's data say; means are of its first steps.

    Attributes:
      samples: records of the whole run.
      rows: of a step.
      steps: of the whole run.
      useful_fraction: of the slots of its rows, if every row had the length that its bucket has,
        those that hold a token or media.
      lengths: slots of rows that occur, the shortest first.
      clips, sounds: that a row has room for.
      datasets: whose losses are told apart.
    """

    samples: int
    rows: int
    steps: int
    useful_fraction: float
    lengths: tuple[int, ...]
    clips: int
    sounds: int
    datasets: tuple[str, ...]


def records_of(config: TrainConfig) -> Records:
    """Index a run's records, as the run would, and plan its steps.

    Raises:
      ValueError: if records, or the tokenizer of the model, cannot be read.
    """
    card, folder = describe_start(config.start)
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as index:
        card = trained_card(card, config, tokenizer)
        feeding = feeding_of(config, card, tokenizer, index)
        buckets, steps = look_at(feeding), len(feeding.schedule)
        lengths = sorted({step.length for step in feeding.schedule})
    looked = sum(bucket.steps for bucket in buckets)
    slots = config.rows * sum(bucket.steps * bucket.length for bucket in buckets)
    records = sum(bucket.records for bucket in buckets)
    return Records(
        samples=round(records / looked * steps),
        rows=config.rows,
        steps=steps,
        useful_fraction=sum(bucket.tokens for bucket in buckets) / slots,
        lengths=tuple(lengths),
        clips=feeding.schedule.max_clips,
        sounds=feeding.schedule.max_sounds,
        datasets=feeding.datasets,
    )
