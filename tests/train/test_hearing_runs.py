"""Runs of a model that hears: what trains, what is drawn, what comes out; and what cannot begin."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from miniature import HEARING

import vllama2_jax as vl
from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults, ModelCard, save_model
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.media import PAPER
from vllama2_jax.models.vllama2 import init_params
from vllama2_jax.text import load_tokenizer, tokenizer_files
from vllama2_jax.train.config import (
    DataConfig,
    SaveConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
    ValidationConfig,
)
from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.run import run
from vllama2_jax.train.start import begin, describe_start
from vllama2_jax.train.trainable import Rule
from vllama2_jax.weights import TINY, read

sys.path.append(str(Path(__file__).parents[1] / "media"))
from rendered import pictures
from sounds import tone, write_film, write_wav

FROZEN = Rule(".*", "freeze")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a saved model that hears a second."""
    tokenizer = load_tokenizer(TINY / "tokenizer")
    decoder = dataclasses.replace(HEARING.decoder, vocab_size=640)
    config = dataclasses.replace(HEARING, decoder=decoder)
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=PAPER,
        generation=GenerationDefaults(stop_ids=(tokenizer.eos_id,)),
        template="chatml",
        tokenizer=tokenizer.fingerprint(),
    )
    folder = tmp_path_factory.mktemp("hearing") / "model"
    params = nn.meta.unbox(init_params(config, jax.random.key(3)))
    save_model(folder, params, card, tokenizer_files(TINY / "tokenizer"))
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A film, two sounds and words."""
    folder = tmp_path_factory.mktemp("sounds")

    def samples(frequency):
        return (32767 * tone(frequency, 1, 16000)).astype(np.int16)[None]

    write_film(folder / "film.mkv", pictures(25), samples(300))
    said = []
    for name, frequency, answer in (("low", 200, "blue"), ("high", 3000, "red")):
        write_wav(folder / f"{name}.wav", samples(frequency), 16000)
        said.append(({"audio": f"{name}.wav"}, "<audio>\nWhat colour is the shape?", answer))
    said.append(({"video": "film.mkv", "audio": True}, "<video>\nWhat shape is it?", "circle"))
    said.append(({}, "What is red?", "a circle"))
    data = [
        media
        | {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (media, question, answer) in enumerate(said)
    ]
    (folder / "all.json").write_text(json.dumps(data))
    return folder / "all.json"


def config_of(model, records, steps, *rules, **changes):
    values = dict(
        name="small",
        start=StartConfig(str(model)),
        rules=(*rules, FROZEN),
        data=DataConfig((SourceConfig("it", str(records)),), max_tokens=100, workers=0),
        optimizer=OptimizerConfig(1e-2),
        rows=4,
        epochs=None,
        steps=steps,
        dtype="float32",
        save=SaveConfig(every=4),
        seed=5,
    )
    return TrainConfig(**values | changes)


def test_a_run_trains_what_its_rules_say_and_can_be_asked(model, records, tmp_path):
    """The rules of joint training: both connectors and the decoder learn, the towers do not."""
    parts = ("connector", "audio_connector", "decoder")
    held_out = ValidationConfig((SourceConfig("same", str(records)),), every=12, accuracy=True)
    rules = [Rule(f"{part}/.*", "train") for part in parts]
    run(config_of(model, records, 12, *rules, validation=held_out), tmp_path / "run")
    before, after = (flatten(read(f, None, scan_layers=True)[0]) for f in (model, tmp_path / "run"))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.split("/")[0] for path in changed} == set(parts)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[0]["grad_norm/audio_connector"] > 0 and "grad_norm/audio" not in metrics[0]
    assert {"validation/loss", "accuracy/questions"} <= set(metrics[-1])
    asked = vl.load(tmp_path / "run")
    media = asked.read_media(records.parent / "film.mkv")
    assert media.modality == "av" and len(media.tokens) == (
        HEARING.num_media_tokens() + HEARING.num_sound_tokens
    )
    assert isinstance(asked.ask(records.parent / "low.wav", "What?", max_new_tokens=4), str)


def test_left_out_layers_are_the_same_after_a_stop(model, records, tmp_path):
    """Half of the layers are left out at random; the second half of the run finds its own again."""
    rules = (Rule("audio/.*", "train"), Rule("audio_connector/.*", "train"))
    whole = config_of(model, records, 8, *rules)
    run(whole, tmp_path / "whole")
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole")]
    run(whole, tmp_path / "part")
    kept = tmp_path / "part" / "checkpoints"
    # As if it had been killed behind its first checkpoint.
    for folder in kept.iterdir():
        if folder.name == "8":
            shutil.rmtree(folder)
    run(whole, tmp_path / "part")
    assert [record["loss"] for record in read_metrics(tmp_path / "part")] == losses
    still = config_of(model, records, 8, *rules, layer_drop=0.0)
    run(still, tmp_path / "still")
    assert [record["loss"] for record in read_metrics(tmp_path / "still")] != losses


def test_a_model_that_does_not_hear_gets_a_tower_and_a_connector(small_model):
    start = StartConfig(
        str(small_model), hearing="2.1-7B-AV", audio="random", audio_connector="random"
    )
    card, _ = describe_start(start)
    assert card.config.audio.num_tokens == 1496
    assert card.config.audio_connector.out_dim == card.config.decoder.width
    assert card.config.audio_connector.kind == "mlp2x_gelu"
    linear = dataclasses.replace(start, audio_connector_kind="linear")
    assert describe_start(linear)[0].config.audio_connector.depth == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hearing="2.1-7B-AV"), "model stores neither"),
        (dict(hearing="2.1-7B-AV", audio="random"), "model stores neither"),
        (dict(hearing="2-7B", audio="random", audio_connector="random"), "does not hear either"),
        (dict(hearing="no-such", audio="random", audio_connector="random"), "unknown model"),
        (dict(audio_connector="elsewhere"), "a connector comes with its model, or anew"),
        (dict(audio_connector_kind="linear"), "is for what start.hearing adds"),
    ],
)
def test_what_cannot_begin_is_said(changes, message, small_model):
    with pytest.raises(ValueError, match=message):
        describe_start(StartConfig(str(small_model), **changes))


def test_a_model_that_hears_needs_no_other_hearing(model):
    start = StartConfig(str(model), hearing="2.1-7B-AV", audio="random", audio_connector="random")
    with pytest.raises(ValueError, match="is for a model that does not hear"):
        describe_start(start)


def test_an_audio_tower_that_is_not_there_is_named(tmp_path, small_model):
    start = StartConfig(
        str(small_model),
        hearing="2.1-7B-AV",
        audio=str(tmp_path / "B.pt"),
        audio_connector="random",
    )
    with pytest.raises(CheckpointError, match=r"B\.pt: no such file; name BEATs' \.pt file"):
        begin(start, None, 0)
    torch.save({"cfg": {"encoder_layers": 12}, "model": {}}, tmp_path / "B.pt")
    with pytest.raises(CheckpointError, match="its cfg"):
        begin(start, None, 0)
