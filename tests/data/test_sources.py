"""Sources give the same records from every kind of file, and travel cheaply into workers."""

import json
import pickle
import subprocess
import sys

import pytest

from vllama2_jax.data.files import local_media
from vllama2_jax.data.records import Media, RecordError, read_records
from vllama2_jax.data.sources import open_source
from vllama2_jax.media import MediaError


def made(number, words="What?"):
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "A ball."}]
    return {"id": f"r{number}", "conversations": turns}


# Characters of one to four bytes, and what JSON itself is written with.
ODD = [made(i, words) for i, words in enumerate(["Was?", "Größe [x], {y}?", "何\n", '"🎥\\"', "]"])]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_list_gives_what_the_json_library_reads(tmp_path, indent, ascii_only):
    path = tmp_path / "odd.json"
    text = json.dumps(ODD, indent=indent, ensure_ascii=ascii_only)
    path.write_text(f" \n{text}\n\n", encoding="utf-8")
    source = open_source(path)
    assert [source.read(i) for i in range(len(source))] == ODD
    assert list(source) == read_records(path)


def test_json_lines_give_one_record_each(tmp_path):
    path = tmp_path / "odd.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in ODD]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\r\n", encoding="utf-8")
    source = open_source(path)
    assert [source.read(i) for i in range(len(source))] == ODD


def test_a_broken_line_is_one_bad_record(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{json.dumps(made(0))}\n{{broken\n{json.dumps(made(2))}\n")
    source = open_source(path)
    assert (source[0].id, source[2].id) == ("r0", "r2")
    with pytest.raises(RecordError, match=r"broken\.jsonl, record 1: is not JSON"):
        source[1]


def test_a_source_travels_without_its_records(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps([made(i, "word " * 200) for i in range(500)]))
    source = open_source(path)
    source[3]
    state = pickle.dumps(source)
    assert len(state) < 20 * len(source) < path.stat().st_size / 20
    assert pickle.loads(state)[499] == source[499]


def test_numbers_out_of_range_end_a_loop_and_wrap_nowhere(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps([made(0), made(1)]))
    source = open_source(path)
    assert [record.id for record in source] == ["r0", "r1"]
    for number in (2, -1):
        with pytest.raises(IndexError, match="it holds 2"):
            source[number]


def test_a_file_that_changes_meanwhile_is_an_error_of_the_source(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps([made(0), made(1)]))
    source = open_source(path)
    path.write_text(json.dumps([made(0), made(1), made(2)]))
    with pytest.raises(ValueError, match="has changed") as error:
        source[1]
    assert not isinstance(error.value, RecordError)
    assert open_source(path).fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[", "cannot be read as JSON"),
        ("a.json", "[{}", "cannot be read as JSON .*',' or ']'"),
        ("a.json", "[{},]", "cannot be read as JSON"),
        ("a.json", "[{}] x", "cannot be read as JSON .*Extra data"),
        ("a.json", "{}\n{}", r"one record per line is for a \.jsonl file"),
        ("a.json", "", "no list of records"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", "\n", "holds no records"),
        ("a.txt", "x", r"not a \.json list"),
        ("nowhere/b.json", None, r"nowhere/b\.json: cannot be read"),
        ("nowhere", None, "no .json list, .jsonl file or finished pack; of a folder of media"),
    ],
)
def test_a_file_without_records_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_source(path)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_missing_bucket_client_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        ValueError, match=r"^gs://bucket/a\.json: the bucket's client is missing .* install gcsfs"
    ):
        open_source("gs://bucket/a.json")


class Bucket:
    """A source that holds what its records are about."""

    def media_bytes(self, number):
        return (b"first", b"second")


def test_media_that_a_source_holds_become_files_while_they_are_used(tmp_path):
    media = Media("video", ("a/1.png", "a/2.png"))
    with local_media(Bucket(), 0, media, tmp_path) as places:
        assert [open(place, "rb").read() for place in places] == [b"first", b"second"]
        assert all(place.endswith(".png") for place in places)
    with pytest.raises(FileNotFoundError):
        open(places[0])
    with pytest.raises(MediaError, match=r"^a/2\.png: is damaged"):
        with local_media(Bucket(), 0, media, tmp_path) as places:
            raise MediaError(places[1], "is damaged", "copy it again")


def test_what_workers_import_pulls_in_no_jax():
    code = (
        "import sys, vllama2_jax.data.check, vllama2_jax.data.pack, vllama2_jax.data.sources\n"
        "assert 'jax' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
