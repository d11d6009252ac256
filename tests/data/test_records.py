"""Records are read strictly: what is not understood is named, never dropped."""

import json

import pytest

from vllama2_jax.data.records import Record, read_records, write_records

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A ball."}]


def write(path, *records):
    path.write_text(json.dumps(list(records)))
    return path


def test_records_survive_the_way_to_disk_and_back(tmp_path):
    records = [
        Record("a", (("<video>\nWhat?", "A ball."), ("Why?", "It rolls.")), "a.mp4", "colour"),
        Record("b", (("Hello?", "Hello."),)),
    ]
    write_records(tmp_path / "records.json", records)
    assert read_records(tmp_path / "records.json") == records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "needs an object with a list `conversations`"),
        ({"conversations": []}, "must alternate human, gpt"),
        ({"conversations": TURNS[::-1]}, "must alternate human, gpt"),
        ({"conversations": TURNS[:1]}, "must alternate human, gpt"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": 3}]}, "string `value`"),
        ({"conversations": TURNS, "image": "a.jpg"}, "`image` is not supported yet"),
        ({"conversations": TURNS, "video": ["a.mp4"]}, "must be strings"),
        ({"conversations": TURNS, "video": 5}, "must be strings"),
    ],
)
def test_a_bad_record_is_named_with_its_place(tmp_path, record, message):
    path = write(tmp_path / "records.json", {"conversations": TURNS}, record)
    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, record 1: ")


def test_ids_that_occur_again_are_listed(tmp_path):
    records = [{"id": name, "conversations": TURNS} for name in "abcab"]
    with pytest.raises(ValueError, match=r"occur again: a, b$"):
        read_records(write(tmp_path / "records.json", *records))


@pytest.mark.parametrize("text", ["{", "{}", "\ufffe"])
def test_a_file_that_is_no_list_of_records_is_named(tmp_path, text):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"records\.json"):
        read_records(path)
