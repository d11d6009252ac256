"""Model cards as a released checkpoint's JSON files: what they say, and what they cannot."""

import dataclasses
import json

import pytest

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults, ModelCard
from vllama2_jax.convert.hf_card import card_from_json, card_to_json
from vllama2_jax.convert.hf_config import generation_from_json, image_spec
from vllama2_jax.media.preset import PAPER, PAPER_SOUND, REFERENCE
from vllama2_jax.models.zoo import CONNECTOR_KINDS, ZOO, connector_config
from vllama2_jax.text import Tokenizer

EOS = 2


class Words(Tokenizer):
    """As much of a tokenizer as a card needs."""

    def __init__(self, folder, bos=1):
        ids = {"bos": bos, "eos": EOS, "unk": 0, "pad": 0}
        nothing = dict(special_tokens={}, chat_template=None, special_ids=frozenset())
        super().__init__(folder, vocab_size=3, ids=ids, byte_ids=frozenset(), **nothing)

    def encode(self, text):
        return []

    def decode(self, ids, skip_special=True):
        return ""


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"words")
    return Words(tmp_path)


def card_of(config, tokenizer, **fields):
    short = config.audio and config.audio.seconds < REFERENCE.sound.joint_seconds
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=dataclasses.replace(REFERENCE, sound=PAPER_SOUND) if short else REFERENCE,
        generation=GenerationDefaults((EOS,)),
        tokenizer=tokenizer.fingerprint(),
    )
    return dataclasses.replace(card, **fields)


def read_back(card, tokenizer, change=dict):
    """The card that an importer makes of the files, `change`d in between."""
    data, generation = json.loads(json.dumps(card_to_json(card, tokenizer, "bfloat16")))
    defaults = generation_from_json(generation, data, tokenizer.eos_id, "generation_config.json")
    return card_from_json(change(data), defaults, tokenizer, "directory")


def with_part(config, part, **fields):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **fields)}
    )


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_every_published_network_is_read_back_as_it_is(name, select_layer, tokenizer):
    card = card_of(with_part(ZOO[name], "vision", select_layer=select_layer), tokenizer)
    assert read_back(card, tokenizer) == card


@pytest.mark.parametrize("kind", CONNECTOR_KINDS)
@pytest.mark.parametrize("depth", [None, 0, 3])
def test_every_connector_is_read_back_as_it_is(kind, depth, tokenizer):
    connector = connector_config(kind, 1152, 3584, depth)
    config = dataclasses.replace(ZOO["2.1-7B-16F"], connector=connector)
    assert read_back(card_of(config, tokenizer), tokenizer).config == config


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("decoder", dict(head_dim=96, rope_theta=12345.5, max_positions=100)),
        ("decoder", dict(sliding_window=4096, tie_embeddings=True, norm_eps=3e-7)),
        ("decoder", dict(family="llama", num_kv_heads=32)),
        ("decoder", dict(family="mixtral", num_experts=4, top_k=3)),
        ("vision", dict(image_size=224, norm_eps=2e-5, activation="gelu_tanh")),
    ],
)
def test_unpublished_sizes_are_read_back(part, fields, tokenizer):
    config = with_part(ZOO["2-7B"], part, **fields)
    assert read_back(card_of(config, tokenizer), tokenizer).config == config


@pytest.mark.parametrize(
    "generation",
    [
        GenerationDefaults((EOS,), repetition_penalty=1.05, top_k=20),
        GenerationDefaults((7, EOS, 0), top_k=50),
    ],
)
def test_rules_of_our_own_are_read_back(generation, tokenizer):
    card = card_of(ZOO["2-7B"], tokenizer, generation=generation)
    image = dataclasses.replace(card.image, geometry="stretch", std=(0.25, 0.5, 0.1))
    preset = dataclasses.replace(PAPER, name="mine", gif_fps=12.5)
    card = dataclasses.replace(card, image=image, preset=preset, template="chatml")
    assert read_back(card, tokenizer) == card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "2-7B",
            dict(
                architectures=["Videollama2MistralForCausalLM"],
                model_type="videollama2_mistral",
                mm_vision_tower="openai/clip-vit-large-patch14-336",
                mm_hidden_size=1024,
                mm_projector_type="stc_connector",
                num_frames=8,
                sliding_window=None,
            ),
        ),
        (
            "2-8x7B",
            dict(
                architectures=["Videollama2MixtralForCausalLM"],
                model_type="videollama2_mixtral",
                num_local_experts=8,
                num_experts_per_tok=2,
            ),
        ),
        (
            "2.1-7B-16F",
            dict(
                architectures=["Videollama2Qwen2ForCausalLM"],
                model_type="videollama2_qwen2",
                mm_vision_tower="google/siglip-so400m-patch14-384",
                mm_hidden_size=1152,
                mm_projector_type="stc_connector_v35",
                mm_vision_select_layer=-2,
                mm_vision_select_feature="patch",
                num_frames=16,
                tune_mm_mlp_adapter=False,
                use_sliding_window=False,
                torch_dtype="bfloat16",
            ),
        ),
    ],
)
def test_fields_of_published_models_are_the_released_ones(name, expected, tokenizer):
    data, _ = card_to_json(card_of(ZOO[name], tokenizer), tokenizer, "bfloat16")
    assert {field: data[field] for field in expected} == expected
    # The tower's name gives its sizes, and a head's width follows from the others.
    assert not {"vision_config", "head_dim"} & set(data)
    assert data["vllama2_jax"] == {"name": name}


@pytest.mark.parametrize("name", ["2-7B", "2-8x7B", "2-72B"])
def test_transformers_reads_the_decoder_that_is_meant(name, tokenizer):
    transformers = pytest.importorskip("transformers")
    decoder = ZOO[name].decoder
    data, _ = card_to_json(card_of(ZOO[name], tokenizer), tokenizer, "bfloat16")
    cls = getattr(transformers, data["architectures"][0].removeprefix("Videollama2"))
    theirs = cls.config_class.from_dict(data)
    assert theirs.vocab_size == decoder.vocab_size
    assert theirs.hidden_size == decoder.width
    assert theirs.intermediate_size == decoder.mlp_dim
    assert theirs.num_hidden_layers == decoder.num_layers
    assert theirs.num_attention_heads == decoder.num_heads
    assert theirs.num_key_value_heads == decoder.num_kv_heads
    assert theirs.rms_norm_eps == decoder.norm_eps
    assert theirs.rope_parameters["rope_theta"] == decoder.rope_theta
    assert theirs.max_position_embeddings == decoder.max_positions
    assert theirs.tie_word_embeddings == decoder.tie_embeddings
    assert theirs.sliding_window is None
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, EOS)


def test_a_tokenizer_without_a_beginning_names_none(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"words")
    tokenizer = Words(tmp_path, bos=None)
    card = card_of(ZOO["tiny"], tokenizer)
    for data in card_to_json(card, tokenizer, "float32"):
        assert "bos_token_id" not in data and data["eos_token_id"] == EOS


@pytest.mark.parametrize("pad", [False, True])
def test_padding_to_a_square_is_what_the_original_calls_it(pad, tokenizer):
    preset = dataclasses.replace(REFERENCE, square_pad=pad)
    card = card_of(ZOO["2-7B"], tokenizer, preset=preset)
    data, _ = card_to_json(card, tokenizer, "bfloat16")
    assert data["image_aspect_ratio"] == ("pad" if pad else "square")


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("vision", dict(pre_norm=True), "config.vision.pre_norm True would be read as False"),
        ("vision", dict(activation="relu"), "'relu' would be read as 'gelu_tanh'"),
        ("vision", dict(image_mean=(0.0, 0.5, 0.5)), "image_mean (0.0, 0.5, 0.5) would be read"),
        ("decoder", dict(sliding_window=8), "decoder.sliding_window 8 would be read as None"),
        ("decoder", dict(qkv_bias=False), "decoder.qkv_bias False would be read as True"),
        ("decoder", dict(family="gpt"), "model_type 'videollama2_gpt' is not supported"),
        ("connector", dict(padding=(1, 0, 0)), "connector.padding (1, 0, 0) would be read as"),
        ("connector", dict(kind="mine"), "unknown connector 'mine'"),
    ],
)
def test_a_network_that_the_format_has_no_words_for_is_refused(part, fields, words, tokenizer):
    config = with_part(ZOO["2.1-7B-16F"], part, **fields)
    with pytest.raises(CheckpointError) as caught:
        card_to_json(card_of(config, tokenizer), tokenizer, "bfloat16")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_end_that_every_importer_adds_cannot_be_left_out(tokenizer):
    card = card_of(ZOO["2-7B"], tokenizer, generation=GenerationDefaults((7,)))
    with pytest.raises(CheckpointError, match=r"stop_ids \(7,\) would be read as \(7, 2\)"):
        card_to_json(card, tokenizer, "bfloat16")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"name": "x", "depth": 1}, "unknown fields depth"),
        ({}, "missing fields name"),
        ({"name": "x", "connector_depth": -1}, "must not be negative"),
        ({"name": "x", "preset": "paper"}, "preset must be an object"),
        ([], "must be an object"),
    ],
)
def test_fields_of_ours_that_are_not_understood_are_refused(own, words, tokenizer):
    card = card_of(ZOO["2-7B"], tokenizer)
    with pytest.raises(CheckpointError, match=f"config.json: `vllama2_jax`: .*{words}") as caught:
        read_back(card, tokenizer, lambda data: {**data, "vllama2_jax": own})
    assert "\n" not in str(caught.value)


def test_a_released_checkpoint_is_called_as_its_directory(tokenizer):
    def released(data):
        return {name: value for name, value in data.items() if name != "vllama2_jax"}

    card = card_of(ZOO["2-7B"], tokenizer)
    found = read_back(card, tokenizer, released)
    assert found == dataclasses.replace(
        card, config=dataclasses.replace(card.config, name="directory")
    )
