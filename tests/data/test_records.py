"""Records are read strictly: what is not understood is named, never dropped."""

import json
import pickle

import pytest

from vllama2_jax.data.records import (
    Media,
    Record,
    RecordError,
    parse_record,
    read_records,
    write_records,
)

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
TEXT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
VIDEO = {"video": "a.mp4", "conversations": TURNS}


def said(*texts):
    speakers = ["human", "gpt"] * len(texts)
    return [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]


def write(path, *records):
    path.write_text(json.dumps(list(records)))
    return path


def test_records_survive_the_way_to_disk_and_back(tmp_path):
    turns = (("<video>\nWhat?", "A ball."), ("Why?", "It rolls."))
    records = [
        Record("a", turns, Media("video", "a.mp4"), "colour", "toys"),
        Record("b", (("Hello?", "Hello."),)),
        Record("c", turns, Media("video", "a.mp4", start=0.0, end=2.5)),
        Record("d", turns, Media("video", ("1.png", "2.png"))),
        Record("e", (("What is it? <image>", "É"),), Media("image", "e.jpg")),
    ]
    write_records(tmp_path / "records.json", records)
    assert read_records(tmp_path / "records.json") == records


def test_media_are_read_as_llava_writes_them():
    data = {
        "id": 7,
        "image": "x.jpg",
        "model": "someone's note",
        "conversations": said("<image>?", "B"),
    }
    assert parse_record(data, "f.json", 0) == Record(
        "7", (("<image>?", "B"),), Media("image", "x.jpg")
    )
    whole = parse_record(VIDEO | {"image": None, "start": 1}, "f.json", 4)
    assert whole.id == "4" and whole.media == Media("video", "a.mp4", 1.0, None)
    frames = parse_record({"video": ["a", "b"], "conversations": TURNS}, "f.json", 0)
    assert frames.media.paths == ("a", "b")


@pytest.mark.parametrize("speaker", ["gpt", "system"])
def test_a_leading_sentence_that_is_not_human_is_dropped_as_in_the_original(speaker):
    first = {"from": speaker, "value": "You are kind."}
    record = parse_record({"conversations": [first, *TEXT]}, "f.json", 0)
    assert record.turns == (("Hello?", "Hello."),)


@pytest.mark.parametrize(
    ("keys", "media"),
    [
        ({"audio": "a.wav", "start": 1}, Media("audio", "a.wav", start=1.0)),
        ({"video": "a.mp4", "audio": True}, Media("av", "a.mp4")),
        ({"video": "a.mp4", "audio": "a.mp4", "end": 2}, Media("av", "a.mp4", end=2.0)),
        ({"video": "a.mp4", "audio": "b.wav"}, Media("av", "a.mp4", sound="b.wav")),
        (
            {"video": ["1.png", "2.png"], "audio": "b.wav"},
            Media("av", ("1.png", "2.png"), sound="b.wav"),
        ),
        ({"video": "a.mp4", "audio": False}, Media("video", "a.mp4")),
    ],
)
def test_records_have_sound_alone_or_beside_a_video(keys, media):
    data = keys | {"id": "a", "conversations": said(media.placeholder, "Yes.")}
    record = parse_record(data, "f.json", 0)
    assert record.media == media
    assert parse_record(record.to_json(), "f.json", 0) == record
    places = [f"/root/{path}" for path in media.paths]
    assert media.heard == (media.kind != "video") and media.seen == (media.kind != "audio")
    if media.heard:
        assert media.track(places) == f"/root/{media.sound or media.source}"


def test_messages_have_the_placeholder_in_front_of_its_turn():
    turns = (("Hi.", "Hello."), ("What is <video> this?<video>", "A ball."))
    messages = Record("a", turns, Media("video", "a.mp4")).messages()
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages] == [
        "Hi.",
        "Hello.",
        "<video>\nWhat is  this?",
        "A ball.",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "needs an object with a list `conversations`"),
        ({"conversations": []}, "must alternate human, gpt"),
        ({"conversations": TURNS[::-1]}, "must alternate human, gpt"),
        ({"conversations": TURNS[:1]}, "must alternate human, gpt"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": 3}]}, "string `value`"),
        ({"conversations": TEXT, "audio": "a.wav"}, "one question must hold <audio>; none do"),
        (VIDEO | {"audio": 3}, "`audio` beside a video must be a path, or true"),
        (VIDEO | {"video": ["a.png"], "audio": True}, "a list of frames has no sound"),
        ({"image": "a.jpg", "audio": "a.wav", "conversations": TEXT}, "holds image and audio"),
        ({"audio": ["a.wav"], "conversations": said("<audio>", "B")}, "`audio` must be a path$"),
        ({"conversations": TEXT, "videos": "a.mp4"}, "did you mean `video`"),
        (VIDEO | {"strat": 3}, "did you mean `start`"),
        (VIDEO | {"id": 1.5}, "`id` must be a string or a whole number"),
        (VIDEO | {"image": "a.jpg"}, "holds image and video"),
        (VIDEO | {"video": 5}, "`video` must be a path or a list"),
        (VIDEO | {"video": []}, "`video` must be a path or a list"),
        (VIDEO | {"video": ["a.png", 5]}, "`video` must be a path or a list"),
        ({"image": ["a.jpg"], "conversations": said("<image>", "B")}, "`image` must be a path$"),
        (VIDEO | {"start": "1"}, "`start` must be a number of seconds"),
        (VIDEO | {"end": float("nan")}, "`end` must be a number of seconds"),
        (VIDEO | {"start": -1}, "`start` -1.0 must not be negative"),
        (VIDEO | {"start": 2, "end": 2}, "`end` 2.0 must lie behind it"),
        (VIDEO | {"end": 0}, "`end` 0.0 must lie behind it"),
        (VIDEO | {"end": True}, "`end` must be a number of seconds"),
        (VIDEO | {"video": ["a.png"], "start": 1}, "for a video or a sound that is one file"),
        ({"conversations": TEXT, "end": 1}, "for a video or a sound that is one file"),
        (VIDEO | {"kind": 3}, "`kind` must be a string"),
        ({"conversations": TURNS}, "holds <video> but there is no such media"),
        (VIDEO | {"conversations": TEXT}, "one question must hold <video>; none do"),
        (VIDEO | {"conversations": TURNS * 2}, "one question must hold <video>; 2 do"),
        (VIDEO | {"conversations": said("<image>?", "B")}, "holds <image> .* write <video>"),
        (VIDEO | {"conversations": said("<video>?", "a <video>")}, "an answer holds"),
    ],
)
def test_a_bad_record_is_named_with_its_place(tmp_path, record, message):
    path = write(tmp_path / "records.json", {"conversations": TEXT}, record)
    with pytest.raises(RecordError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, record 1")
    assert "\n" not in str(error.value)


def test_an_error_names_the_id_and_survives_a_pickle():
    with pytest.raises(RecordError) as caught:
        parse_record({"id": "kitten", "conversations": []}, "f.json", 3)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error).startswith("f.json, record 3 (id kitten): ")
    assert (error.file, error.number, error.id) == ("f.json", 3, "kitten")


def test_ids_that_occur_again_are_listed(tmp_path):
    records = [{"id": name, "conversations": TEXT} for name in "abcab"]
    with pytest.raises(ValueError, match=r"occur again: a, b$"):
        read_records(write(tmp_path / "records.json", *records))


@pytest.mark.parametrize("text", ["{", "{}", "\ufffe"])
def test_a_file_that_is_no_list_of_records_is_named(tmp_path, text):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"records\.json"):
        read_records(path)
