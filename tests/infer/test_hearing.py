"""A model that hears: what it takes in of which media, and what it says about it."""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from miniature import HEARING, MINIATURE
from PIL import Image

import vllama2_jax as vl
from vllama2_jax.checkpoints import GenerationDefaults, ModelCard, save_model
from vllama2_jax.cli import main
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.infer.media import ReadMedia
from vllama2_jax.media import PAPER, REFERENCE, MediaError
from vllama2_jax.models.vllama2 import init_params
from vllama2_jax.text import load_tokenizer, tokenizer_files
from vllama2_jax.weights import TINY

sys.path.append(str(Path(__file__).parents[1] / "media"))
from rendered import pictures, write_gif, write_video
from sounds import noise, write_film, write_wav

CLIP, SOUND = HEARING.num_media_tokens(), HEARING.num_sound_tokens


def saved(folder, config):
    tokenizer = load_tokenizer(TINY / "tokenizer")
    config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, vocab_size=640, max_positions=2048)
    )
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=PAPER,
        generation=GenerationDefaults(stop_ids=(tokenizer.eos_id,)),
        template="chatml",
        tokenizer=tokenizer.fingerprint(),
    )
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    save_model(folder, params, card, tokenizer_files(TINY / "tokenizer"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("hearing") / "model", HEARING)


@pytest.fixture(scope="module")
def model(folder):
    return vl.load(folder)


@pytest.fixture(scope="module")
def deaf(tmp_path_factory):
    return vl.load(saved(tmp_path_factory.mktemp("deaf") / "model", MINIATURE))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_film(folder / "film.mkv", pictures(25), noise(1, 16000, seed=1))
    write_video(folder / "mute.mp4", pictures(9))
    write_wav(folder / "short.wav", noise(0.5, 16000, seed=2), 16000)
    write_wav(folder / "long.wav", noise(3, 16000, seed=3), 16000)
    write_gif(folder / "g.gif", pictures(4))
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(folder / "p.png")
    return folder


@pytest.mark.parametrize(
    ("name", "modality", "tokens"),
    [
        ("film.mkv", "av", CLIP + SOUND),
        ("short.wav", "audio", SOUND),
        ("p.png", "image", CLIP),
        ("g.gif", "video", CLIP),
        ("mute.mp4", "video", CLIP),
    ],
)
def test_auto_takes_in_what_a_file_holds(model, files, name, modality, tokens):
    media = model.read_media(files / name)
    assert (media.modality, len(media.tokens)) == (modality, tokens)
    assert (media.sound is not None) == (modality in ("av", "audio"))
    assert (media.clip is not None) == (modality != "audio")
    asked = model.read_media(files / name, modality=modality)
    np.testing.assert_array_equal(asked.tokens, media.tokens)


def test_a_film_can_be_seen_or_heard_alone(model, files):
    both = model.encode(files / "film.mkv")
    seen = model.encode(files / "film.mkv", modality="video")
    heard = model.encode(files / "film.mkv", modality="audio")
    np.testing.assert_array_equal(both[:CLIP], seen)
    assert heard.shape == (SOUND, 16)
    np.testing.assert_allclose(both[CLIP:], heard, atol=1e-6)  # the same second in preset paper


def test_a_missing_track_is_silence_where_sound_is_asked_for_and_said(model, files):
    with pytest.warns(UserWarning, match=r"mute\.mp4: has no sound track; silence is heard"):
        media = model.read_media(files / "mute.mp4", modality="av")
    assert media.modality == "av" and media.sound.heard == ()
    with pytest.raises(MediaError, match="has no sound track"):
        model.read_media(files / "mute.mp4", modality="audio")


def test_sound_that_is_cut_is_said(model, files):
    with pytest.warns(UserWarning, match=r"of 3\.0 s of sound, 1\.0 s from 0\.0 s are heard"):
        model.read_media(files / "long.wav")
    with pytest.warns(UserWarning, match=r"1\.0 s from 1\.5 s are heard"):
        model.read_media(files / "long.wav", start=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read_media(files / "short.wav")


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("short.wav", "video", "holds sound but no video"),
        ("short.wav", "av", "use modality 'audio'"),
        ("p.png", "audio", "has no sound track to hear"),
        ("g.gif", "av", "has no sound track to hear"),
    ],
)
def test_what_a_file_does_not_hold_is_refused(model, files, name, modality, message):
    with pytest.raises(ValueError, match=message):
        model.read_media(files / name, modality=modality)


def test_media_in_memory_have_no_sound(model):
    frames = pictures(4)
    assert model.read_media(frames).modality == "video"
    with pytest.raises(MediaError, match="in memory: has no sound track"):
        model.read_media(frames, modality="av")
    with pytest.raises(ValueError, match="needs media"):
        model.read_media(None, modality="audio")


def test_a_model_that_does_not_hear_says_so(deaf, files):
    for modality in ("audio", "av"):
        with pytest.raises(ValueError, match="does not hear; use one with sound"):
            deaf.read_media(files / "film.mkv", modality=modality)
    assert deaf.read_media(files / "film.mkv").modality == "video"
    with pytest.raises(MediaError, match="holds sound but no video"):
        deaf.read_media(files / "short.wav")


def test_media_read_before_give_the_same(model, files):
    media = model.read_media(files / "film.mkv")
    again = model.read_media(ReadMedia(media.clip, media.sound.bank))
    assert again.modality == "av"
    np.testing.assert_array_equal(again.tokens, media.tokens)
    assert model.read_media(ReadMedia()).modality == "text"


def test_batches_of_all_kinds_equal_single_questions(model, files):
    pairs = [(files / name, "What?") for name in ("film.mkv", "short.wav", "p.png")]
    pairs.append((None, "What?"))
    batch = model.ask_batch(pairs, max_new_tokens=5)
    assert batch == [model.ask(*pair, max_new_tokens=5) for pair in pairs]


@pytest.fixture
def at_random(model, monkeypatch):
    """The model hears a stretch at random of sound that is too long."""
    card = dataclasses.replace(
        model.card,
        preset=dataclasses.replace(PAPER, sound=dataclasses.replace(PAPER.sound, random_crop=True)),
    )
    monkeypatch.setattr(model, "card", card)


@pytest.mark.usefixtures("at_random")
def test_the_seed_of_a_batch_chooses_what_is_heard_as_that_of_a_question(model, files, monkeypatch):
    starts = []
    read = model.read_media

    def note(*args, **options):
        media = read(*args, **options)
        starts.append(media.sound.heard[0][0])
        return media

    monkeypatch.setattr(model, "read_media", note)
    with pytest.warns(UserWarning, match="are heard"):
        for seed in (1, 2):
            model.ask(files / "long.wav", "What?", max_new_tokens=1, seed=seed)
            model.ask_batch([(files / "long.wav", "What?")], max_new_tokens=1, seed=seed)
    assert starts[0] == starts[1] != starts[2] == starts[3]


def test_a_conversation_keeps_what_was_heard(model, files):
    session = model.session(files / "film.mkv")
    first = session.ask("What?", max_new_tokens=4)
    second = session.ask("And then?", max_new_tokens=4)
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    ids = model.generate(files / "film.mkv", messages, max_new_tokens=4)
    assert model.tokenizer.decode(ids).strip() == second


def test_a_preset_that_hears_more_than_the_model_takes_is_refused(folder):
    with pytest.raises(ValueError, match=r"hears 16 s of a video, the model takes 1; use preset"):
        vl.load(folder, preset=REFERENCE)


def test_the_command_hears(folder, files, capsys):
    ask = ["ask", str(files / "long.wav"), "What?", "--model", str(folder), "--json"]
    assert main([*ask, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["modality"] == "audio" and answer["sound_seconds"] == [[0.0, 1.0]]
    assert answer["frame_seconds"] == []
    assert "note: " in err and "1.0 s from 0.0 s are heard" in err and "UserWarning" not in err
    film = ["ask", str(files / "film.mkv"), "What?", "--model", str(folder), "--json"]
    assert main([*film, "--modality", "video", "--max-new-tokens", "3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["modality"] == "video" and answer["sound_seconds"] == []
    assert main(["ask", "nowhere.wav", "What?"]) == 2
    assert "nowhere.wav: no such file" in capsys.readouterr().err


@pytest.mark.usefixtures("at_random")
def test_the_seed_of_the_command_chooses_what_is_heard(model, files, capsys, monkeypatch):
    monkeypatch.setattr("vllama2_jax.loading.load", lambda *args, **options: model)
    path, heard = files / "long.wav", []
    for seed in (1, 2):
        ask = ["ask", str(path), "What?", "--max-new-tokens", "1", "--json", "--seed", str(seed)]
        assert main(ask) == 0
        heard.append(json.loads(capsys.readouterr().out)["sound_seconds"])
        with pytest.warns(UserWarning, match="are heard"):
            wanted = model.read_media(path, seed=seed).sound.heard
        np.testing.assert_allclose(heard[-1], wanted, atol=1e-3)
    assert heard[0] != heard[1]
