"""What people change every day, as plain options in front of Fiddle's."""

import dataclasses
import os
from pathlib import PurePath

import fiddle as fdl

from vllama2_jax.configs.fiddlers import lora
from vllama2_jax.configs.parse import parse
from vllama2_jax.data.files import is_remote
from vllama2_jax.models.zoo import PUBLISHED_PARTS, model_config
from vllama2_jax.parallel.mesh import MeshConfig, read_mesh
from vllama2_jax.train.config import STORED, SourceConfig, TrainConfig
from vllama2_jax.weights import describe

# The last step of the recipe for a model that sees, and for one that hears as well.
_NARROW = {False: "tiny_video_sft", True: "tiny_av_joint"}
_WIDE = {False: "video_sft", True: "av_joint"}


@dataclasses.dataclass(frozen=True)
class Shortcuts:
    """Plain options of `vllama2 train`; None leaves the recipe's.

    Attributes:
      model: what to begin with, as `vllama2_jax.load` takes it.
      data, media_root: records to train on, and the folder that their paths are relative to.
      validation: held-out records, beside the same folder.
      steps, epochs: how long, one of them.
      batch: rows of a step.
      save_every: steps between two checkpoints.
      lora: rank of adapters on the language model; its kernels then stay frozen.
      workers: processes that read and decode.
      mesh: layout and parts, "fsdp+tensor:tensor=4,fsdp=-1", or either alone.
      seed: of new parameters and of every order.
    """

    model: str | None = None
    data: str | None = None
    media_root: str | None = None
    validation: str | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    save_every: int | None = None
    lora: int | None = None
    workers: int | None = None
    mesh: str | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs both say how long; give one")
        if self.media_root is not None and self.data is None:
            raise ValueError("--media-root is the folder of --data; give both")
        for name, least in (
            ("steps", 1),
            ("epochs", 1),
            ("batch", 1),
            ("save_every", 1),
            ("lora", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def resolve(directives: list[str], shortcuts: Shortcuts) -> fdl.Config[TrainConfig]:
    """The recipe that a command line means.

    Without a recipe it is the last step of fine-tuning: `av_joint` for a model that hears,
    `video_sft` for any other, and their miniatures where the model is `tiny` or not named.

    Args:
      directives: of `parse`; the recipe may be missing. Shortcuts win over the recipe and its
        fiddlers, "set:" wins over shortcuts.
      shortcuts: what else is asked for.

    Raises:
      ValueError: for what cannot be meant.
    """
    directives = list(directives)
    if not any(directive.startswith("config:") for directive in directives):
        shortcuts = dataclasses.replace(shortcuts, model=shortcuts.model or "tiny")
        names = _NARROW if shortcuts.model == "tiny" else _WIDE
        directives.insert(0, f"config:{names[_hears(shortcuts.model)]}")
    return parse(directives, then=lambda config: _apply(config, shortcuts))


def _hears(model: str) -> bool:
    """Whether a model takes sound; of a repository that is not a published model's, no."""
    if os.path.isdir(model) or is_remote(model):
        return describe(model)[0].config.audio is not None
    try:
        return model_config(model).audio is not None
    except ValueError:
        return False


def _apply(config: fdl.Config[TrainConfig], shortcuts: Shortcuts) -> None:
    if shortcuts.model is not None:
        _start_from(config, shortcuts.model)
    root = shortcuts.media_root or ""
    if shortcuts.data is not None:
        config.data.sources = (_source(shortcuts.data, root),)
        config.data.mix = "counts"
        config.data.max_length = config.data.buckets = None  # those suit the recipe's own data
        config.validation.sources = ()
        config.validation.accuracy = False
    if shortcuts.validation is not None:
        config.validation.sources = (_source(shortcuts.validation, root),)
    if shortcuts.steps is not None:
        config.steps, config.epochs = shortcuts.steps, None
    if shortcuts.epochs is not None:
        config.steps, config.epochs = None, shortcuts.epochs
    if shortcuts.batch is not None:
        config.rows = shortcuts.batch
    if shortcuts.save_every is not None:
        config.save.every = shortcuts.save_every
    if shortcuts.workers is not None:
        config.data.workers = shortcuts.workers
    if shortcuts.mesh is not None:
        _lay_out(config.mesh, shortcuts.mesh)
    if shortcuts.seed is not None:
        config.seed = shortcuts.seed
    if shortcuts.lora is not None:
        if any(getattr(rule, "action", None) == "lora" for rule in config.rules):
            raise ValueError(
                "--lora and a fiddler both set adapters; give the rank to the fiddler, as in "
                f"fiddler:qlora({shortcuts.lora})"
            )
        lora(config, shortcuts.lora)


def _lay_out(mesh: fdl.Config[MeshConfig], text: str) -> None:
    """Set what a text like "fsdp+tensor:tensor=4,fsdp=-1" says of a mesh."""
    for field, value in read_mesh(text).items():
        setattr(mesh, field, value)


def _start_from(config: fdl.Config[TrainConfig], model: str) -> None:
    """Take the parts that a recipe names from elsewhere from this model, or from its makers."""
    start = config.start
    start.model = model
    makers = (STORED, STORED)
    if not os.path.isdir(model):
        try:
            makers = PUBLISHED_PARTS.get(model_config(model).name, makers)
        except ValueError:
            pass  # no published name: what it is turns out when it is looked for
    for part, name in zip(("vision", "decoder"), makers, strict=True):
        if getattr(start, part) != STORED:
            setattr(start, part, name)


def _source(file: str, media_root: str) -> fdl.Config[SourceConfig]:
    return fdl.Config(SourceConfig, PurePath(file).stem, file, media_root=media_root)
