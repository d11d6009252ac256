"""Export to the released Hugging Face layout: the inverse of `huggingface.py`.

DIR/config.json             sizes and media rules; written last
DIR/generation_config.json  decoding defaults
DIR/model*.safetensors      the tensors under transformers 4.40's names; an index where in shards
DIR/tokenizer*, ...         the tokenizer's own files

A released checkpoint also holds tensors of the tower that the selected hidden state does not depend
on. They are written, so that the original's code finds every name that it looks for, but as zeros:
no parameter of ours stands for them.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.store import check_tree, flatten, float_dtype
from vllama2_jax.convert import tables
from vllama2_jax.convert.hf_card import card_to_json
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.text import load_tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # as transformers 4.40 does
_GENERATION = "generation_config.json"


def export_huggingface(
    folder: str | Path,
    params: dict,
    card: ModelCard,
    tokenizer_files: Iterable[str | Path],
    *,
    dtype: str | np.dtype = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a released checkpoint lies on disk; `load_huggingface` reads it back.

    Beside `params`, one shard stands in memory at a time. A directory without config.json is an
    unfinished one.

    Args:
      folder: where to; it must not exist or be empty.
      params: nested dict of arrays (unboxed), layers stacked.
      card: what describes them.
      tokenizer_files: of the model's tokenizer (`text.tokenizer_files`), copied as they are.
      dtype: of the tensors: bfloat16 as released, float16 or float32.
      max_shard_bytes: of one file's tensors; only a single tensor may be larger.
      progress: called with (tensors written, tensors in all).

    Raises:
      CheckpointError: if `folder` is not empty, if the format cannot say what the card says, or if
        the parameters are not those of the card, listing every difference; before anything is
        written. Also for a weight that is too large for `dtype`.
      ValueError: for another dtype.
    """
    folder, dtype = Path(folder), float_dtype(dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; choose another or remove it")
    tokenizer_files = [Path(path) for path in tokenizer_files]
    if not tokenizer_files:
        raise CheckpointError(f"{folder}: a released checkpoint needs its tokenizer's files")
    tokenizer = load_tokenizer(tokenizer_files[0].parent)
    if card.tokenizer not in ("", tokenizer.fingerprint()):
        raise CheckpointError(
            f"{tokenizer.folder}: these are not the tokenizer files that the model was saved with; "
            "give those"
        )
    config, generation = card_to_json(card, tokenizer, dtype.name)
    flat = flatten(params)
    check_tree(flat, flatten(abstract_params(card.config)), "the tree of parameters")

    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_files:
        shutil.copyfile(path, folder / path.name)
    _write_json(folder / _GENERATION, generation)
    _write_tensors(folder, flat, card.config, dtype, max_shard_bytes, progress)
    _write_json(folder / "config.json", config)


def released_shapes(config: VLlama2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released checkpoint's tensors, needed or not."""
    shapes = {row.source: row.shape for row in _written_rows(config)}
    shapes |= tables.vision_unused(config.vision, tables.VISION_PREFIX)
    if config.audio:
        shapes |= tables.audio_unused(config.audio, tables.AUDIO_PREFIX)
    return shapes


def _written_rows(config: VLlama2Config) -> list[tables.Row]:
    aliases = ()
    if config.audio:
        aliases = tables.audio_aliases(config.audio, tables.AUDIO_PREFIX, "audio")
    return [*tables.model_rows(config), *aliases]


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Which tensors go into one file, in their order.

    Args:
      sizes: name -> bytes.
      limit: bytes in one file; a larger tensor gets a file of its own.
    """
    shards, filled = [], 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_tensors(folder: Path, flat: dict, config: VLlama2Config, dtype, limit, progress) -> None:
    shapes = released_shapes(config)
    rows = {row.source: row for row in _written_rows(config)}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards, weight_map = plan_shards(sizes, limit), {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            if name in rows:
                tensors[name] = _tensor(flat, rows[name], dtype)
            else:
                tensors[name] = np.zeros(shapes[name], dtype)
            weight_map[name] = file
            if progress:
                progress(len(weight_map), len(shapes))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors makes files that their owner alone may read.
        shutil.copymode(folder / _GENERATION, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensor(flat: dict, row: tables.Row, dtype) -> np.ndarray:
    """The released tensor of one row, contiguous."""
    leaf = flat[row.target]
    # Indexed where the array is, so that a layer comes to the host and not the whole stack.
    part = np.asarray(leaf[row.index] if row.index else leaf)
    with np.errstate(over="ignore"):
        cast = part.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(part)):
        raise CheckpointError(
            f"{row.source}: a weight of {float(np.abs(part).max()):.3g} is too large for float16; "
            "export as bfloat16 or float32"
        )
    return np.ascontiguousarray(row.to_tensor(cast))


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
