"""Base repositories: a connector in torch's format, beside the plain models that it names."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.checkpoints import CheckpointError

torch = pytest.importorskip("torch")
from oracle import write_base_miniature  # noqa: E402

MESSAGES = [{"role": "user", "content": "What is shown in the video?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return write_base_miniature(root, "mistral", "clip", "stc_connector")


@pytest.fixture
def copied(base, tmp_path):
    shutil.copytree(base.folder.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "base"


def change(folder, **fields):
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def relative_error(ours, reference):
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def test_a_base_repository_equals_the_reference(base):
    frames = np.random.default_rng(0).integers(0, 256, (4, 45, 60, 3), np.uint8)
    with jax.default_matmul_precision("highest"):
        model = vl.load(base.folder, dtype="float32")
        # Without the connector's rounding through float16 this would be 1.6e-3.
        assert relative_error(model.encode(frames), base.encode(frames).numpy()) <= 2e-5
        assert relative_error(model.logits(frames, MESSAGES), base.logits(frames, MESSAGES)) <= 1e-4
    assert model.card.generation.stop_ids == (base.tokenizer.eos_token_id,)


def test_the_connector_is_rounded_through_float16(base):
    stored = torch.load(base.folder / "mm_projector.bin", weights_only=True)
    kernel = stored["model.mm_projector.readout.0.weight"].numpy()
    rounded = kernel.astype(np.float16).astype(np.float32)
    assert np.abs(kernel - rounded).max() > 0
    params = vl.load(base.folder, dtype="float32").generator.params
    assert np.array_equal(np.asarray(params["connector"]["readout_0"]["kernel"]).T, rounded)


@pytest.mark.parametrize(("tower", "connector"), [("clip", "linear"), ("siglip", "mlp2x_gelu")])
def test_towers_of_both_versions_of_transformers_are_understood(tower, connector, tmp_path):
    models = []
    for old in (False, True):
        root = tmp_path / str(old)
        oracle = write_base_miniature(root, "qwen2", tower, connector, old_tower=old)
        models.append(vl.load(oracle.folder, dtype="float32"))
        kernel = oracle.tower.state_dict()["encoder.layers.1.mlp.fc1.weight"].numpy()
        ours = models[-1].generator.params["vision"]["blocks"]["mlp"]["fc1"]["kernel"][1]
        assert np.array_equal(np.asarray(ours).T, kernel)
    assert models[0].config.vision == models[1].config.vision


def test_a_base_repository_without_its_connector_is_refused(copied):
    (copied / "mm_projector.bin").unlink()
    with pytest.raises(CheckpointError, match=r"tune_mm_mlp_adapter.*no mm_projector\.bin"):
        vl.load(copied)


@pytest.mark.parametrize("field", ["_name_or_path", "mm_vision_tower"])
@pytest.mark.parametrize("value", [..., "", None, 3], ids=["absent", "empty", "null", "number"])
def test_a_base_repository_that_names_no_part_is_refused(copied, monkeypatch, field, value):
    # An empty name must not mean the directory that the user happens to stand in.
    monkeypatch.chdir(copied.parent / "tower")
    change(copied, **{field: value})
    with pytest.raises(CheckpointError, match=f"`{field}`"):
        vl.load(copied)


def test_a_part_that_is_nowhere_is_named_with_its_field(copied):
    change(copied, _name_or_path="/training/machine/Mistral-7B")
    with pytest.raises(CheckpointError, match="`_name_or_path`: /training/machine/Mistral-7B: no"):
        vl.load(copied)


def test_every_strange_tensor_of_a_connector_file_is_refused(copied):
    path = copied / "mm_projector.bin"
    state = torch.load(path, weights_only=True)
    state |= {"model.embed_in.weight": torch.ones(2), "model.mm_projector.s9": torch.ones(1)}
    del state["model.mm_projector.readout.0.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        vl.load(copied)
    message = str(caught.value)
    assert "2 unexpected: model.embed_in.weight, model.mm_projector.s9" in message
    assert "1 missing: model.mm_projector.readout.0.bias" in message


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("part", ["base/mm_projector.bin", "language/pytorch_model.bin"])
def test_a_malicious_file_of_any_part_does_nothing(copied, part):
    path, mark = copied.parent / part, copied.parent / "mark"
    for file in path.parent.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": torch.ones(2), "model.mm_projector.x": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match=rf"{part}: not a plain torch state dict .*mkdir"):
        vl.load(copied)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the bomb is real
    assert mark.exists()
