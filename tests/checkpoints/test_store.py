"""Saved models come back as they were, or not at all."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.checkpoints import (
    CheckpointError,
    GenerationDefaults,
    ModelCard,
    load_model,
    save_model,
)
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.media.preset import PAPER, REFERENCE
from vllama2_jax.models.zoo import ZOO

CONFIG = ZOO["2-7B"]


def card(**changes):
    fields = dict(
        config=CONFIG,
        image=image_spec(CONFIG.vision),
        preset=REFERENCE,
        generation=GenerationDefaults(stop_ids=(2,), repetition_penalty=1.05),
    )
    return ModelCard(**{**fields, **changes})


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)},
        "b": jnp.asarray(rng.normal(size=5), jnp.float32),
    }


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    save_model(folder, arrays(), card())
    return folder


def test_arrays_and_card_come_back_bit_for_bit(saved):
    params, found = load_model(saved, lambda _: shapes(arrays()))
    assert found == card()
    for ours, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(arrays()), strict=True):
        assert ours.dtype == wanted.dtype
        assert np.array_equal(np.asarray(ours), np.asarray(wanted))


def test_a_preset_is_part_of_the_card(tmp_path):
    save_model(tmp_path / "paper", arrays(), card(preset=PAPER))
    _, found = load_model(tmp_path / "paper", lambda _: shapes(arrays()))
    assert found.preset == PAPER


def test_another_dtype_is_only_by_request(saved):
    params, _ = load_model(saved, lambda _: shapes(arrays()), jnp.float32)
    assert params["a"]["kernel"].dtype == jnp.float32


def test_every_difference_of_the_tree_is_in_one_error(saved):
    wanted = shapes(arrays())
    wanted["b"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    wanted["c"] = wanted.pop("a")
    with pytest.raises(CheckpointError) as caught:
        load_model(saved, lambda _: wanted)
    message = str(caught.value)
    assert "1 missing: c/kernel" in message
    assert "1 unexpected: a/kernel" in message
    assert "b (found (5,), expected (6,))" in message
    assert "\n" not in message


def test_a_long_list_of_differences_is_whole(saved):
    wanted = {f"p{i:02d}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(60)}
    with pytest.raises(CheckpointError) as caught:
        load_model(saved, lambda _: wanted)
    assert f"60 missing: {', '.join(wanted)}; 2 unexpected: a/kernel, b" in str(caught.value)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("other", [jnp.int32, jnp.bool_])
def test_numbers_of_another_kind_are_refused(saved, other, dtype):
    wanted = shapes(arrays())
    wanted["a"]["kernel"] = jax.ShapeDtypeStruct((3, 4), other)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved, lambda _: wanted, dtype)
    name = np.dtype(other).name
    assert f"1 of another kind: a/kernel (found bfloat16, expected {name})" in str(caught.value)


def test_sizes_that_make_no_network_are_one_clear_error(saved):
    with pytest.raises(CheckpointError, match="sizes in its model card make no network"):
        load_model(saved, lambda card: shapes(1 // (card.config.num_frames - 8)))


def test_damaged_arrays_are_one_clear_error(saved, capfd):
    for path in (saved / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(saved, lambda _: shapes(arrays()))
    assert "Traceback" not in capfd.readouterr().err


def test_a_directory_without_its_arrays_is_refused(saved):
    shutil.rmtree(saved / "params")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(saved, lambda _: shapes(arrays()))


def test_saving_never_overwrites(saved):
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(saved, arrays(), card())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=99), "version 99"),
        (lambda data: data.update(format="other"), "not a model card"),
        (lambda data: data["config"].update(mystery=1), "mystery"),
        (lambda data: data["config"]["decoder"].pop("width"), "width"),
        (lambda data: data.pop("image"), "image"),
    ],
    ids=["version", "format", "unknown field", "missing nested field", "missing field"],
)
def test_a_card_that_does_not_fit_is_refused_by_name(saved, change, message):
    path = saved / "model_card.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load_model(saved, lambda _: shapes(arrays()))
