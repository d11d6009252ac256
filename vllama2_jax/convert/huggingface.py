"""Import of a released-format Hugging Face directory, strictly."""

from pathlib import Path

import jax
import numpy as np

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.store import check_tree, flatten, unflatten
from vllama2_jax.convert import tables
from vllama2_jax.convert.hf_config import (
    decoder_from_json,
    generation_defaults,
    image_spec,
    is_connector_only,
    model_from_json,
    read_json,
)
from vllama2_jax.convert.tensors import Merged, Renamed, TorchFile, open_weights
from vllama2_jax.media.preset import REFERENCE
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.stacking import unstacked_place
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.text import load_tokenizer

# What a repository's files are fetched by: weights, configuration and tokenizer, nothing else.
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def is_huggingface(folder: Path) -> bool:
    """Whether a directory looks like a Hugging Face checkpoint."""
    return (folder / "config.json").is_file()


def resolve(name: str | Path, near: Path | None = None) -> Path:
    """A local directory for a path or a repository id; downloads the latter.

    Args:
      name: a directory, or "owner/repository" on the Hugging Face hub.
      near: where else a relative directory may lie.

    Raises:
      CheckpointError: if it is neither, or cannot be fetched.
    """
    for folder in (Path(name), *([near / name] if near else [])):
        if folder.is_dir():
            return folder
    name = str(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint's directory, or OWNER/NAME on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{name}: no such directory, and not to be had from the hub ({reason}); "
            "check the name, the network and HF_TOKEN"
        ) from None


def load_huggingface(
    folder: Path, *, dtype, scan_layers: bool, split_experts: bool = False, progress=None
) -> tuple[dict, ModelCard, Path]:
    """Read a released checkpoint.

    SFT repositories hold every network. Base repositories hold `mm_projector.bin` alone: their
    language model is the one that config.json's `_name_or_path` names, their tower the one of
    `mm_vision_tower` (the original left that tower random there; it is loaded here).

    Args:
      folder: the directory.
      dtype: NumPy dtype of the returned parameters.
      scan_layers: stack the decoder's layers (training) or keep them apart (inference).
      split_experts: give each expert arrays of its own (see `models/stacking.py`).
      progress: called with (tensors done, tensors in all).

    Returns:
      parameters on the default device, the model card, and the tokenizer's directory.

    Raises:
      CheckpointError: listing every missing, unexpected and misshapen tensor.
    """
    data = read_json(folder / "config.json")
    if is_connector_only(data) and (folder / "mm_projector.bin").is_file():
        data, source, tokenizer_folder = _open_base(folder, data)
    else:
        source, tokenizer_folder = open_weights(folder), folder
    config = model_from_json(data, folder.name)
    params = read_params(
        source,
        config,
        str(folder),
        dtype,
        scan_layers=scan_layers,
        split_experts=split_experts,
        progress=progress,
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=REFERENCE,
        generation=generation_defaults(tokenizer_folder, data, tokenizer.eos_id),
        tokenizer=tokenizer.fingerprint(),
    )
    return params, card, tokenizer_folder


def check_names(shapes: dict[str, tuple[int, ...]], config: VLlama2Config, where: str) -> None:
    """Hold a checkpoint's tensor names and shapes against the tables, without reading any.

    Raises:
      CheckpointError: listing every difference.
    """
    expected = {row.source: np.broadcast_to(0, row.shape) for row in tables.model_rows(config)}
    ignored = tables.model_ignored(config)
    found = {
        name: np.broadcast_to(0, shape)
        for name, shape in shapes.items()
        if name in expected or not name.startswith(ignored)
    }
    check_tree(found, expected, where)


def read_params(
    source,
    config: VLlama2Config,
    where: str,
    dtype,
    *,
    scan_layers: bool,
    split_experts: bool = False,
    progress=None,
) -> dict:
    """Read every tensor to its parameter.

    Args:
      source: of `convert/tensors.py`.
      config: the network.
      where: what to call the source in an error.
      dtype, scan_layers, split_experts, progress: see `load_huggingface`.

    Returns:
      Nested dict of arrays on the default device.
    """
    check_names(source.shapes, config, where)
    shapes = flatten(abstract_params(config, scan_layers=scan_layers, split_experts=split_experts))
    rows = tables.model_rows(config)
    by_target: dict[str, list[tuple[tuple[int, ...], tables.Row]]] = {}
    for row in rows:
        path, index = row.target, row.index
        if not scan_layers:
            path, index = unstacked_place(path, index, split_experts)
        by_target.setdefault(path, []).append((index, row))
    if set(by_target) != set(shapes):
        differing = sorted(set(by_target) ^ set(shapes))
        raise AssertionError(f"tables and network name different parameters: {differing}")
    params, done = {}, 0
    for path, parts in by_target.items():
        buffer = np.empty(shapes[path].shape, dtype)
        for index, row in parts:
            tensor = source.read(row.source)
            if row.axes is not None:
                tensor = tensor.transpose(row.axes)
            buffer[index] = tensor.reshape(buffer[index].shape)
            done += 1
            if progress:
                progress(done, len(rows))
        params[path] = jax.device_put(buffer)
    return unflatten(params)


def _open_base(folder: Path, data: dict):
    """The three sources of a connector-only repository as one, and the merged config.json."""
    language_name = data.get("_name_or_path")
    if not language_name:
        raise CheckpointError(
            f"{folder}/config.json: a Base repository needs `_name_or_path`, its language model"
        )
    language = resolve(language_name, folder.parent)
    tower = resolve(data.get("mm_vision_tower", ""), folder.parent)
    language_data = read_json(language / "config.json")
    # The base's own shape wins over what the connector's repository repeats of it.
    decoder_from_json(language_data)
    merged = {**data, **{k: v for k, v in language_data.items() if k != "_name_or_path"}}
    merged.update({k: v for k, v in data.items() if k.startswith("mm_") or k == "num_frames"})
    tower_data = read_json(tower / "config.json")
    merged.setdefault("vision_config", tower_data.get("vision_config", tower_data))
    keyword = "mm_projector."
    sources = [
        open_weights(language),
        Renamed(
            open_weights(tower),
            lambda name: (
                tables.VISION_PREFIX + name.removeprefix("vision_model.")
                if name.startswith("vision_model.")
                else None
            ),
        ),
        # The original rounds a connector that it reads from a folder through float16.
        Renamed(
            TorchFile(folder / "mm_projector.bin"),
            lambda name: (
                tables.CONNECTOR_PREFIX + name.split(keyword, 1)[1] if keyword in name else None
            ),
            through=np.float16,
        ),
    ]
    return merged, Merged(sources), language
