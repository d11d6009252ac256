"""Tensors come out of their files as they went in, and nothing in a file runs."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.convert.tensors import Merged, SafetensorsFile, TorchFile, open_weights

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def write_zipped(state, path):
    torch.save(state, path)


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_pickled(state, path):
    path.write_bytes(pickle.dumps(state, protocol=2))


@pytest.mark.parametrize("write", [write_zipped, write_legacy, write_pickled])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_malicious_pickle_does_nothing_and_is_named(tmp_path, write, name):
    path, mark = tmp_path / name, tmp_path / "mark"
    write({"model.norm.weight": Bomb(mark)}, path)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path) if name == "pytorch_model.bin" else TorchFile(path)
    assert not mark.exists()
    message = str(caught.value)
    assert str(path) in message and f"{os.mkdir.__module__}.mkdir" in message
    assert "\n" not in message
    # Neither torch's advice to unpickle after all, nor that of its memory mapping.
    assert "weights_only" not in message and "mmap" not in message
    # The bomb is real.
    torch.load(path, weights_only=False) if write is not write_pickled else pickle.loads(
        path.read_bytes()
    )
    assert mark.exists()


@pytest.mark.parametrize("write", [write_zipped, write_legacy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_files_keep_values_and_dtype(tmp_path, write, dtype):
    values = torch.linspace(-3, 3, 12).reshape(3, 4).to(dtype)
    state = {
        "plain": values,
        "turned": values.T,
        "parameter": torch.nn.Parameter(values),
    }
    write(state, tmp_path / "a.bin")
    source = TorchFile(tmp_path / "a.bin")
    assert source.shapes == {"plain": (3, 4), "turned": (4, 3), "parameter": (3, 4)}
    for name, tensor in state.items():
        found = source.read(name)
        assert found.dtype == np.dtype(str(dtype).removeprefix("torch."))
        assert np.array_equal(found.astype(np.float32), tensor.detach().float().numpy())


def test_bfloat16_safetensors_keep_values_and_dtype(tmp_path):
    values = torch.linspace(-3, 3, 12).reshape(3, 4).bfloat16()
    save_file({"a": values}, tmp_path / "a.safetensors")
    found = SafetensorsFile(tmp_path / "a.safetensors").read("a")
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found.astype(np.float32), values.float().numpy())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "found list"),
        (torch.ones(2), "found Tensor"),
        ({"model": {"a": torch.ones(2)}, "epoch": 3}, r"model \(dict\), epoch \(int\)"),
        ({"a": torch.ones(2), 7: torch.ones(2)}, r"7 \(Tensor\)"),
    ],
    ids=["list", "tensor", "nested", "number for a name"],
)
def test_what_is_not_a_flat_dict_of_tensors_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 9], ids=["empty", "nonsense"])
def test_broken_files_are_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert "mmap" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", [SafetensorsFile, TorchFile])
def test_quantised_weights_are_refused_by_name(tmp_path, kind, dtype):
    state, path = {"model.norm.weight": torch.ones(2).to(dtype)}, tmp_path / "weights"
    (save_file if kind is SafetensorsFile else torch.save)(state, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is .*plain float"):
        kind(path).read("model.norm.weight")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not a readable index"),
        ("{}", "not a readable index.*weight_map"),
        ('{"weight_map": ["a"]}', "not a readable index"),
        ('{"weight_map": {"a": 1}}', "not a readable index"),
        ("[]", "not a readable index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "must lie beside it"),
        ('{"weight_map": {"a": "x-1", "b": "x-2"}}', "missing shards: x-1, x-2"),
    ],
)
def test_a_broken_index_is_one_clear_error(tmp_path, index, words):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_tensor_that_an_index_promises_in_vain_is_listed(tmp_path):
    save_file({"here": torch.ones(1)}, tmp_path / "x")
    names = [f"lost.{i:02d}" for i in range(50)]
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys([*names, "here"], "x")})
    )
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert ", ".join(names) in str(caught.value)


def test_every_tensor_that_stands_in_two_files_is_listed(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1), "y": torch.ones(1), name: torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"two files of the checkpoint: x, y$"):
        Merged([SafetensorsFile(tmp_path / name) for name in ("a", "b")])


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        open_weights(tmp_path)
