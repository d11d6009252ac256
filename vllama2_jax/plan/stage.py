"""How large a recipe's batch is, and how many of them its stage takes."""

from typing import NamedTuple

from vllama2_jax.data.paper_mixtures import (
    AUDIO,
    AUDIO_VIDEO,
    IMAGE,
    PAPER_MIXTURES,
    VIDEO,
)
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.plan.program import Shape
from vllama2_jax.plan.records import Records
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.feeding import longest_row


class Stage(NamedTuple):
    """A whole run.

    Attributes:
      samples: that it reads; the paper's count times the epochs, or what its steps take.
      steps: that it takes, one sample to a row.
    """

    samples: int
    steps: int


def largest_batch(
    config: TrainConfig,
    network: VLlama2Config,
    length: int | None = None,
    records: Records | None = None,
) -> Shape:
    """The batch of a recipe's longest rows, which needs the most memory.

    Args:
      config: of the run.
      network: that it trains.
      length: slots of a row, in place of the longest.
      records: that it reads, which say what its rows have room for.
    """
    modalities = _modalities(config)
    clips = config.data.max_clips * bool(modalities & {VIDEO, IMAGE, AUDIO_VIDEO})
    sounds = config.data.max_clips * bool(network.audio and modalities & {AUDIO, AUDIO_VIDEO})
    if records:
        clips, sounds = records.clips, records.sounds
    return Shape(
        rows=config.rows,
        length=longest_row(config.data, network) if length is None else length,
        frames=clips * network.num_frames,
        clips=clips,
        sounds=sounds,
    )


def stage_of(config: TrainConfig) -> Stage:
    """How much a run reads; without packing, a row is a sample."""
    if config.steps is not None:
        return Stage(config.steps * config.rows, config.steps)
    mixture = PAPER_MIXTURES.get(config.name)
    if mixture is None:
        raise ValueError(
            f"how many samples {config.name} has is not known without its records; say how many "
            "steps it takes (--steps)"
        )
    samples = mixture.used * config.epochs
    return Stage(samples, -(-samples // config.rows))


def stage_or_none(config: TrainConfig) -> Stage | None:
    """The whole run; None of records that are not here: what a step takes is known all the same."""
    try:
        return stage_of(config)
    except ValueError:
        return None


def _modalities(config: TrainConfig) -> set[str]:
    """What the records of a recipe hold; all that there is, where the paper does not say."""
    if not config.data.sources:
        return set()
    mixture = PAPER_MIXTURES.get(config.name)
    if mixture is None:
        return {VIDEO, AUDIO_VIDEO}
    return {row.modality for row in mixture.rows}
