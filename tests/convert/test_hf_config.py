"""config.json and generation_config.json: what they mean, and what is refused by name."""

import json

import pytest

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.convert.hf_config import (
    decoder_from_json,
    generation_defaults,
    image_spec,
    model_from_json,
    vision_from_json,
)
from vllama2_jax.models import zoo

DECODER = dict(
    model_type="videollama2_qwen2",
    vocab_size=100,
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SIZES = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
)
VISION = dict(mm_vision_tower="openai/clip-miniature", vision_config=SIZES)
MODEL = {**DECODER, **VISION, "mm_projector_type": "stc_connector"}


def changed(data, **fields):
    data = {**data, **fields}
    return {name: value for name, value in data.items() if value is not ...}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported; known: .*mistral"),
        (dict(model_type=...), "model_type None is not supported"),
        (dict(model_type=["qwen2"]), "model_type .* is not supported"),
        *(
            ({name: ...}, f"`{name}` is missing")
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        ),
        (dict(hidden_size=None), "`hidden_size` is missing"),
        (dict(hidden_size="40"), "`hidden_size` must be a whole number above 0, found '40'"),
        (dict(num_hidden_layers=0), "`num_hidden_layers` must be a whole number above 0, found 0"),
        (dict(num_hidden_layers=True), "`num_hidden_layers` must be .* found True"),
        (dict(vocab_size=1e2), "`vocab_size` must be a whole number above 0, found 100.0"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is no multiple of .* 3"),
        (dict(rms_norm_eps="1e-6"), "`rms_norm_eps` must be a number above 0"),
        (dict(rope_theta=-1.0), "`rope_theta` must be a number above 0"),
        (dict(use_sliding_window=True), "use_sliding_window is true"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rotary scaling .*linear"),
        (dict(rope_parameters={"rope_type": "yarn"}), "rotary scaling .*yarn"),
        (dict(rope_scaling="linear"), "`rope_scaling` must be an object"),
    ],
)
def test_a_decoder_that_is_not_understood_is_refused(fields, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        decoder_from_json(changed(DECODER, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(vision_config=...), "sizes of tower 'openai/clip-miniature' are not known"),
        (dict(vision_config=..., mm_vision_tower=...), "sizes of tower '' are not known"),
        (dict(mm_vision_tower=3), "`mm_vision_tower` must be a string"),
        (dict(vision_config=[1]), "`vision_config` must be an object"),
        (dict(vision_config={**SIZES, "model_type": "dinov2"}), "model_type` 'dinov2' is not"),
        (dict(mm_vision_tower="owner/tower"), "model_type` None is not supported; known: clip"),
        (dict(vision_config={**SIZES, "hidden_act": "relu"}), "hidden_act` 'relu' is not"),
        *(
            (
                dict(vision_config=changed(SIZES, **{name: ...})),
                rf"`vision_config\.{name}` is missing",
            )
            for name in SIZES
            if name != "image_size"
        ),
        (
            dict(vision_config={**SIZES, "patch_size": "7"}),
            r"`vision_config\.patch_size` must be a whole number above 0, found '7'",
        ),
        (dict(mm_vision_select_feature="cls_patch"), "select_feature 'cls_patch' is not"),
        (dict(mm_vision_select_layer=None), "`mm_vision_select_layer` must be .* found null"),
        (dict(mm_vision_select_layer="-2"), '`mm_vision_select_layer` must be .* found "-2"'),
        (dict(mm_vision_select_layer=-5), "tower's 4 blocks .* found -5"),
        (dict(mm_vision_select_layer=0), "tower's 4 blocks .* found 0"),
        (dict(mm_vision_select_layer=5), "tower's 4 blocks .* found 5"),
    ],
)
def test_a_tower_that_is_not_understood_is_refused(fields, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        vision_from_json(changed(VISION, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(mm_projector_type="qformer"), "unknown connector 'qformer'; known: stc_connector"),
        (dict(mm_projector_type=None), "unknown connector None"),
        (dict(mm_projector_type=["linear"]), "config.json"),
        (dict(mm_hidden_size=1024), r"connector\.in_dim 1024 != vision\.width 24"),
        (dict(mm_hidden_size="24"), "`mm_hidden_size` must be a whole number"),
        (dict(num_frames="8"), "`num_frames` must be a whole number"),
    ],
)
def test_a_connector_that_is_not_understood_is_refused(fields, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        model_from_json(changed(MODEL, **fields), "miniature")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "qwen2", "llama"])
def test_absent_fields_are_those_of_transformers(model_type):
    """The installed version's classes, which agree with 4.40's on these fields."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoConfig.for_model(model_type)
    sizes = changed(DECODER, model_type=model_type, num_key_value_heads=...)
    ours = decoder_from_json({**sizes, "num_attention_heads": 32, "hidden_size": 64})
    assert ours.norm_eps == reference.rms_norm_eps
    assert ours.max_positions == reference.max_position_embeddings
    assert ours.tie_embeddings == reference.tie_word_embeddings
    assert ours.num_kv_heads == (reference.num_key_value_heads or 32)
    # Qwen2's window is switched off by another field.
    window = None if model_type == "qwen2" else getattr(reference, "sliding_window", None)
    assert ours.sliding_window == window
    if model_type == "mixtral":
        assert (ours.num_experts, ours.top_k) == (
            reference.num_local_experts,
            reference.num_experts_per_tok,
        )


def test_an_explicit_null_is_not_an_absent_field():
    data = changed(DECODER, model_type="mistral", num_key_value_heads=None, sliding_window=None)
    config = decoder_from_json(data)
    assert config.num_kv_heads == config.num_heads
    assert config.sliding_window is None


@pytest.mark.parametrize(
    ("path", "model_type", "class_token"),
    [
        ("/models/siglip-like/clip", "clip_vision_model", True),
        ("/models/clip/mine", "siglip_vision_model", False),
        ("/models/siglip", None, False),
        ("/models/clip", None, True),
    ],
)
def test_the_declared_type_of_a_tower_wins_over_its_path(path, model_type, class_token):
    sizes = {**SIZES, "model_type": model_type}
    config = vision_from_json(dict(mm_vision_tower=path, vision_config=sizes))
    assert config.class_token is class_token
    assert image_spec(config).geometry == ("shortest_edge_crop" if class_token else "stretch")


def test_a_published_tower_needs_no_sizes():
    data = dict(mm_vision_tower="/copies/siglip-so400m-patch14-384")
    assert vision_from_json(data) == zoo.SIGLIP_SO400M_384


@pytest.mark.parametrize(
    ("file", "config", "eos", "stop_ids"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, 3, (5, 7, 3)),
        ({"eos_token_id": 3}, {}, 3, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": 9}, 3, (3,)),
        ({}, {"eos_token_id": 9}, 3, (9, 3)),
        (None, {"eos_token_id": [9, 3]}, 3, (9, 3)),
        (None, {}, 3, (3,)),
    ],
)
def test_stop_ids_are_the_files_and_the_tokenizers(tmp_path, file, config, eos, stop_ids):
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert generation_defaults(tmp_path, config, eos).stop_ids == stop_ids


def test_sampling_comes_from_the_generation_config(tmp_path):
    """The numbers are those of Qwen2-7B-Instruct's own file."""
    asked = dict(repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20, do_sample=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    found = generation_defaults(tmp_path, {}, 3)
    assert (found.repetition_penalty, found.top_k) == (1.05, 20)


@pytest.mark.parametrize(("file", "top_k"), [({}, 50), ({"top_k": None}, 50), ({"top_k": 0}, 0)])
def test_sampling_that_is_not_said_is_that_of_transformers(tmp_path, file, top_k):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    found = generation_defaults(tmp_path, {}, 3)
    assert (found.repetition_penalty, found.top_k) == (1.0, top_k)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (dict(eos_token_id="</s>"), "`eos_token_id` must be one id or a list"),
        (dict(eos_token_id=[1, "2"]), "`eos_token_id` must be one id or a list"),
        (dict(repetition_penalty="1.05"), "`repetition_penalty` must be a number"),
        (dict(top_k=-1), "`top_k` must be a whole number"),
    ],
)
def test_a_generation_config_of_other_types_is_refused(tmp_path, file, words):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match=words) as caught:
        generation_defaults(tmp_path, {}, 3)
    assert str(path) in str(caught.value)
