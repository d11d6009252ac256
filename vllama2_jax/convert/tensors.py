"""Named tensors on disk, read one at a time: safetensors shards and torch's `.bin` files."""

import json
import re
from pathlib import Path

# safetensors asks NumPy for bfloat16 by name, which NumPy knows only beside this import.
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vllama2_jax.checkpoints import CheckpointError

_SAFETENSORS_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsFile:
    """One `.safetensors` file."""

    def __init__(self, path: Path):
        """Open `path`; the tensors stay on disk.

        Raises:
          CheckpointError: if it cannot be read.
        """
        self._path = path
        try:
            self._file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from None
        self.shapes = {
            name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype (bfloat16 as ml_dtypes').

        Raises:
          CheckpointError: if it does not hold plain floats, as quantised weights do not.
        """
        dtype = self._file.get_slice(name).get_dtype()
        if dtype not in _SAFETENSORS_FLOATS:
            raise _not_plain(self._path, name, dtype)
        return self._file.get_tensor(name)


class TorchFile:
    """One `.bin` or `.pt` state dict, read with `weights_only=True` (nothing in it can run)."""

    def __init__(self, path: Path, nested: str = ""):
        """Read the dict of `path` (its tensors are mapped, not copied, where torch can).

        Args:
          path: the file.
          nested: a key; where the file has it, the tensors lie there, and what stands around them
            is kept as `beside`.

        Raises:
          CheckpointError: if it is anything but a flat dict of tensors.
        """
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path}: reading torch files needs PyTorch; pip install 'vllama2_jax[torch]'"
            ) from None
        self._path = path
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:
            try:  # files in torch's old format cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(
                    f"{path}: not a plain torch state dict ({_torch_reason(error)}); "
                    "nothing of it was used, get the file from its authors again"
                ) from None
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{path}: expected a dict of tensors, found {type(state).__name__}; "
                "save the module's state_dict() itself"
            )
        self.beside = {}
        if nested and isinstance(state.get(nested), dict):
            self.beside = {name: value for name, value in state.items() if name != nested}
            state = state[nested]
        strange = [
            f"{name} ({type(value).__name__})"
            for name, value in state.items()
            if not isinstance(name, str) or not isinstance(value, torch.Tensor)
        ]
        if strange:
            raise CheckpointError(
                f"{path}: expected a flat dict of tensors, found {', '.join(strange)}; "
                "save the module's state_dict() itself"
            )
        self._state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype (bfloat16 as ml_dtypes').

        Raises:
          CheckpointError: if it does not hold plain floats, as quantised weights do not.
        """
        import torch

        tensor = self._state[name]
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise _not_plain(self._path, name, tensor.dtype)
        # Parameters would refuse to become NumPy arrays for the sake of their gradients.
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _not_plain(path: Path, name: str, dtype) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name} is {dtype}; only plain float weights can be read, "
        "get the checkpoint unquantised"
    )


def _torch_reason(error: Exception) -> str:
    """The cause in torch's long message, without its advice to unpickle after all."""
    text = str(error)
    if forbidden := re.search(r"GLOBAL ([\w.]*\w)", text):
        return f"it names code to run, {forbidden[1]}, which is never done"
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = [line.strip() for line in text.splitlines() if not line.startswith(advice)]
    return next((line[:200] for line in lines if line), type(error).__name__)


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
        """Join the sources' names.

        Raises:
          CheckpointError: listing every name that stands in two of them.
        """
        self._owner, twice = {}, []
        for source in sources:
            twice += [name for name in source.shapes if name in self._owner]
            self._owner |= dict.fromkeys(source.shapes, source)
        if twice:
            raise CheckpointError(
                f"tensors stand in two files of the checkpoint: {', '.join(sorted(twice))}"
            )
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
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("`weight_map` must map names to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{index}: not a readable index ({reason}); fetch it again") from None
    shards = sorted(set(weight_map.values()))
    strange = [name for name in shards if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{index}: shards must lie beside it, not at {', '.join(strange)}")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent}: missing shards: {', '.join(absent)}; the copy is incomplete"
        )
    merged = Merged([kind(index.parent / name) for name in shards])
    lost = sorted(set(weight_map) - set(merged.shapes))
    if lost:
        raise CheckpointError(f"{index}: names tensors that no shard holds: {', '.join(lost)}")
    return merged
