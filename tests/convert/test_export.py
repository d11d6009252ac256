"""Models of ours as released checkpoints: every number comes back, or nothing is written."""

import dataclasses
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert import export
from vllama2_jax.convert.export import export_huggingface, plan_shards, released_shapes
from vllama2_jax.convert.huggingface import load_huggingface
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import tokenizer_files

torch = pytest.importorskip("torch")
import oracle  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small_models import small_model, tensors_of, tiny_model  # noqa: E402
from test_published import SIZES  # noqa: E402
from test_published import released_shapes as pytorch_shapes  # noqa: E402

# (published model whose parts are taken, connector, its blocks per stage where not the published)
CASES = [
    ("2-7B", "stc_connector", 1),
    ("2-8x7B", "stc_connector", 1),
    ("2-72B", "stc_connector_v35", 2),
    ("2.1-7B-16F", "stc_connector_v35", 1),
    ("2.1-7B-16F", "stp_connector", 1),
    ("2-7B", "spatial_conv", None),
    ("2.1-7B-16F", "spatial_pool", None),
    ("2-7B", "mlp2x_gelu", None),
    ("2.1-7B-16F", "linear", None),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture
def model(tokenizers):
    return small_model(tokenizers, "2.1-7B-16F", "linear")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def assert_same(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype and np.array_equal(found[path], leaf), path


@pytest.mark.parametrize(("name", "connector", "depth"), CASES)
def test_every_family_and_connector_comes_back_bit_for_bit(
    name, connector, depth, tokenizers, tmp_path
):
    params, card, files = small_model(tokenizers, name, connector, depth)
    export_huggingface(tmp_path, params, card, files, dtype="float32")
    found, found_card, folder = load_huggingface(tmp_path, dtype=np.float32, scan_layers=True)
    assert found_card == card
    assert folder == tmp_path
    assert_same(found, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tiny_comes_back_in_the_dtype_that_it_was_exported_in(dtype, tiny, tmp_path):
    params, card, _ = tiny
    export_huggingface(tmp_path, *tiny, dtype=dtype)
    found, found_card, _ = load_huggingface(tmp_path, dtype=jnp.dtype(dtype), scan_layers=True)
    assert found_card == card
    assert_same(found, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params))
    assert {str(t.dtype) for t in tensors_of(tmp_path).values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("family", "tower", "connector"),
    [
        ("mistral", "clip", "stc_connector"),
        ("mixtral", "clip", "linear"),
        ("qwen2", "siglip", "stc_connector_v35"),
    ],
)
def test_a_released_checkpoint_comes_back_byte_for_byte(family, tower, connector, tmp_path):
    released, out = tmp_path / "released", tmp_path / "out"
    oracle.write_miniature(released, family, tower, connector)
    params, card, tokenizer = load_huggingface(released, dtype=np.float32, scan_layers=True)
    export_huggingface(out, params, card, tokenizer_files(tokenizer), dtype="float32")
    theirs, ours = tensors_of(released), tensors_of(out)
    assert set(ours) == set(theirs)
    # The tower's last block (of four), and what comes behind it: nothing depends on them.
    tower = "model.vision_tower.vision_tower.vision_model."
    unused = tuple(f"{tower}{part}." for part in ("encoder.layers.3", "post_layernorm", "head"))
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype
        if name.startswith(unused):
            assert not ours[name].any()
        else:
            assert ours[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    for path in tokenizer_files(released):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert load_huggingface(out, dtype=np.float32, scan_layers=True)[1] == card


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_those_of_the_published_models(name):
    assert released_shapes(ZOO[name]) == pytorch_shapes(name)


def test_shards_hold_what_the_index_says_and_no_more_than_asked(model, tmp_path):
    params, card, files = model
    limit = 20_000  # the embedding alone is larger
    export_huggingface(tmp_path, params, card, files, dtype="bfloat16", max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    paths = sorted(tmp_path.glob("*.safetensors"))
    count, total, held = len(paths), 0, {}
    assert count > 2
    for number, path in enumerate(paths, 1):
        assert path.name == f"model-{number:05d}-of-{count:05d}.safetensors"
        state = load_file(path)
        size = sum(tensor.nbytes for tensor in state.values())
        assert size <= limit or len(state) == 1
        total += size
        held |= dict.fromkeys(state, path.name)
    assert index == {"metadata": {"total_size": total}, "weight_map": held}
    assert set(held) == set(released_shapes(card.config))


def test_what_fits_into_one_file_has_no_index(model, tmp_path):
    export_huggingface(tmp_path, *model)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([3, 3, 3, 3], ["ab", "cd"]),
        ([6, 1], ["a", "b"]),
        ([7, 9, 1, 5, 1], ["a", "b", "cd", "e"]),
        ([1, 7], ["a", "b"]),
    ],
)
def test_a_file_is_filled_until_the_next_tensor_does_not_fit(sizes, shards):
    planned = plan_shards(dict(zip("abcde", sizes, strict=False)), 6)
    assert ["".join(names) for names in planned] == shards


def test_one_shard_at_a_time_stands_in_memory(model, tmp_path, monkeypatch):
    params, card, files = model
    saved, save_file = [], export.save_file

    def save(tensors, path, metadata):
        assert not any(kept() is not None for kept in saved)
        saved.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(export, "save_file", save)
    export_huggingface(tmp_path, params, card, files, max_shard_bytes=20_000)
    assert len(saved) == len(released_shapes(card.config))


def test_who_may_read_one_file_may_read_all(model, tmp_path):
    export_huggingface(tmp_path, *model, max_shard_bytes=20_000)
    modes = {path.suffix: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes[".safetensors"] == modes[".json"]


def test_progress_counts_every_tensor(model, tmp_path):
    seen = []
    export_huggingface(tmp_path, *model, progress=lambda *counts: seen.append(counts))
    total = len(released_shapes(model[1].config))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_an_interrupted_export_is_no_model(model, tmp_path):
    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_huggingface(tmp_path, *model, progress=stop, max_shard_bytes=20_000)
    assert list(tmp_path.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="not a model"):
        vl.load(tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_huggingface(tmp_path, *model)


def refusal(folder, params, card, files, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        export_huggingface(folder, params, card, files, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parameters_of_another_network_are_listed_and_nothing_is_written(model, tmp_path):
    params, card, files = model
    params["connector"]["readout_0"]["kernel"] = np.ones((3, 3), np.float32)
    del params["decoder"]["final_norm"]
    params["decoder"]["head"] = np.ones(1, np.float32)
    message = refusal(tmp_path / "out", params, card, files)
    assert "1 missing: decoder/final_norm/scale; 1 unexpected: decoder/head; " in message
    assert "connector/readout_0/kernel (found (3, 3), expected (24, 40))" in message
    assert not (tmp_path / "out").exists()


def test_a_weight_that_float16_cannot_hold_is_refused(model, tmp_path):
    params, card, files = model
    params["decoder"]["layers"]["mlp"]["up"]["kernel"][1, 2, 3] = 7e4
    message = refusal(tmp_path, params, card, files, dtype="float16")
    assert "model.layers.1.mlp.up_proj.weight: a weight of 7e+04 is too large" in message
    assert not (tmp_path / "config.json").exists()


def test_what_is_no_dtype_of_weights_is_refused(model, tmp_path):
    message = refusal(tmp_path, *model, error=ValueError, dtype="int8")
    assert message == "dtype 'int8' is not supported; known: float32, bfloat16, float16"


def test_another_models_tokenizer_is_refused(model, tokenizers, tmp_path):
    params, card, _ = model
    *_, files = small_model(tokenizers, "2-7B", "linear")
    assert "not the tokenizer files" in refusal(tmp_path, params, card, files)
    assert "needs its tokenizer" in refusal(tmp_path, params, card, [])


def test_a_card_that_the_format_cannot_hold_is_refused_before_anything_is_written(model, tmp_path):
    params, card, files = model
    vision = dataclasses.replace(card.config.vision, pre_norm=True)
    card = dataclasses.replace(card, config=dataclasses.replace(card.config, vision=vision))
    message = refusal(tmp_path / "out", params, card, files)
    assert "config.vision.pre_norm True would be read as False" in message
    assert not (tmp_path / "out").exists()
