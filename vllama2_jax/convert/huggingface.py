"""Import of a released-format Hugging Face directory, strictly."""

from pathlib import Path

import numpy as np

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.store import check_tree, flatten, unflatten
from vllama2_jax.convert import tables
from vllama2_jax.convert.hf_card import card_from_json
from vllama2_jax.convert.hf_config import (
    generation_defaults,
    has_audio,
    is_connector_only,
    read_json,
    tower_name,
)
from vllama2_jax.convert.tensors import Merged, Renamed, TorchFile, open_weights
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.stacking import unstacked_place
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.parallel.placing import Shards
from vllama2_jax.parallel.sharding import param_shardings
from vllama2_jax.text import load_tokenizer

_PROJECTOR = "mm_projector.bin"
# What a repository's files are fetched by: configuration, tokenizer and weights, nothing else.
_WANTED = ["*.json", "*.model", "*.txt", "*.jinja", _PROJECTOR, "*.safetensors"]
# Many repositories hold their weights twice; torch's form is for those that have no other.
_WANTED_OTHERWISE = ["pytorch_model*.bin"]
# Copies in other layouts, and what lies in folders (nothing that is read does).
_UNWANTED = ["*/*", "consolidated*"]
# What a Base repository adds to its language model's config.json, beside all `mm_...` fields.
_OWN_FIELDS = ("num_frames", "vision_tower", "vision_config")


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
    name = str(name)
    if not name:
        raise CheckpointError(
            "a model without a name; give a checkpoint's directory, or OWNER/NAME on the hub"
        )
    for folder in (Path(name), *([near / name] if near else [])):
        if folder.is_dir():
            return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint's directory, or OWNER/NAME on the hub"
        )
    try:
        return _download(name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{name}: no such directory, and not to be had from the hub ({reason}); "
            "check the name, the network and HF_TOKEN"
        ) from None


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if not any(folder.glob("*.safetensors")):
        wanted = _WANTED + _WANTED_OTHERWISE
        folder = snapshot_download(repository, allow_patterns=wanted, ignore_patterns=_UNWANTED)
    return Path(folder)


def open_checkpoint(folder: Path):
    """A released checkpoint's tensors, none of which is read, its card, and its tokenizer.

    Args:
      folder: see `load_huggingface`.

    Returns:
      a source of `convert/tensors.py`, the model card, the tokenizer's directory.

    Raises:
      CheckpointError: for a part that cannot be found or trusted.
    """
    data = read_json(folder / "config.json")
    if is_connector_only(data):
        data, source, tokenizer_folder = _open_base(folder, data)
    else:
        source, tokenizer_folder = open_weights(folder), folder
    if has_audio(data):
        source = _with_audio(folder, source)
    tokenizer = load_tokenizer(tokenizer_folder)
    generation = generation_defaults(tokenizer_folder, data, tokenizer.eos_id)
    return source, card_from_json(data, generation, tokenizer, folder.name), tokenizer_folder


def load_huggingface(
    folder: Path,
    *,
    dtype,
    scan_layers: bool,
    split_experts: bool = False,
    layout: Layout | None = None,
    progress=None,
) -> tuple[dict, ModelCard, Path]:
    """Read a released checkpoint.

    SFT repositories hold every network. Base repositories hold `mm_projector.bin` alone: their
    language model is the one that config.json's `_name_or_path` names, their tower the one of
    `mm_vision_tower` (the original left that tower random there; it is loaded here).

    Args:
      folder: the directory.
      dtype: NumPy dtype of the returned parameters; None keeps that of each one's first tensor.
      scan_layers: stack the decoder's layers (training) or keep them apart (inference).
      split_experts: give each expert arrays of its own (see `models/stacking.py`).
      layout: how the parameters are split over devices; None is the default device alone.
      progress: called with (tensors done, tensors in all).

    Returns:
      parameters, the model card, and the tokenizer's directory.

    Raises:
      CheckpointError: listing every missing, unexpected and misshapen tensor; or for a part that
        cannot be found, read or trusted.
    """
    source, card, tokenizer_folder = open_checkpoint(folder)
    params = read_params(
        source,
        card.config,
        str(folder),
        dtype,
        scan_layers=scan_layers,
        split_experts=split_experts,
        layout=layout,
        progress=progress,
    )
    return params, card, tokenizer_folder


def check_names(
    shapes: dict[str, tuple[int, ...]], config: VLlama2Config, where: str, part: str = ""
) -> None:
    """Hold a checkpoint's tensor names and shapes against the tables, without reading any.

    Args:
      shapes: of its tensors.
      config: the network.
      where: what to call the checkpoint in an error.
      part: of `config.PARTS`, of a checkpoint that holds only that.

    Raises:
      CheckpointError: listing every difference.
    """
    rows = _rows(config, part)
    expected = {row.source: np.broadcast_to(0, row.shape) for row in rows}
    ignored = tables.model_ignored(config)
    found = {
        name: np.broadcast_to(0, shape)
        for name, shape in shapes.items()
        if name in expected or not name.startswith(ignored)
    }
    check_tree(found, expected, where)


def _rows(config: VLlama2Config, part: str) -> list[tables.Row]:
    return [row for row in tables.model_rows(config) if row.target.startswith(part and f"{part}/")]


def read_params(
    source,
    config: VLlama2Config,
    where: str,
    dtype,
    *,
    scan_layers: bool,
    split_experts: bool = False,
    part: str = "",
    layout: Layout | None = None,
    progress=None,
) -> dict:
    """Read every tensor to its parameter, one at a time, straight to the devices that hold it.

    Args:
      source: of `convert/tensors.py`.
      config: the network.
      where: what to call the source in an error.
      dtype, scan_layers, split_experts, layout, progress: see `load_huggingface`.
      part: see `check_names`.

    Returns:
      Nested dict of arrays.
    """
    check_names(source.shapes, config, where, part)
    shapes = flatten(abstract_params(config, scan_layers=scan_layers, split_experts=split_experts))
    shapes = {path: leaf for path, leaf in shapes.items() if path.startswith(part and f"{part}/")}
    rows = _rows(config, part)
    by_target: dict[str, list[tuple[tuple[int, ...], tables.Row]]] = {}
    for row in rows:
        path, index = row.target, row.index
        if not scan_layers:
            path, index = unstacked_place(path, index, split_experts)
        by_target.setdefault(path, []).append((index, row))
    if set(by_target) != set(shapes):
        differing = sorted(set(by_target) ^ set(shapes))
        raise AssertionError(f"tables and network name different parameters: {differing}")
    options = dict(scan_layers=scan_layers, split_experts=split_experts)
    where = param_shardings(layout, config, shapes, **options)
    params, done = {}, 0
    for path, parts in by_target.items():
        shards, shape = None, shapes[path].shape
        for index, row in parts:
            tensor = source.read(row.source)
            if shards is None:
                shards = Shards(shape, tensor.dtype if dtype is None else dtype, where[path])
            shards.write(index, row.to_parameter(tensor, shape[len(index) :]))
            done += 1
            if progress:
                progress(done, len(rows))
        params[path] = shards.array()
    return unflatten(params)


def _with_audio(folder: Path, source):
    """The source, with the original's separate files for what of the audio branch it lacks."""
    sources = [source]
    for prefix, file in (
        (tables.AUDIO_PREFIX, "audio_tower.bin"),
        (tables.AUDIO_CONNECTOR_PREFIX, "mm_projector_a.bin"),
    ):
        absent = not any(name.startswith(prefix) for name in source.shapes)
        if absent and (folder / file).is_file():
            sources.append(TorchFile(folder / file))
    return Merged(sources) if len(sources) > 1 else source


def _open_base(folder: Path, data: dict):
    """The three sources of a connector-only repository as one, and the merged config.json."""
    projector = folder / _PROJECTOR
    if not projector.is_file():
        raise CheckpointError(
            f"{folder}: config.json says `tune_mm_mlp_adapter`, a connector alone, but there is no "
            f"{_PROJECTOR}; fetch it, or set the field to false if the whole model lies here"
        )
    language = _resolve_field(folder, "_name_or_path", data.get("_name_or_path"))
    tower = _resolve_field(folder, "mm_vision_tower", tower_name(data))
    # The language model's shape is its own word; ours is added, and what the connector's
    # repository repeats of it is dropped, so that no field is a mixture.
    own = {k: v for k, v in data.items() if k.startswith("mm_") or k in _OWN_FIELDS}
    merged = {**read_json(language / "config.json"), **own}
    tower_data = read_json(tower / "config.json")
    merged.setdefault("vision_config", tower_data.get("vision_config", tower_data))
    sources = [
        open_weights(language),
        open_tower(tower),
        # The original rounds a connector that it reads from a folder through float16.
        Renamed(TorchFile(projector), _connector_name, through=np.float16),
    ]
    return merged, Merged(sources), language


def _resolve_field(folder: Path, field: str, name) -> Path:
    """The directory that a field of a Base repository's config.json names."""
    if not name or not isinstance(name, str):
        raise CheckpointError(
            f"{folder}/config.json: a Base repository needs `{field}`, a directory or OWNER/NAME"
        )
    try:
        return resolve(name, folder.parent)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/config.json: `{field}`: {error}") from None


def open_tower(folder: Path) -> Renamed:
    """A tower's own repository, or the image half of a whole CLIP or SigLIP, under our names."""
    source, prefix = open_weights(folder), "vision_model."
    if not any(name.startswith(prefix) for name in source.shapes):
        # transformers 5 writes a tower saved alone without the prefix that older versions put.
        return Renamed(source, lambda name: tables.VISION_PREFIX + name)

    def rename(name: str) -> str | None:
        # What lies outside is the text half and the projections.
        inside = name.startswith(prefix)
        return tables.VISION_PREFIX + name.removeprefix(prefix) if inside else None

    return Renamed(source, rename)


def _connector_name(name: str) -> str:
    """The original takes what stands behind the keyword; anything else is left to be refused."""
    _, keyword, rest = name.partition("mm_projector.")
    return tables.CONNECTOR_PREFIX + rest if keyword else name
