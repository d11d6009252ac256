"""What a training run is, as frozen dataclasses: plain values, no arrays, no code.

`configs/` builds them with Fiddle, `run.py` carries them out, and a run's folder keeps them as
JSON (`to_json`), by which a run that is started again knows itself.
"""

import dataclasses
import re

from vllama2_jax.data.examples import STYLES
from vllama2_jax.models.config import config_from_dict
from vllama2_jax.models.remat import REMAT_POLICIES
from vllama2_jax.parallel.mesh import MeshConfig
from vllama2_jax.train.loss import LossConfig
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.step import AVERAGES
from vllama2_jax.train.trainable import Rule

STORED, RANDOM = "stored", "random"
MIXES = ("counts", "weights", "joint")


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _check_least(least: int, where: str, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{where}{name} {value} must be at least {least}")


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
      audio: "stored", "random", or the `.pt` file of a BEATs tower.
      audio_connector: "stored" or "random".
      connector_kind: of a random connector, as `zoo.connector_config` takes it; "" is the model's.
      hearing: a name of the zoo, whose audio tower and connector are added to a model that does not
        hear; they are then not "stored". "" adds none.
      audio_connector_kind: of what `hearing` adds, "linear" or "mlp2x_gelu"; "" is its own.
      narrow: random parts begin as suits narrow networks (`initial.py`), not published sizes.
    """

    model: str
    vision: str = STORED
    connector: str = STORED
    decoder: str = STORED
    audio: str = STORED
    audio_connector: str = STORED
    connector_kind: str = ""
    hearing: str = ""
    audio_connector_kind: str = ""
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
    """Records that are made in memory, of rendered clips (see `data/toybox/source.py`).

    Attributes:
      name: of the dataset.
      records: how many there are.
      kind: "clips", "captions", "questions", "text" or "bare".
      split: "train" or "heldout".
      seed: decides them.
      told: of "clips", share of those that are described, not asked about.
      media: what their scenes are about, "video", "audio", "av" or "all".
      withheld: of "clips" of "av", share of those asked about with pictures or sound alone.
      share: as in `SourceConfig`.
    """

    name: str
    records: int
    kind: str = "clips"
    split: str = "train"
    seed: int = 0
    told: float = 0.0
    media: str = "video"
    withheld: float = 0.0
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows.

    Attributes:
      sources: of the mixture.
      mix: "counts", "weights", or "joint", which reads two samples of the first of three sources,
        one of the second and one of the third in turn (see `mixture.joint_mixture`).
      shuffled_once: of "joint", the original's half-used lists.
      style: "sft", conversations whose answers are supervised, or "plain" or "audio_plain",
        captions (see `examples.RecordFormat`).
      square_pad: frames are padded to squares, here and when the trained model is asked.
      max_tokens: ids of a record, its media counting as one (the original's `model_max_length`).
      max_length: slots of the longest row; None leaves room for `max_tokens` beside a clip.
      buckets: lengths that rows may have; None is four, up to `max_length`.
      packing: several records share a row.
      max_clips: of a row, and as many sounds.
      max_faults: the run ends when more records than this turn out unreadable, or more than a
        quarter of all.
      workers: processes that read and decode; 0 is a thread of the training process.
    """

    sources: tuple[SourceConfig | ToyboxConfig, ...]
    mix: str = "counts"
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

    def __post_init__(self):
        """Refuse what cannot be meant."""
        _check_known("data.mix", self.mix, MIXES)
        _check_known("data.style", self.style, STYLES)
        _check_least(0, "data.", self, "max_faults", "workers")
        _check_least(1, "data.", self, "max_clips", "max_tokens")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: names must differ, found {', '.join(names)}")
        for source in self.sources:
            whole = source.share is None or float(source.share).is_integer()
            if (self.mix == "joint" and source.share is not None) or (
                self.mix == "counts" and not (whole and (source.share is None or source.share > 0))
            ):
                raise ValueError(
                    f"data.sources: {source.name} has the share {source.share}; with mix "
                    f"{self.mix!r} it must be "
                    + ("left out" if self.mix == "joint" else "a whole number of samples")
                )


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

    def __post_init__(self):
        """Refuse what cannot be meant."""
        _check_least(1, "validation.", self, "every", "max_records")


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

    def __post_init__(self):
        """Refuse what cannot be meant."""
        _check_least(1, "save.", self, "every", "keep_last")
        _check_least(0, "save.", self, "keep_best")


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
      dtype: of activations and frozen parameters.
      masters: dtype of what trains and of its moments. "bfloat16" is for comparisons: an update of
        less than 1/512 of a parameter is lost in it.
      remat: recomputation policy (`models/remat.py`).
      validation: held-out records.
      save: checkpoints.
      mesh: how a step is laid out over several devices; another one may continue a run.
      layer_drop: probability with which a step leaves out a layer of the audio tower, frozen or
        not, as in the original; None is the tower's own (0.05 of BEATs).
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
    masters: str = "float32"
    remat: str = "none"
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    layer_drop: float | None = None
    seed: int = 42

    def __post_init__(self):
        """Refuse what cannot be meant."""
        _check_least(1, "", self, "rows", "micro_batches")
        if self.rows % self.micro_batches:
            raise ValueError(
                f"rows {self.rows} cannot be split into {self.micro_batches} equal micro_batches; "
                "choose a number that divides them"
            )
        _check_known("average", self.average, AVERAGES)
        for name in ("dtype", "masters"):
            _check_known(name, getattr(self, name), ("float32", "bfloat16"))
        _check_least(0, "", self, "seed")
        _check_known("remat", self.remat, tuple(REMAT_POLICIES))
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps {self.steps} and epochs {self.epochs}: give one of them")
        _check_least(1, "", self, "epochs" if self.steps is None else "steps")
        if self.layer_drop is not None and not 0 <= self.layer_drop < 1:
            raise ValueError(f"layer_drop {self.layer_drop} must be at least 0 and below 1")


# What may differ when a run is continued: it changes no number that the run computes, or, as the
# order of sums over devices, only their rounding.
_FREE = re.compile(r"data\.(workers|max_faults|sources\.\d+\.frames)|(save|mesh)\..+")


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
    """Lines "path: old -> new" of two configs' JSON, apart from what does not matter."""
    try:  # fields that are newer than the run have their defaults
        old = to_json(config_from_dict(TrainConfig, old))
    except ValueError:
        pass  # of another version of this package: its own words are compared
    before, after = flat_json(old), flat_json(new)
    absent = "(absent)"
    return [
        f"{path}: {before.get(path, absent)!r} -> {after.get(path, absent)!r}"
        for path in sorted(before | after)
        if not _FREE.fullmatch(path) and before.get(path, absent) != after.get(path, absent)
    ]
