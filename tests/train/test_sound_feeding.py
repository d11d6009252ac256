"""Batches of a mixture with sound: films with and without a track, sounds, pictures, text."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from miniature import HEARING, MINIATURE
from PIL import Image

from vllama2_jax.checkpoints import GenerationDefaults, ModelCard
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.data.pipeline import TooManyFaults
from vllama2_jax.media import PAPER, load_sound
from vllama2_jax.text import load_tokenizer
from vllama2_jax.train.config import DataConfig, SourceConfig, ValidationConfig
from vllama2_jax.train.feeding import make_feeding
from vllama2_jax.weights import TINY

sys.path.append(str(Path(__file__).parents[1] / "media"))
from rendered import pictures, write_video
from sounds import noise, write_film, write_wav

CLIP, SOUND = HEARING.num_media_tokens(), HEARING.num_sound_tokens
ANSWER = "Red."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY / "tokenizer")


def card_of(config):
    return ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=PAPER,
        generation=GenerationDefaults(stop_ids=(3,)),
        template="chatml",
    )


def said(name, tag, keys):
    question = f"{tag}\nWhat colour is the shape?" if tag else "What colour is the shape?"
    sentences = [("human", question), ("gpt", ANSWER)]
    return keys | {
        "id": name,
        "conversations": [{"from": who, "value": words} for who, words in sentences],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_film(folder / "film.mkv", pictures(25), noise(1, 16000, seed=1))
    write_video(folder / "mute.mp4", pictures(9))
    write_wav(folder / "short.wav", noise(0.5, 16000, seed=2), 16000)
    write_wav(folder / "long.wav", noise(3, 44100, 2, seed=3), 44100)
    (folder / "broken.wav").write_bytes((folder / "long.wav").read_bytes()[:9000])
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(folder / "p.png")
    records = [
        said("film", "<video>", {"video": "film.mkv", "audio": True}),
        said("mute", "<video>", {"video": "mute.mp4", "audio": True}),
        said("dubbed", "<video>", {"video": "mute.mp4", "audio": "short.wav"}),
        said("unheard", "<video>", {"video": "film.mkv"}),
        said("short", "<audio>", {"audio": "short.wav"}),
        said("part", "<audio>", {"audio": "long.wav", "start": 1.25, "end": 2.0}),
        said("picture", "<image>", {"image": "p.png"}),
        said("text", "", {}),
    ]
    (folder / "all.json").write_text(json.dumps(records))
    (folder / "broken.json").write_text(
        json.dumps([*records[:6], said("broken", "<audio>", {"audio": "broken.wav"})])
    )
    return folder


def feeding_of(folder, tokenizer, tmp_path, file="all.json", config=HEARING, **changes):
    values = dict(max_tokens=64, max_length=256, buckets=(256,), packing=True, workers=0)
    data = DataConfig(sources=(SourceConfig("it", str(folder / file)),), **values | changes)
    return make_feeding(
        data, card_of(config), tokenizer, rows=2, seed=1, index_folder=tmp_path, epochs=1
    )


def segments(feeding):
    """{record: (row's arrays, the record's slots)} of a whole epoch."""
    found = {}
    for batch in feeding.feed.batches(0):
        for i, ids in enumerate(batch.records):
            row = {name: array[i] for name, array in batch.arrays.items()}
            for segment, id in enumerate(ids, start=1):
                found[id] = row, row["segment_ids"] == segment
    return found


def bank_of(folder, name, joint=False, **part):
    spec = card_of(HEARING).sound
    path = folder / name
    return load_sound(path, spec=spec, preset=PAPER, joint=joint, silence=joint, **part).bank


def media_slots(row, inside):
    """(clip's slot, sound's slot) of a record, None for what it does not have."""
    index = row["media_index"][inside]
    index = index[index >= 0]
    clips = len(row["clip_mask"])
    is_sound = index >= clips * CLIP
    seen, heard = index[~is_sound], index[is_sound] - clips * CLIP
    if len(seen):
        assert seen.tolist() == list(range(seen[0], seen[0] + CLIP)) and seen[0] % CLIP == 0
    if len(heard):
        assert heard.tolist() == list(range(heard[0], heard[0] + SOUND))
        assert heard[0] % SOUND == 0
    if len(seen) and len(heard):
        assert not is_sound[:CLIP].any()  # pictures first
    return (seen[0] // CLIP if len(seen) else None, heard[0] // SOUND if len(heard) else None)


@pytest.mark.parametrize("packing", [True, False])
def test_every_record_finds_its_pictures_and_its_sound(folder, tokenizer, tmp_path, packing):
    feeding = feeding_of(folder, tokenizer, tmp_path, packing=packing)
    found = segments(feeding)
    heard = {
        "film": bank_of(folder, "film.mkv", joint=True),
        "mute": bank_of(folder, "mute.mp4", joint=True),
        "dubbed": bank_of(folder, "short.wav", joint=True),
        "short": bank_of(folder, "short.wav"),
        "part": bank_of(folder, "long.wav", start=1.25, end=2.0),
    }
    assert set(found) == {*heard, "unheard", "picture", "text"}
    for name, (row, inside) in found.items():
        clip, sound = media_slots(row, inside)
        assert (clip is not None) == (name not in ("short", "part", "text"))
        assert (sound is not None) == (name in heard)
        if sound is not None:
            assert row["audio_mask"][sound]
            np.testing.assert_array_equal(row["audio"][sound], heard[name])
        if clip is not None:
            assert row["clip_mask"][clip]
        assert row["target_weights"][inside].sum() > 0
    np.testing.assert_allclose(heard["mute"], -15.942385, atol=1e-5)


def test_rows_hold_as_many_sounds_as_they_have_slots_for(folder, tokenizer, tmp_path):
    one, two = (
        feeding_of(folder, tokenizer, tmp_path, max_clips=n, max_length=512, buckets=(512,))
        for n in (1, 2)
    )
    counts = [
        max(int(b.arrays["audio_mask"].sum(1).max()) for b in feeding.feed.batches(0))
        for feeding in (one, two)
    ]
    assert counts == [1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, tokenizer, tmp_path, workers):
    alone = list(feeding_of(folder, tokenizer, tmp_path).feed.batches(0))
    others = list(feeding_of(folder, tokenizer, tmp_path, workers=workers).feed.batches(0))
    assert [b.records for b in alone] == [b.records for b in others]
    for a, b in zip(alone, others, strict=True):
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def test_hosts_share_the_rows_of_a_step(folder, tokenizer, tmp_path):
    feeding = feeding_of(folder, tokenizer, tmp_path)
    whole = feeding.feed.assembler(feeding.schedule[0])
    halves = [
        dataclasses.replace(feeding.feed.assembler, host=host, hosts=2)(feeding.schedule[0])
        for host in (0, 1)
    ]
    for name, array in whole.arrays.items():
        joined = np.concatenate([half.arrays[name] for half in halves])
        np.testing.assert_array_equal(array, joined, err_msg=name)


def test_which_layers_a_step_leaves_out_is_a_function_of_seed_and_step(folder, tokenizer, tmp_path):
    feeding = feeding_of(folder, tokenizer, tmp_path)
    hearing = feeding.feed.assembler.hearing
    assert (hearing.num_layers, hearing.layer_drop) == (4, 0.5)
    kept = np.stack([hearing.kept_layers(step) for step in range(400)])
    np.testing.assert_array_equal(kept[7], hearing.kept_layers(7))
    assert 0.4 < kept.mean() < 0.6 and len({row.tobytes() for row in kept}) == 16
    for batch in feeding.feed.batches(0):
        assert (batch.arrays["audio_keep"] == hearing.kept_layers(batch.step)).all()
    other = dataclasses.replace(hearing, seed=hearing.seed + 1)
    assert (np.stack([other.kept_layers(step) for step in range(400)]) != kept).any()
    still = dataclasses.replace(hearing, layer_drop=0.0)
    assert all(still.kept_layers(step).all() for step in range(100))


def test_validation_leaves_no_layer_out(folder, tokenizer, tmp_path):
    feeding = make_feeding(
        DataConfig(sources=(), max_tokens=64, max_length=256, buckets=(256,), workers=0),
        card_of(HEARING),
        tokenizer,
        rows=2,
        seed=1,
        index_folder=tmp_path,
        held_out=ValidationConfig((SourceConfig("it", str(folder / "all.json")),)),
    )
    assert all(batch.arrays["audio_keep"].all() for batch in feeding.feed.batches(0))


def test_a_sound_that_cannot_be_read_is_a_slot_without_weight(folder, tokenizer, tmp_path):
    feeding = feeding_of(folder, tokenizer, tmp_path, file="broken.json")
    row, inside = segments(feeding)["broken"]
    assert row["target_weights"][inside].sum() == 0
    _, sound = media_slots(row, inside)
    assert not row["audio_mask"][sound]
    (fault,) = feeding.feed.faults.values()
    assert fault.record == "broken" and "broken.wav: is cut short" in fault.reason
    strict = feeding_of(folder, tokenizer, tmp_path, file="broken.json", max_faults=0)
    with pytest.raises(TooManyFaults, match=r"broken\.wav: is cut short"):
        list(strict.feed.batches(0))


def test_a_model_that_does_not_hear_refuses_records_with_sound(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not hear; start from one that does"):
        feeding_of(folder, tokenizer, tmp_path, config=MINIATURE)
