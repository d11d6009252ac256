"""Find a model by any of its names, and read its parameters, whatever its layout."""

import atexit
import tempfile
from pathlib import Path

import jax
import numpy as np

from vllama2_jax.checkpoints import CheckpointError, ModelCard, is_saved_model, load_model
from vllama2_jax.checkpoints.card import read_card
from vllama2_jax.checkpoints.run import is_run, run_card_folder
from vllama2_jax.checkpoints.store import (
    TOKENIZER,
    copy_files,
    flatten,
    place,
    unflatten,
)
from vllama2_jax.convert.huggingface import (
    is_huggingface,
    load_huggingface,
    open_checkpoint,
    resolve,
)
from vllama2_jax.data.files import is_remote
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.stacking import unstacked_place
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import model_config
from vllama2_jax.parallel.sharding import param_shardings
from vllama2_jax.text import ChatTemplate, Tokenizer, choose_template, load_tokenizer

TINY = Path(__file__).parent / "assets" / "tiny"
_HUB_OWNER = "DAMO-NLP-SG"
_BASE = "-Base"


def find(source: str | Path) -> Path:
    """The directory that a model's name stands for; downloads a repository that is not here.

    Raises:
      CheckpointError: if there is no such directory, published model or repository.
    """
    name = str(source)
    if name == "tiny":
        return TINY
    if is_remote(name):
        try:
            place(name).exists()
        except ImportError as error:
            raise CheckpointError(
                f"{name}: the bucket's client is missing ({error}); `pip install gcsfs`"
            ) from None
        return place(name)
    if "/" not in name and not Path(source).exists():
        try:
            published = model_config(name).name
        except ValueError as error:
            raise CheckpointError(
                f"{name}: no such directory, and no published model ({error})"
            ) from None
        # A Base repository shares its shapes with the fine-tuned one, not its weights.
        suffix = _BASE if name.endswith(_BASE) else ""
        return resolve(f"{_HUB_OWNER}/VideoLLaMA{published}{suffix}")
    if name.startswith("runs/") and not Path(name).is_dir():
        raise CheckpointError(
            f"{name}: no such directory; take the step first that makes it, or name another model"
        )
    return resolve(source)


def read(
    folder: Path,
    dtype,
    *,
    scan_layers: bool,
    split_experts: bool = False,
    layout: Layout | None = None,
    progress=None,
) -> tuple[dict, ModelCard, Path]:
    """Parameters, card and tokenizer directory of a model on disk.

    Args:
      folder: of `find`: a saved model, a released checkpoint, or a training run, whose newest
        weights are read.
      dtype: of the parameters; None keeps the stored one.
      scan_layers: decoder layers stacked (training) or apart (inference).
      split_experts: see `models/stacking.py`.
      layout: how the parameters are split over devices; None is the default device alone.
      progress: called with (tensors read, tensors in all) while importing.

    Raises:
      CheckpointError: if the model cannot be understood or trusted.
    """
    if is_run(folder):
        # A run begins with a model of any layout, and a model may be a run: one has to wait.
        from vllama2_jax.train.start import read_run

        params, card, tokenizer = read_run(folder, dtype, progress, layout)
    elif is_saved_model(folder):
        params, card = load_model(folder, lambda card: _placed(card.config, layout), dtype)
        tokenizer = local(folder / TOKENIZER)
    elif is_huggingface(folder):
        return load_huggingface(
            folder,
            dtype=dtype,
            scan_layers=scan_layers,
            split_experts=split_experts,
            layout=layout,
            progress=progress,
        )
    else:
        raise _no_model(folder)
    if not scan_layers:
        flat = flatten(params)
        del params
        params = unstack(flat, split_experts)
    return params, card, tokenizer


def _placed(config: VLlama2Config, layout: Layout | None) -> dict:
    """Shapes of a network's parameters, and where they shall lie."""
    shapes = flatten(abstract_params(config))
    where = param_shardings(layout, config, shapes)
    placed = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[p]) for p, x in shapes.items()
    }
    return unflatten(placed)


def describe(source: str | Path) -> tuple[ModelCard, Path]:
    """A model's card and tokenizer directory, without reading its weights.

    Args:
      source: a name, as `find` takes it.

    Raises:
      CheckpointError: if the model cannot be found or understood.
    """
    folder = find(source)
    if is_run(folder):
        folder = run_card_folder(folder)
    if is_saved_model(folder):
        return read_card(folder), local(folder / TOKENIZER)
    if is_huggingface(folder):
        _, card, tokenizer = open_checkpoint(folder)
        return card, tokenizer
    raise _no_model(folder)


def text_rules(source: str | Path) -> tuple[Tokenizer, str | ChatTemplate]:
    """Tokenizer and chat template of a model, without reading its weights.

    Args:
      source: a name, as `find` takes it.

    Raises:
      CheckpointError: if the model cannot be found or understood.
    """
    card, folder = describe(source)
    tokenizer = load_tokenizer(folder)
    return tokenizer, card.template or choose_template(card.config.decoder.family, tokenizer)


def local(folder: Path) -> Path:
    """A small folder, or a copy of it that lasts as long as this process if it is of a bucket."""
    if not is_remote(folder):
        return Path(folder)
    copied = tempfile.TemporaryDirectory(prefix="vllama2-")
    atexit.register(copied.cleanup)
    copy_files(folder.iterdir(), place(copied.name))
    return Path(copied.name)


def _no_model(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: not a model (neither model_card.json nor config.json nor run.json); "
        "give a released checkpoint, a saved model, or a training run"
    )


def unstack(flat: dict[str, jax.Array], split_experts: bool) -> dict:
    """What `unstack_layers` makes of the decoder; empties `flat` as it goes.

    Every stacked array is let go once its layers are copied, so that two copies of a large decoder
    never lie side by side.
    """
    out = {}
    for path in sorted(flat):
        leaf = flat.pop(path)
        # The leading axes that become names: layers, then experts.
        axes = int("/layers/" in path)
        if split_experts and path.rsplit("/", 2)[-2] == "moe":
            axes += 1
        for index in np.ndindex(leaf.shape[:axes]):
            place, _ = unstacked_place(path, index, split_experts)
            out[place] = leaf[index]
    return unflatten(out)
