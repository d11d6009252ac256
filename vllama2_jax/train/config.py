"""What a training run is, as frozen dataclasses: plain values, no arrays, no code.

`configs/` builds them with Fiddle, `run.py` carries them out, and a run's folder keeps them as
JSON (`to_json`), by which a run that is started again knows itself.
"""

import dataclasses

from vllama2_jax.models.config import config_from_dict
from vllama2_jax.train.loss import LossConfig
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.trainable import Rule

STORED, RANDOM = "stored", "random"
STYLES = ("sft", "plain")


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The parameters that a run begins with, part by part.

    Attributes:
      model: a name as `vllama2_jax.load` takes it. Its weights are read where a part says "stored";
        where no part does, it need only be a name of the zoo, for the shapes.
      vision: "stored", "random", or a repository or directory of a tower alone.
      connector: "stored" or "random".
      decoder: "stored", "random", or a repository or directory of a language model alone, whose
        tokenizer is then taken, too.
      connector_kind: of a random connector, as `zoo.connector_config` takes it; "" is the model's.
      narrow: random parts begin as suits narrow networks (`initial.py`), not published sizes.
    """

    model: str
    vision: str = STORED
    connector: str = STORED
    decoder: str = STORED
    connector_kind: str = ""
    narrow: bool = False


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Records of a mixture.

    Attributes:
      name: of the dataset, in tables and metrics, for records that do not name theirs.
      file: a .json list, a .jsonl file or a folder of `data pack`, local or gs://.
      media_root: folder that media paths are relative to; "" is the folder of `file`.
      share: samples of an epoch (`DataConfig.mix` "counts"), where None is all of them, or a weight
        ("weights").
      report: of `vllama2 data check`; its quarantine is left out.
      frames: folder of `vllama2 data frames`, decoded frames of this source; "" decodes.
    """

    name: str
    file: str
    media_root: str = ""
    share: float | None = None
    report: str = ""
    frames: str = ""


@dataclasses.dataclass(frozen=True)
class ToyboxConfig:
    """Records that are made in memory, of rendered clips (see `data/toybox_source.py`).

    Attributes:
      name: of the dataset.
      records: how many there are.
      kind: "clips", "captions", "questions", "text" or "bare".
      split: "train" or "heldout".
      seed: decides them.
      told: of "clips", share of those that are described, not asked about.
      share: as in `SourceConfig`.
    """

    name: str
    records: int
    kind: str = "clips"
    split: str = "train"
    seed: int = 0
    told: float = 0.0
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows.

    Attributes:
      sources: of the mixture.
      mix: "counts", "weights", or "groups", whose members `group` names.
      group: numbers of sources, for "groups": (0, 0, 1, 2) is the 2:1:1 of joint training.
      shuffled_once: of "groups", the original's half-used lists (see `mixture.joint_mixture`).
      style: "sft", conversations whose answers are supervised, or "plain", captions.
      square_pad: frames are padded to squares, here and when the trained model is asked.
      max_tokens: ids of a record, its media counting as one (the original's `model_max_length`).
      max_length: slots of the longest row; None leaves room for `max_tokens` beside a clip.
      buckets: lengths that rows may have; None is four, up to `max_length`.
      packing: several records share a row.
      max_clips: media of a row.
      max_faults: unreadable records that end the run.
      workers: processes that read and decode; 0 is a thread of the training process.
    """

    sources: tuple[SourceConfig | ToyboxConfig, ...]
    mix: str = "counts"
    group: tuple[int, ...] = ()
    shuffled_once: bool = False
    style: str = "sft"
    square_pad: bool = True
    max_tokens: int = 2048
    max_length: int | None = None
    buckets: tuple[int, ...] | None = None
    packing: bool = False
    max_clips: int = 1
    max_faults: int = 100
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Records that are not trained on.

    Attributes:
      sources: their files; none switches validation off.
      every: steps between two looks; there is one at the end and one at each checkpoint, too.
      max_records: of each source, its first ones.
      accuracy: also ask each record's first question and count the answers that are exactly the
        record's, per kind of question.
    """

    sources: tuple[SourceConfig | ToyboxConfig, ...] = ()
    every: int = 500
    max_records: int = 512
    accuracy: bool = False


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """Checkpoints of a run.

    Attributes:
      every: steps between two; the last step is always saved.
      keep_last: how many of the newest are kept.
      keep_best: how many of the best are kept beside them, by validation loss, or by the mean
        training loss since the checkpoint before where nothing is validated.
    """

    every: int = 500
    keep_last: int = 2
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      name: of the recipe.
      start: the parameters that it begins with.
      rules: what trains (`trainable.py`).
      data: what it reads.
      optimizer: how it steps.
      loss: what it minimises.
      rows: of a step, on all devices together; without packing, its samples.
      micro_batches: parts of a step that are computed one after the other, to save memory.
      average: of micro-batches, see `make_step`.
      epochs: how often the mixture is read; None where `steps` says when to stop.
      steps: how many to take, instead.
      dtype: of activations and frozen parameters; what trains is float32.
      remat: recomputation policy (`models/remat.py`).
      validation: held-out records.
      save: checkpoints.
      seed: of new parameters and of every order.
    """

    name: str
    start: StartConfig
    rules: tuple[Rule, ...]
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    rows: int = 128
    micro_batches: int = 1
    average: str = "tokens"
    epochs: int | None = 1
    steps: int | None = None
    dtype: str = "bfloat16"
    remat: str = "none"
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
    seed: int = 42


def checked(config: TrainConfig) -> TrainConfig:
    """The same configuration, with tuples for lists, after a look at every value.

    Raises:
      ValueError: naming every value that is missing, unknown or of another type.
    """
    return config_from_dict(TrainConfig, to_json(config))


# What may differ when a run is continued: it changes no number that the run computes.
FREE = ("data.workers", "save.every", "save.keep_last", "save.keep_best")


def to_json(config: TrainConfig) -> dict:
    """Plain JSON types, nested; tuples become lists."""
    return _plain(dataclasses.asdict(config))


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def flat_json(value, path: str = "") -> dict[str, object]:
    """{"data.sources.0.file": value} of nested plain JSON; empty containers are values."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        name: leaf
        for key, item in items
        for name, leaf in flat_json(item, f"{path}.{key}" if path else str(key)).items()
    }


def differences(old: dict, new: dict) -> list[str]:
    """Lines "path: old -> new" of two configs' JSON, apart from `FREE`."""
    before, after = flat_json(old), flat_json(new)
    absent = "(absent)"
    return [
        f"{path}: {before.get(path, absent)!r} -> {after.get(path, absent)!r}"
        for path in sorted(before | after)
        if path not in FREE and before.get(path, absent) != after.get(path, absent)
    ]
