"""The audio branch from and to the original's files."""

import dataclasses
import json
from pathlib import Path

import audio_oracle
import numpy as np
import pytest
import torch
from av_oracle import TOWER, write_av_miniature
from safetensors.torch import load_file

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert.beats import beats_config, open_beats
from vllama2_jax.convert.export import export_huggingface, released_shapes
from vllama2_jax.convert.huggingface import load_huggingface
from vllama2_jax.convert.parts import read_audio
from vllama2_jax.models.config import BeatsConfig
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import tokenizer_files

SIZES = BeatsConfig(**TOWER)
# What BEATs_iter3+ says of itself, with the miniature's sizes.
CFG = {
    "input_patch_size": 16,
    "embed_dim": SIZES.patch_width,
    "conv_bias": False,
    "encoder_layers": SIZES.num_layers,
    "encoder_embed_dim": SIZES.width,
    "encoder_ffn_embed_dim": SIZES.mlp_dim,
    "encoder_attention_heads": SIZES.num_heads,
    "activation_fn": "gelu",
    "layer_wise_gradient_decay_ratio": 0.6,
    "layer_norm_first": False,
    "deep_norm": True,
    "dropout": 0.0,
    "encoder_layerdrop": 0.05,
    "conv_pos": 128,
    "conv_pos_groups": SIZES.conv_groups,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": True,
    "predictor_class": 527,
}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("av")
    return write_av_miniature(folder), folder


def load(folder):
    params, card, _ = load_huggingface(folder, dtype=np.float32, scan_layers=True)
    return flatten(params), card


def same(found, wanted):
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def state_of(folder):
    state = {}
    for path in folder.glob("model-*.safetensors"):
        state |= load_file(path)
    return state


def copy_without(folder, to, *prefixes):
    """A copy of a released directory without some tensors, which are returned."""
    from oracle import write_shards

    state = state_of(folder)
    left = {name: t for name, t in state.items() if not name.startswith(prefixes)}
    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (to / path.name).write_bytes(path.read_bytes())
    write_shards(to, left, 1)
    return {name: t for name, t in state.items() if name not in left}


def test_an_export_reads_back_bit_by_bit(miniature, tmp_path):
    _, folder = miniature
    params, card, tokenizer = load_huggingface(folder, dtype=np.float32, scan_layers=True)
    out = tmp_path / "out"
    export_huggingface(out, params, card, tokenizer_files(tokenizer), dtype="float32")
    again, other = load(out)
    same(again, flatten(params))
    assert other == card and other.config.audio == SIZES
    config = json.loads((out / "config.json").read_text())
    assert config["mm_projector_a_type"] == "mlp2x_gelu" and config["mm_hidden_size_a"] == 32


def test_an_export_repeats_the_shared_biases_under_all_their_names(miniature, tmp_path):
    _, folder = miniature
    params, card, tokenizer = load_huggingface(folder, dtype=np.float32, scan_layers=True)
    export_huggingface(tmp_path / "o", params, card, tokenizer_files(tokenizer), dtype="float32")
    written = load_file(tmp_path / "o" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in written.items()} == released_shapes(card.config)
    original = state_of(folder)
    biases = [name for name in original if name.endswith("relative_attention_bias.weight")]
    assert len(biases) == SIZES.num_layers
    for name in biases:
        np.testing.assert_array_equal(written[name], original[name])


def test_biases_of_layer_0_alone_are_enough(miniature, tmp_path):
    _, folder = miniature
    wanted, _ = load(folder)
    prefix = "model.audio_tower.encoder.layers."
    middle = ".self_attn.relative_attention_bias.weight"
    copy_without(folder, tmp_path, *(f"{prefix}{i}{middle}" for i in range(1, SIZES.num_layers)))
    same(load(tmp_path)[0], wanted)


def test_the_audio_branch_may_lie_in_files_of_its_own(miniature, tmp_path):
    _, folder = miniature
    wanted, _ = load(folder)
    prefixes = ("model.audio_tower.", "model.mm_projector_a.")
    taken = copy_without(folder, tmp_path, *prefixes)
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path)
    for prefix, file in zip(prefixes, ("audio_tower.bin", "mm_projector_a.bin"), strict=True):
        part = {name: t for name, t in taken.items() if name.startswith(prefix)}
        torch.save(part, tmp_path / file)
    same(load(tmp_path)[0], wanted)


@pytest.fixture
def beats_file(miniature, tmp_path):
    """BEATs' own file of the miniature's tower."""
    model, _ = miniature
    named = audio_oracle.released_names(model.audio)
    state = {name: torch.from_numpy(tensor) for name, tensor in named.items()}
    state |= {"predictor.weight": torch.zeros(527, 32), "predictor.bias": torch.zeros(527)}

    def write(settings=CFG):
        path = tmp_path / "BEATs.pt"
        torch.save({"cfg": settings, "model": state}, path)
        return str(path)

    return write


def config_with(audio):
    base = ZOO["2.1-7B-AV"]
    connector = dataclasses.replace(base.audio_connector, in_dim=audio.width)
    return dataclasses.replace(base, audio=audio, audio_connector=connector)


def test_beats_own_file_gives_the_tower(miniature, beats_file):
    _, folder = miniature
    wanted = {p: x for p, x in load(folder)[0].items() if p.startswith("audio/")}
    found = read_audio(beats_file(), config_with(SIZES), np.float32)
    same({f"audio/{path}": leaf for path, leaf in flatten(found).items()}, wanted)
    _, settings = open_beats(Path(beats_file()))
    assert beats_config(settings, "it") == SIZES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_distance": 1280}, r"max_distance 1280 \(wanted 800\)"),
        ({"deep_norm": False}, r"deep_norm False \(wanted True\)"),
        ({"gru_rel_pos": False}, "its cfg says gru_rel_pos False; only True"),
        ({"layer_norm_first": True}, "its cfg says layer_norm_first True"),
    ],
)
def test_a_tower_of_another_cfg_is_refused(beats_file, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_audio(beats_file({**CFG, **change}), config_with(SIZES), np.float32)


def test_a_cfg_that_lacks_sizes_is_refused(beats_file):
    settings = {name: value for name, value in CFG.items() if name != "encoder_layers"}
    with pytest.raises(CheckpointError, match="lacks encoder_layers"):
        read_audio(beats_file(settings), config_with(SIZES), np.float32)


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exit, ())

    torch.save({"cfg": Trap(), "model": {}}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match="names code to run"):
        read_audio(str(tmp_path / "trap.pt"), config_with(SIZES), np.float32)


def test_published_names_have_the_released_shapes():
    shapes = released_shapes(ZOO["2.1-7B-AV"])
    audio = {n: s for n, s in shapes.items() if n.startswith("model.audio_tower.")}
    aliases = 11 * 320 * 12
    assert sum(map(np.prod, audio.values())) - aliases == 90_717_055
    assert shapes["model.mm_projector_a.0.weight"] == (3584, 768)
    assert shapes["model.mm_projector_a.2.weight"] == (3584, 3584)
