"""Named tensors on disk, read one at a time: safetensors shards and torch's `.bin` files."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from vllama2_jax.checkpoints import CheckpointError


class SafetensorsFile:
    """One `.safetensors` file."""

    def __init__(self, path: Path):
        """Open `path`; the tensors stay on disk."""
        try:
            self._file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from None
        self.shapes = {
            name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype."""
        return self._file.get_tensor(name)


class TorchFile:
    """One `.bin` or `.pt` state dict, read with `weights_only=True` (nothing is unpickled)."""

    def __init__(self, path: Path):
        """Read the dict of `path` (its tensors are mapped, not copied, where torch can)."""
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path}: reading torch files needs PyTorch; pip install 'vllama2_jax[torch]'"
            ) from None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as first:
            try:  # files in torch's old format cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:
                reason = str(first).splitlines()[0][:200]
                raise CheckpointError(f"{path}: not a plain torch state dict ({reason})") from None
        self._state = {name: tensor for name, tensor in state.items() if hasattr(tensor, "shape")}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype (bfloat16 as ml_dtypes')."""
        import ml_dtypes
        import torch

        tensor = self._state[name].contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class Renamed:
    """A source under other names, and optionally rounded through another dtype."""

    def __init__(self, source, rename, through=None):
        """`rename(name)` gives the new name, or None to hide the tensor."""
        self._source, self._through = source, through
        self._names = {new: old for old in source.shapes if (new := rename(old)) is not None}
        self.shapes = {new: source.shapes[old] for new, old in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor by its new name."""
        tensor = self._source.read(self._names[name])
        return tensor if self._through is None else tensor.astype(self._through)


class Merged:
    """Several sources as one; a name in two of them is an error."""

    def __init__(self, sources):
        """Join the sources' names."""
        self._owner = {}
        for source in sources:
            for name in source.shapes:
                if name in self._owner:
                    raise CheckpointError(f"tensor {name} stands in two files of the checkpoint")
                self._owner[name] = source
        self.shapes = {name: source.shapes[name] for name, source in self._owner.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype."""
        return self._owner[name].read(name)


def open_weights(folder: Path):
    """All weights of a Hugging Face directory: an index with shards, or one file.

    Raises:
      CheckpointError: if there are none, or a shard that the index names is missing or broken.
    """
    for stem, suffix, kind in (
        ("model", "safetensors", SafetensorsFile),
        ("pytorch_model", "bin", TorchFile),
    ):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _open_shards(index, kind)
        if (folder / f"{stem}.{suffix}").is_file():
            return kind(folder / f"{stem}.{suffix}")
    raise CheckpointError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, whole or in shards); "
        "the copy is incomplete"
    )


def _open_shards(index: Path, kind):
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index}: not a readable index ({error}); fetch it again") from None
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index.parent}: missing shards: {', '.join(absent)}")
    merged = Merged([kind(index.parent / name) for name in shards])
    lost = sorted(set(weight_map) - set(merged.shapes))
    if lost:
        raise CheckpointError(f"{index}: names tensors that no shard holds: {', '.join(lost[:20])}")
    return merged
