"""What a run's own records say that a recipe cannot: how many steps, and how full its rows are."""

import dataclasses
import tempfile
from typing import NamedTuple

from vllama2_jax.plan.result import Plan
from vllama2_jax.plan.stage import Stage
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.dry_run import look_at
from vllama2_jax.train.feeding import feeding_of
from vllama2_jax.train.run import trained_card
from vllama2_jax.train.start import describe_start


class Records(NamedTuple):
    """What was counted in a run's first steps.

    Attributes:
      samples: records of the whole run.
      useful_fraction: of the slots of its rows, if every row had the length that its bucket has,
        those that hold a token or media.
      rows_per_sample: that a record takes; less than 1 where several share a row.
    """

    samples: int
    useful_fraction: float
    rows_per_sample: float

    def told_to(self, plan: Plan) -> Plan:
        """A plan that knows its run's own records."""
        steps = -(-round(self.samples * self.rows_per_sample) // plan.shape.rows)
        return dataclasses.replace(
            plan,
            stage=Stage(self.samples, max(1, steps)),
            useful_fraction=self.useful_fraction,
        )


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
    looked = sum(bucket.steps for bucket in buckets)
    slots = config.rows * sum(bucket.steps * bucket.length for bucket in buckets)
    records = sum(bucket.records for bucket in buckets)
    return Records(
        samples=round(records / looked * steps),
        useful_fraction=sum(bucket.tokens for bucket in buckets) / slots,
        rows_per_sample=config.rows * looked / records,
    )
