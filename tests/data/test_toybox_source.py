"""Toybox's records without files: functions of the seed, right about what their frames show."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from vllama2_jax.data.examples import Subset
from vllama2_jax.data.records import Record
from vllama2_jax.data.toybox.scenes import COLOURS, is_heldout
from vllama2_jax.data.toybox.source import KINDS, ToyboxListener, ToyboxReader, ToyboxSource
from vllama2_jax.media.fbank import filter_bank
from vllama2_jax.text import plain_example


def _foreground(frame):
    """Pixels [n, 3] and places [n, 2] (row, column) that are far from the corner's colour."""
    far = np.abs(frame.astype(int) - frame[0, 0]).sum(-1) > 90
    return frame[far], np.argwhere(far)


@pytest.mark.parametrize("media", ["video", "audio", "av"])
@pytest.mark.parametrize("kind", KINDS)
def test_record_is_a_function_of_seed_kind_media_and_number(kind, media):
    def source(records=50, seed=3):
        return ToyboxSource(records, kind, seed=seed, media=media)

    late = [source()[number] for number in (40, 7)]
    assert [pickle.loads(pickle.dumps(source()))[number] for number in (40, 7)] == late
    assert [source(41)[40]] == late[:1]
    assert [source()[i].turns for i in range(50)] != [source(seed=4)[i].turns for i in range(50)]
    if media != "audio":
        np.testing.assert_array_equal(source().frames(7, 16), source().frames(7, 16))
    if media != "video":
        np.testing.assert_array_equal(source().samples(7), source().samples(7))
    assert source().fingerprint == source().fingerprint != source(seed=4).fingerprint


def test_moving_things_have_the_colour_and_the_direction_that_is_answered():
    source, asked = ToyboxSource(300, "clips", seed=1), 0
    for number in range(300):
        answers = {q.removeprefix("<video>\n"): a for q, a in source[number].turns}
        colour = next((a for a in answers.values() if a in COLOURS), None)
        if colour is None:
            continue
        asked += 1
        frames = source.frames(number, 64)
        pixels, _ = _foreground(frames[0])
        shade = np.median(pixels, 0)
        distances = {c: np.abs(shade - rgb).sum() for c, rgb in COLOURS.items()}
        assert min(distances, key=distances.get) == colour
        # The commonest step from one frame to the next is the direction's.
        steps = np.diff([_foreground(frame)[1].mean(0) for frame in frames], axis=0)
        cells = [tuple(step) for step in np.rint(steps * 3 / 64).astype(int)]
        ways = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}
        assert ways[max(set(cells), key=cells.count)] in answers.values()
    assert asked > 40


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_are_of_the_split(split):
    source = ToyboxSource(200, "clips", split)
    for number in range(200):
        scene, _ = source._scene(number)
        if scene.family == "order":
            pairs = [(thing.colour, thing.shape) for thing in scene.things]
            assert is_heldout(pairs) == (split == "heldout")


def test_a_share_of_the_clips_is_told_and_of_what_is_counted_none():
    source = ToyboxSource(1000, "clips", told=0.4)
    kinds = [source[number].kind for number in range(1000)]
    assert kinds.count("tell") / 1000 == pytest.approx(0.4 * 0.91, abs=0.05)
    assert kinds.count("count") / 1000 == pytest.approx(0.09, abs=0.03)
    for number in np.flatnonzero(np.asarray(kinds) == "tell")[:20]:
        ((question, answer),) = source[int(number)].turns
        assert question.startswith("<video>\n") and answer.endswith(".")
    assert "tell" not in {ToyboxSource(50)[number].kind for number in range(50)}


@pytest.mark.parametrize(
    "media, asked",
    [
        ("video", {"colour", "shape", "direction", "order", "count", "change", "bounce"}),
        ("audio", {"pitch", "glide", "beeps", "noise", "timing"}),
        ("av", {"sync", "sounding"}),
    ],
)
def test_clips_have_all_their_questions_and_questions_one_of_each_kind_as_often(media, asked):
    clips, single = (ToyboxSource(700, kind, media=media) for kind in ("clips", "questions"))
    found = {len(clips[number].turns) for number in range(700)}
    assert found == ({1, 3} if media == "video" else {1})
    assert {len(single[number].turns) for number in range(700)} == {1}
    kinds = [single[number].kind for number in range(700)]
    assert set(kinds) == asked
    for kind in asked:
        assert kinds.count(kind) == pytest.approx(700 / len(asked), abs=40)
    assert {single[number].media.kind for number in range(700)} == {media}


def test_a_share_of_what_is_asked_is_with_pictures_or_sound_alone():
    whole = ToyboxSource(1500, "clips", media="av", told=0.4)
    partly = ToyboxSource(1500, "clips", media="av", told=0.4, withheld=0.3)
    given = {"av": 0, "video": 0, "audio": 0}
    for number in range(1500):
        record, told = partly[number], partly[number].kind == "tell"
        given[record.media.kind] += not told
        assert not told or record.media.kind == "av"
        # The same is asked and answered, behind the placeholder of what is left.
        (question, answer), (known, truth) = record.turns[0], whole[number].turns[0]
        assert answer == truth
        assert question == f"{record.media.placeholder}\n{known.split(chr(10))[-1]}"
    asked = sum(given.values())
    assert asked == pytest.approx(900, abs=60)
    for media in ("video", "audio"):
        assert given[media] / asked == pytest.approx(0.15, abs=0.03)


def test_listener_hears_the_record_of_a_subset():
    source = ToyboxSource(9, "clips", media="audio")
    subset = Subset(source, [5, 2])
    bank = ToyboxListener(2.0)(subset, 1, subset[1].media, 0)
    assert bank.shape == (198, 128) and bank.dtype == np.float32
    np.testing.assert_array_equal(bank, filter_bank(source.samples(2)))
    assert ToyboxListener(1.0)(subset, 1, subset[1].media, 0).shape == (98, 128)


def test_captions_are_plain_examples(tiny_tokenizer):
    record = ToyboxSource(9, "captions")[3]
    example = plain_example(record.messages(), tiny_tokenizer)
    assert [token < 0 for token in example.ids] == [True] + [False] * (len(example.ids) - 1)
    assert tiny_tokenizer.decode(example.ids[1:]) == " " + record.turns[0][1]


def test_text_has_no_media_and_half_of_it_a_story_that_holds_the_answers():
    source, told = ToyboxSource(400, "text"), 0
    for number in range(400):
        record = source[number]
        assert record.media is None and "<video>" not in record.turns[0][0]
        story, question = record.turns[0][0].split("\n")
        told += bool(story)
        if story and record.kind == "order":
            assert record.turns[0][1] in story and question
    assert told == pytest.approx(200, abs=50)
    bare = ToyboxSource(50, "bare")
    assert all(bare[i].turns[0][0].startswith("\n") for i in range(50))


@pytest.mark.parametrize("num_frames, used", [(8, range(8)), (4, (0, 2, 4, 6)), (16, range(8))])
def test_reader_renders_the_record_of_a_subset(num_frames, used):
    source = ToyboxSource(9, "clips")
    subset = Subset(source, [5, 2])
    record = subset[1]
    assert isinstance(record, Record) and record == source[2]
    clip = ToyboxReader(16, num_frames)(subset, 1, record.media)
    np.testing.assert_array_equal(clip.frames, source.frames(2, 16)[list(used)])
    assert len(clip.frame_index) == num_frames and not np.diff(clip.frame_index).min() < 0
    assert clip.frame_index[-1] == len(clip.frames) - 1
    assert clip.frames.dtype == np.uint8 and clip.frame_index.dtype == np.int32


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(kind="clip"), "unknown Toybox kind 'clip'; known: clips, captions"),
        (dict(split="test"), "unknown Toybox split 'test'"),
        (dict(records=0), "at least one record"),
        (dict(media="smell"), "unknown Toybox media 'smell'; known: video, audio, av, all"),
        (dict(told=1.5), "share of `clips`"),
        (dict(media="av", withheld=-0.1), "withheld -0.1"),
        (dict(withheld=0.1), "share of `clips` about av"),
        (dict(kind="text", told=0.5), "share of `clips`"),
    ],
)
def test_what_cannot_be_meant_is_refused(how, said):
    with pytest.raises(ValueError) as caught:
        ToyboxSource(**{"records": 5, **how})
    assert said in str(caught.value)
    with pytest.raises(IndexError, match="no record 5; it holds 5"):
        ToyboxSource(5)[5]


def test_workers_need_no_jax_to_render():
    code = "import sys, vllama2_jax.data.toybox.source; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
