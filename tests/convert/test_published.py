"""The tables against the published models' real sizes; no weight is ever made."""

import dataclasses
import math

import pytest

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert import tables
from vllama2_jax.convert.huggingface import check_names
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO, model_config

torch = pytest.importorskip("torch")
from oracle import Connector, released_state  # noqa: E402

BASES = {
    "mistral": ("MistralConfig", dict(vocab_size=32000)),
    "mixtral": ("MixtralConfig", dict(vocab_size=32000)),
    "qwen2": ("Qwen2Config", dict(vocab_size=152064)),
}
SIZES = {
    "2-7B": (4096, 14336, 32, 32, 8),
    "2-7B-16F": (4096, 14336, 32, 32, 8),
    "2-8x7B": (4096, 14336, 32, 32, 8),
    "2-72B": (8192, 29568, 80, 64, 8),
    "2.1-7B-16F": (3584, 18944, 28, 28, 4),
}


def released_shapes(name):
    """Shapes of a released checkpoint, from PyTorch modules on the meta device."""
    import transformers

    config = ZOO[name]
    hidden, mlp, layers, heads, kv_heads = SIZES[name]
    family = config.decoder.family
    cls, fields = BASES[family]
    with torch.device("meta"):
        language = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, cls)(
                hidden_size=hidden,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                tie_word_embeddings=False,
                **fields,
            )
        )
        if config.vision.class_token:
            tower = transformers.CLIPVisionModel(
                transformers.CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    image_size=336,
                    patch_size=14,
                )
            )
        else:
            tower = transformers.SiglipVisionModel(
                transformers.SiglipVisionConfig(
                    hidden_size=1152,
                    intermediate_size=4304,
                    num_hidden_layers=27,
                    num_attention_heads=16,
                    image_size=384,
                    patch_size=14,
                )
            )
        connector = Connector(config.connector.kind, tower.config.hidden_size, hidden)
    state = released_state(tower, connector, language)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", SIZES)
def test_released_names_and_shapes_fit_the_tables(name):
    check_names(released_shapes(name), ZOO[name], name)


@pytest.mark.parametrize("name", SIZES)
def test_tables_fill_every_parameter_exactly(name):
    config = ZOO[name]
    parameters = flatten(abstract_params(config))
    filled = dict.fromkeys(parameters, 0)
    for row in tables.model_rows(config):
        filled[row.target] += math.prod(row.shape)
    sizes = {path: leaf.size for path, leaf in parameters.items()}
    assert filled == sizes


def test_connector_of_the_7b_has_the_published_size():
    rows = tables.connector_rows(ZOO["2-7B"].connector, "", "")
    assert sum(math.prod(row.shape) for row in rows) == 489_188_608


def test_every_difference_is_listed_in_one_error():
    shapes = {row.source: row.shape for row in tables.model_rows(ZOO["2-7B"])}
    del shapes["model.norm.weight"]
    shapes["model.mm_projector.readout.0.weight"] = (4096, 1024)
    shapes["model.mystery"] = (1,)
    with pytest.raises(CheckpointError) as caught:
        check_names(shapes, ZOO["2-7B"], "somewhere")
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.mystery" in message
    assert (
        "model.mm_projector.readout.0.weight (found (4096, 1024), expected (4096, 4096))" in message
    )


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("VideoLLaMA2-8x7B", "2-8x7B"),
        ("DAMO-NLP-SG/VideoLLaMA2.1-7B-16F", "2.1-7B-16F"),
        ("2-72B", "2-72B"),
        ("VideoLLaMA2-7B-Base", "2-7B"),
    ],
)
def test_published_names_are_understood(name, short):
    assert model_config(name).name == short


def test_video_tokens_of_published_models():
    counts = {name: ZOO[name].num_media_tokens() for name in SIZES}
    assert counts["2-7B"] == counts["2-8x7B"] == 845
    assert counts["2-7B-16F"] == 1521
    assert counts["2.1-7B-16F"] == 1352
    assert dataclasses.replace(ZOO["2.1-7B-16F"], num_frames=8).num_media_tokens() == 676
