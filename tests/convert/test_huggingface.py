"""Released directories through the public door: right values, or one error that says it all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.convert.huggingface import resolve

torch = pytest.importorskip("torch")
from oracle import write_miniature  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return write_miniature(folder, "qwen2", "siglip", "stc_connector_v35")


@pytest.fixture
def folder(miniature, tmp_path):
    shutil.copytree(miniature.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        vl.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bfloat16_checkpoints_load_with_the_right_values(miniature, folder):
    for path in shards(folder):
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    model = vl.load(folder, dtype="float32")
    params, language = model.generator.params, miniature.language.state_dict()
    for ours, theirs in (
        (params["decoder"]["embed_tokens"]["embedding"], language["model.embed_tokens.weight"]),
        (
            params["decoder"]["layer_2"]["mlp"]["down"]["kernel"].T,
            language["model.layers.2.mlp.down_proj.weight"],
        ),
        (
            params["connector"]["sampler"]["kernel"].transpose(4, 3, 0, 1, 2),
            miniature.connector.state_dict()["sampler.0.weight"],
        ),
        (
            params["vision"]["patch_embed"]["kernel"].transpose(3, 2, 0, 1),
            miniature.tower.state_dict()["embeddings.patch_embedding.weight"],
        ),
    ):
        assert np.array_equal(np.asarray(ours), theirs.bfloat16().float().numpy())


def test_every_difference_of_the_tensors_is_in_one_error(folder):
    first, second = shards(folder)
    state, rest = load_file(first), load_file(second)
    rest.pop("model.norm.weight", None)
    missing = sorted(name for name in state if "mm_projector" in name or ".layers.0." in name)
    missing = [name for name in missing if "vision_tower" not in name][:25]
    strange = {f"model.strange.{i:02d}": torch.ones(1) for i in range(30)}
    kept = {name: tensor for name, tensor in state.items() if name not in missing}
    kept["model.norm.weight"] = torch.ones(7)
    save_file(kept | strange, first)
    save_file(rest, second)
    weight_map = dict.fromkeys(kept, first.name) | dict.fromkeys(rest, second.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert f"25 missing: {', '.join(missing)}; " in message
    assert f"30 unexpected: {', '.join(strange)}; " in message
    assert "1 misshapen: model.norm.weight (found (7,), expected (40,))" in message


def test_a_missing_shard_is_named(folder):
    shards(folder)[1].unlink()
    assert f"missing shards: {shards(folder)[0].name.replace('1-of', '2-of')}" in refusal(folder)


def test_a_cut_shard_is_named(folder):
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(folder)


def test_a_broken_index_is_named(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-40])
    assert f"{index}: not a readable index" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_json_is_named(folder, name, content):
    (folder / name).write_text(content)
    assert str(folder / name) in refusal(folder)


def test_audio_fields_without_the_towers_tensors_list_what_is_missing(folder):
    path = folder / "config.json"
    audio = {"mm_audio_tower": "BEATs.pt", "mm_projector_a_type": "mlp2x_gelu"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **audio}))
    message = refusal(folder)
    assert "missing" in message and "model.audio_tower.patch_embedding.weight" in message
    assert "unexpected" not in message


HUB_CONFIGURATION = ["config.json", "tokenizer.model", "tokenizer_config.json"]
BOTH = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (BOTH, BOTH[:2]),
        (
            ["pytorch_model-1.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model-1.bin", "pytorch_model.bin.index.json"],
        ),
        (["mm_projector.bin"], ["mm_projector.bin"]),
        (
            ["model.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "a.h5"],
            ["model.safetensors"],
        ),
    ],
    ids=["both", "torch alone", "base", "other layouts"],
)
def test_weights_are_fetched_once_and_safetensors_first(tmp_path, monkeypatch, files, wanted):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(
            files + HUB_CONFIGURATION,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {*wanted, *HUB_CONFIGURATION}


@pytest.mark.parametrize("name", ["", "nowhere", "/no/where", "./no/where", "a/b/c"])
def test_names_that_cannot_be_on_the_hub_are_never_fetched(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        resolve(name)


def test_a_directory_needs_no_hub(tmp_path):
    assert resolve(tmp_path) == Path(tmp_path)
