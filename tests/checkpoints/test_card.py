"""A model card is read as it was written, or refused by the name of what does not fit."""

import json

import pytest

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults, ModelCard
from vllama2_jax.checkpoints.card import read_card, write_card
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.media.preset import PRESETS
from vllama2_jax.models.zoo import ZOO


def card(name="2-7B", preset="reference"):
    config = ZOO[name]
    return ModelCard(
        config, image_spec(config.vision), PRESETS[preset], GenerationDefaults((2, 7), 1.05, 20)
    )


# `tiny` hears two seconds, fewer than the original hears of a video.
@pytest.mark.parametrize("name", [name for name in ZOO if name != "tiny"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_published_card_comes_back(tmp_path, name, preset):
    write_card(tmp_path, card(name, preset))
    assert read_card(tmp_path) == card(name, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_card_of_before_sound_was_known_hears_as_its_preset_does(tmp_path, preset):
    write_card(tmp_path, card(preset=preset))
    path = tmp_path / "model_card.json"
    data = json.loads(path.read_text())
    del data["preset"]["sound"]
    path.write_text(json.dumps(data))
    assert read_card(tmp_path).preset == PRESETS[preset]


def refusal(tmp_path, *changes):
    write_card(tmp_path, card())
    path = tmp_path / "model_card.json"
    data = json.loads(path.read_text())
    for place, value in changes:
        node = data
        *parents, name = place.split(".")
        for parent in parents:
            node = node[parent]
        node[name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        read_card(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("config", None, "config must be an object, not None"),
        ("config.vision", None, "config.vision must be an object, not None"),
        ("config.decoder", [], "config.decoder must be an object, not []"),
        ("generation", None, "generation must be an object, not None"),
        ("image", "stretch", "image must be an object, not 'stretch'"),
        ("config.decoder.num_layers", "32", "num_layers must be a whole number, not '32'"),
        ("config.decoder.num_layers", 32.0, "num_layers must be a whole number, not 32.0"),
        ("config.decoder.num_layers", True, "num_layers must be a whole number, not True"),
        ("config.decoder.qkv_bias", 1, "qkv_bias must be true or false, not 1"),
        ("config.decoder.norm_eps", "1e-5", "norm_eps must be a number, not '1e-5'"),
        ("config.decoder.norm_eps", None, "norm_eps must be a number, not None"),
        ("config.decoder.sliding_window", "9", "sliding_window must be a whole number, not '9'"),
        ("config.decoder.family", 3, "config.decoder.family must be a string, not 3"),
        ("config.connector.padding", [1, 1], "padding must have 3 values, not 2"),
        ("config.connector.padding", [1, 1, "1"], "padding[2] must be a whole number, not '1'"),
        ("config.connector.padding", "111", "padding must be a list, not '111'"),
        ("config.connector.in_dim", 7, "connector.in_dim 7 != vision.width 1024"),
        ("generation.stop_ids", 2, "generation.stop_ids must be a list, not 2"),
        ("generation.stop_ids", [2.5], "generation.stop_ids[0] must be a whole number, not 2.5"),
        ("preset.sampling", "guess", "unknown sampling 'guess'"),
        ("template", None, "template must be a string, not None"),
    ],
)
def test_values_of_other_types_are_refused_by_name(tmp_path, place, value, words):
    assert words in refusal(tmp_path, (place, value))


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    message = refusal(
        tmp_path,
        ("config.vision", None),
        ("config.decoder.width", "4096"),
        ("config.decoder.mystery", 1),
        ("generation", {"top_k": 5}),
        ("preset", {}),
    )
    assert "config.vision must be an object" in message
    assert "config.decoder: unknown fields mystery" in message
    assert "config.decoder.width must be a whole number" in message
    assert "generation: missing fields stop_ids" in message
    assert "preset: missing fields black_frames_transposed, clip_end_minus_one" in message


def test_a_whole_number_will_do_for_a_float(tmp_path):
    write_card(tmp_path, card())
    path = tmp_path / "model_card.json"
    data = json.loads(path.read_text())
    data["config"]["decoder"]["rope_theta"] = 1000000
    path.write_text(json.dumps(data))
    found = read_card(tmp_path).config.decoder.rope_theta
    assert (found, type(found)) == (1e6, float)
