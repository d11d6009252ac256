"""The model that hears against an independent one: sound, pictures, and both."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vllama2_jax as vl

sys.path.append(str(Path(__file__).parent / "media"))
torch = pytest.importorskip("torch")
from av_oracle import write_av_miniature  # noqa: E402
from rendered import pictures  # noqa: E402
from sounds import noise, write_film, write_wav  # noqa: E402
from test_parity import MESSAGES, relative_error  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heard")
    film = write_film(folder / "film.mkv", pictures(50), noise(2, 16000, seed=1))
    return {"audio": write_wav(folder / "a.wav", noise(5, 44100, 2), 44100), "av": film}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    oracle = write_av_miniature(folder)
    with jax.default_matmul_precision("highest"):
        yield oracle, vl.load(folder, dtype="float32")


def inputs(model, files, modality):
    """The file, and what the towers get of it."""
    path = files["audio" if modality == "audio" else "av"]
    media = model.read_media(path, modality=modality)
    assert media.modality == modality
    frames = None if media.clip is None else media.clip.frames[media.clip.frame_index]
    return path, (frames, None if media.sound is None else media.sound.bank)


@pytest.mark.parametrize("modality", ["audio", "video", "av"])
def test_logits_and_greedy_tokens_equal_the_reference(pair, files, modality):
    oracle, model = pair
    path, media = inputs(model, files, modality)
    tokens = model.encode(path, modality=modality)
    counts = {"audio": 1496, "video": 0, "av": 1496}
    assert len(tokens) >= counts[modality]
    assert relative_error(tokens, oracle.encode(media).numpy()) <= 2e-5
    tag = "<audio>" if modality == "audio" else "<video>"
    oracle.tag = tag
    ours = model.logits(path, MESSAGES, modality=modality)
    assert relative_error(ours, oracle.logits(media, MESSAGES)) <= 1e-4
    new = model.generate(path, MESSAGES, max_new_tokens=32, stop=False, modality=modality)
    assert new == oracle.greedy(media, MESSAGES, 32)


def test_pictures_come_before_sound(pair, files):
    _, model = pair
    both = model.encode(files["av"], modality="av")
    pictures = model.encode(files["av"], modality="video")
    np.testing.assert_array_equal(both[: len(pictures)], pictures)
    assert len(both) == len(pictures) + 1496
