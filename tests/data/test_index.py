"""The length index says what records take, and is kept only for as long as it is true."""

import io
import json

import numpy as np
import pytest
from feeding import record, write

from vllama2_jax.data import index as indexing
from vllama2_jax.data.check import check
from vllama2_jax.data.check_report import read_usable, write_report
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.index import build_index, joint_datasets, load_or_build
from vllama2_jax.text import ChatTemplate, plain_example, sft_example

MUTE = {"id": "mute", "conversations": []}
RECORDS = [
    record("image", "image", "1.png", answer="Red. " * 9, turns=3),
    MUTE,
    record("text", answer="Blue.", dataset="words"),
    record("video", "video", "shades.mp4"),
    record("nobody's", dataset=""),
]


@pytest.fixture
def source(media_folder, tmp_path):
    return write(tmp_path / "records.json", RECORDS)


@pytest.fixture
def counting(monkeypatch):
    """How often a record's text is counted."""
    counted = []
    count = RecordFormat.text_tokens

    def text_tokens(self, record):
        counted.append(record.id)
        return count(self, record)

    monkeypatch.setattr(RecordFormat, "text_tokens", text_tokens)
    return counted


def assert_same(index, wanted):
    for name in ("text_tokens", "clips", "datasets"):
        np.testing.assert_array_equal(getattr(index, name), getattr(wanted, name), err_msg=name)
        assert getattr(index, name).dtype == np.int32
    assert index.dataset_names == wanted.dataset_names


def kept(folder):
    (path,) = folder.glob("*")
    return path


@pytest.mark.parametrize("style", ["sft", "plain"])
def test_an_index_counts_text_and_media_of_what_makes_an_example(setting, source, style):
    index = build_index(source, setting.format(style=style))
    usable = ["image", "text", "video", "nobody's"]
    if style == "plain":
        usable = ["video"]  # one question with media, and its answer
    for number, data in enumerate(RECORDS):
        if data["id"] not in usable:
            assert (index.text_tokens[number], index.clips[number]) == (-1, 0)
            continue
        messages = source[number].messages()
        if style == "plain":
            ids = plain_example(messages, setting.tokenizer).ids
        else:
            ids = sft_example(messages, "chatml", setting.tokenizer).ids
        assert index.text_tokens[number] == sum(i >= 0 for i in ids)
        assert index.clips[number] == sum(i < 0 for i in ids)


def test_records_belong_to_the_dataset_they_name_or_else_to_the_given_one(setting, source):
    index = build_index(source, setting.format(), default_dataset="mine")
    assert index.dataset_names == ("toys", "words", "mine")
    assert index.datasets.tolist() == [0, -1, 1, 0, 2]
    assert build_index(source, setting.format()).dataset_names == ("toys", "words", "")


def test_sources_of_one_mixture_share_the_codes_of_their_datasets(setting, source, media_folder):
    other = write(media_folder / "other.json", [record("a", dataset="mine"), MUTE, record("b")])
    indices = [
        build_index(given, setting.format(), default_dataset="mine") for given in (other, source)
    ]
    names, codes = joint_datasets(indices)
    assert names == ("mine", "toys", "words")
    assert [array.tolist() for array in codes] == [[0, -1, 1], [1, -1, 2, 1, 0]]
    assert {array.dtype for array in codes} == {np.dtype(np.int32)}


def test_a_kept_index_is_read_instead_of_the_records(setting, source, tmp_path, counting):
    form, folder = setting.format(), tmp_path / "kept" / "here"
    seen = []
    first = load_or_build(folder, source, form, progress=lambda *done: seen.append(done))
    assert len(counting) == 4 and seen == [(n + 1, 5) for n in range(5)]
    assert_same(load_or_build(folder, source, form), first)
    assert_same(first, build_index(source, form))
    # Of a row's room it says nothing.
    load_or_build(folder, source, setting.format(media_tokens=9, max_tokens=50))
    assert len(counting) == 4 + 4


def test_what_changes_an_index_changes_its_name(setting, source, tmp_path, counting):
    form, folder = setting.format(), tmp_path / "kept"
    load_or_build(folder, source, form)
    own = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    load_or_build(folder, source, setting.format(template=own))
    load_or_build(folder, source, setting.format(style="plain"))
    load_or_build(folder, source, form, default_dataset="mine")
    load_or_build(folder, write(tmp_path / "fewer.json", RECORDS[:3]), form)
    assert len(list(folder.glob("*"))) == 5 and len(counting) == 4 * 4 + 2
    # A plain caption has no template.
    load_or_build(folder, source, setting.format(style="plain", template=own))
    assert len(list(folder.glob("*"))) == 5


def test_a_damaged_index_is_built_anew(setting, source, tmp_path):
    form, folder = setting.format(), tmp_path / "kept"
    wanted = load_or_build(folder, source, form)
    path = kept(folder)
    whole = path.read_bytes()
    damaged = [b"", whole[: len(whole) // 2], whole + b"x" * 30]
    for place in range(0, len(whole), 41):
        damaged.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert_same(load_or_build(folder, source, form), wanted)
    assert kept(folder) == path


def test_an_index_under_anothers_name_or_with_objects_is_built_anew(setting, source, tmp_path):
    form, folder = setting.format(), tmp_path / "kept"
    wanted = load_or_build(folder, source, form)
    path = kept(folder)
    fewer = write(tmp_path / "fewer.json", RECORDS[::-1])
    load_or_build(tmp_path / "other", fewer, form)
    path.write_bytes(kept(tmp_path / "other").read_bytes())
    assert_same(load_or_build(folder, source, form), wanted)
    arrays = dict(np.load(io.BytesIO(path.read_bytes())))
    arrays["clips"] = arrays["clips"].astype(object)
    np.savez(path, **arrays)
    assert_same(load_or_build(folder, source, form), wanted)
    arrays["clips"] = wanted.clips[:-1]
    np.savez(path, **arrays)
    assert_same(load_or_build(folder, source, form), wanted)


def test_a_report_spares_tokenizing_what_it_has_counted(
    setting, media_folder, tmp_path, counting, monkeypatch
):
    broken = record("broken", "video", "broken.mp4")
    source = write(tmp_path / "records.json", [*RECORDS, broken])
    form, report = setting.format(), tmp_path / "report.json"
    found = check(source, media_folder, tokenizer=setting.tokenizer, template="chatml")
    write_report(report, found)
    index = load_or_build(tmp_path / "kept", source, form, report=report)
    # What is in quarantine may be mended later, so it is counted.
    assert counting == ["broken"]
    assert_same(index, build_index(source, form))
    usable = read_usable(report, source.fingerprint)
    assert usable.tolist() == [0, 2, 3, 4]
    taken = index.take(usable)
    assert len(taken) == 4 and (taken.text_tokens > 0).all()
    assert taken.datasets.tolist() == [0, 1, 0, 2]
    # It has counted conversations, not captions.
    plain = setting.format(style="plain")
    assert_same(
        load_or_build(tmp_path / "kept", source, plain, report=report), build_index(source, plain)
    )
    with pytest.raises(ValueError, match="is about other records"):
        fewer = write(tmp_path / "fewer.json", RECORDS[:1])
        load_or_build(tmp_path / "kept", fewer, form, report=report)


def test_a_source_that_changes_while_it_is_indexed_is_an_error(setting, tmp_path):
    source = write(tmp_path / "records.json", RECORDS)
    (tmp_path / "records.json").write_text(json.dumps(RECORDS[:2]))
    with pytest.raises(ValueError, match="has changed"):
        load_or_build(tmp_path / "kept", source, setting.format())


def test_a_folder_that_cannot_be_written_is_named(setting, source, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(ValueError, match=r"kept: the length index cannot be kept there"):
        load_or_build(tmp_path / "kept", source, setting.format())


def test_the_version_of_the_count_is_part_of_the_name(setting, source, tmp_path, monkeypatch):
    load_or_build(tmp_path / "kept", source, setting.format())
    monkeypatch.setattr(indexing, "_VERSION", indexing._VERSION + 1)
    load_or_build(tmp_path / "kept", source, setting.format())
    assert len(list((tmp_path / "kept").glob("*"))) == 2
