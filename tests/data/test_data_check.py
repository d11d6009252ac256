"""`data check` looks at every record and its media, and tells all that is wrong with them."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vllama2_jax
from vllama2_jax.cli import main
from vllama2_jax.data import check as checking
from vllama2_jax.data.check import check, template_key
from vllama2_jax.data.check_report import read_lengths, read_report, read_usable, write_report
from vllama2_jax.data.sources import open_source
from vllama2_jax.data.toybox.files import write_video
from vllama2_jax.text import ChatTemplate, load_tokenizer, sft_example

TINY = Path(vllama2_jax.__file__).parent / "assets" / "tiny" / "tokenizer"
BAD = {
    "missing": "missing.mp4: no such file",
    "cut": "cut.mp4: is cut short",
    "late": "no frame lies in the clip",
    "silent": "must alternate human, gpt",
    "no image": "ball.mp4: is of kind video, not image; name it under the key `video`",
    "no video": "1.png: is of kind image, not video; name it under the key `image`",
    "one frame": "words.png: not an image",
}


def made(id, question="<video>\nWhat?", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red ball."}]
    return {"id": id, "conversations": turns, **keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seconds of video, pictures, and one file of each way to be bad."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    write_video(folder / "ball.mp4", noise)
    (folder / "cut.mp4").write_bytes((folder / "ball.mp4").read_bytes()[:4000])
    for i in range(2):
        Image.fromarray(noise[i]).save(folder / f"{i}.png")
    (folder / "words.png").write_text("Just words.")
    good = [
        made("whole", video="ball.mp4", kind="shape", dataset="toys"),
        made("part", video="ball.mp4", start=0.5, end=1.25, kind="shape", dataset="toys"),
        made("to the end", video="ball.mp4", start=1.5, end=99, kind="colour", dataset="toys"),
        made("text", "Hello?"),
        made("image", "<image>\nWhat?", image="0.png", remark="nice"),
        made("frames", video=["0.png", "1.png"]),
    ]
    bad = [
        made("missing", video="missing.mp4"),
        made("cut", video="cut.mp4"),
        made("late", video="ball.mp4", start=50.0),
        {**made("silent"), "conversations": made("")["conversations"][:1]},
        made("no image", "<image>\nWhat?", image="ball.mp4"),
        made("no video", video="1.png"),
        made("one frame", video=["0.png", "words.png"]),
    ]
    # In turns, so that nothing depends on the good ones coming first.
    mixed = [record for pair in zip(good, bad, strict=False) for record in pair] + bad[len(good) :]
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "mixed.json").write_text(json.dumps(mixed))
    return folder


@pytest.fixture(scope="module")
def report(folder):
    source = open_source(folder / "mixed.json")
    tokenizer = load_tokenizer(TINY)
    return check(source, folder, tokenizer=tokenizer, template="chatml", workers=2)


def test_every_bad_record_is_quarantined_with_its_cause_and_no_good_one(folder, report):
    ids = [record["id"] for record in json.loads((folder / "mixed.json").read_text())]
    assert [entry.id for entry in report.quarantine] == [id for id in ids if id in BAD]
    for entry in report.quarantine:
        assert BAD[entry.id] in entry.cause, entry
        assert ids[entry.number] == entry.id


def test_groups_count_records_and_measure_seconds(report):
    groups = {(g["dataset"], g["media"], g["kind"]): g for g in report.groups()}
    shape = groups["toys", "video", "shape"]
    assert (shape["records"], shape["quarantined"]) == (2, 0)
    assert shape["seconds"]["100"] == pytest.approx(2.0)  # 24 frames at 12 a second
    assert shape["seconds"]["0"] == pytest.approx(0.75)
    assert groups["toys", "video", "colour"]["seconds"]["total"] == pytest.approx(0.5)
    assert groups["", "image", ""]["seconds"] is None
    assert groups["", "video", ""]["quarantined"] == 5
    assert groups["?", "?", "?"]["records"] == 1
    total = report.groups()[-1]
    assert (total["dataset"], total["records"], total["quarantined"]) == ("all", 13, 7)
    assert sum(g["records"] for g in report.groups()[:-1]) == 13
    assert "key `remark` is ignored in 1 record(s)" in report.notes()


def test_what_is_no_error_but_odd_is_noted(tmp_path):
    odd = made("a", "Hello?")
    odd["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    records = [made("a", "Hello?"), odd, made("b", "Hello?", remark="x")]
    (tmp_path / "odd.json").write_text(json.dumps(records))
    report = check(open_source(tmp_path / "odd.json"), tmp_path)
    assert report.quarantine == []
    assert report.notes() == [
        "key `remark` is ignored in 1 record(s)",
        "1 id(s) occur again; records are told apart by number",
        "1 record(s) lose a leading sentence that is not human",
    ]


def test_videos_that_will_be_heard_as_silence_are_counted(tmp_path):
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    write_video(tmp_path / "mute.mp4", frames)
    write_video(tmp_path / "loud.mp4", frames, samples=np.zeros(8000, np.float32))
    records = [
        made("a", video="mute.mp4", audio=True),
        made("b", video="mute.mp4", audio=True, end=0.25),
        made("c", video="mute.mp4"),
        made("d", video="loud.mp4", audio=True),
        made("e", video="mute.mp4", audio="loud.mp4"),
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    report = check(open_source(tmp_path / "r.json"), tmp_path)
    assert report.quarantine == []
    assert report.notes() == [
        "2 record(s) ask for the sound of a video that has none; training hears silence instead"
    ]


def test_the_length_index_counts_the_ids_that_training_sees(folder, report, tmp_path):
    tokenizer, source = load_tokenizer(TINY), open_source(folder / "mixed.json")
    write_report(tmp_path / "report.json", report)
    known = (source.fingerprint, tokenizer.fingerprint(), template_key("chatml"))
    lengths = read_lengths(tmp_path / "report.json", *known)
    assert lengths.dtype == np.int32 and len(lengths) == len(source)
    for number in range(len(source)):
        if source.read(number)["id"] in BAD:
            assert lengths[number] == -1
            continue
        ids = sft_example(source[number].messages(), "chatml", tokenizer).ids
        assert lengths[number] == len(ids) - (source[number].media is not None)
    for wrong in (1, 2):
        others = ("x" if i == wrong else value for i, value in enumerate(known))
        assert read_lengths(tmp_path / "report.json", *others) is None
    with pytest.raises(ValueError, match="check the file again"):
        read_lengths(tmp_path / "report.json", "x", *known[1:])


def test_what_is_usable_is_what_is_not_in_quarantine(folder, report, tmp_path):
    source = open_source(folder / "mixed.json")
    write_report(tmp_path / "report.json", report)
    usable = read_usable(tmp_path / "report.json", source.fingerprint)
    ids = [source.read(number)["id"] for number in usable]
    assert ids == ["whole", "part", "to the end", "text", "image", "frames"]


def test_templates_of_other_words_have_other_keys():
    one, two = ChatTemplate("{{ bos }}", (("bos", "<s>"),)), ChatTemplate("{{ bos }}")
    assert template_key("chatml") == "chatml"
    assert len({template_key(one), template_key(two), template_key(ChatTemplate("x"))}) == 3


def test_distinct_media_are_probed_once_and_side_by_side(folder, tmp_path, monkeypatch):
    two = threading.Barrier(2, timeout=20)
    asked = []

    def ask(self, operation, paths, limits, **details):
        asked.append((threading.get_ident(), id(self), paths[0]))
        two.wait()  # breaks unless two are asked at the same time
        info = dict(kind="video", num_frames=1, fps=1.0, seconds=1.0, width=8, height=8)
        return {**info, "has_audio": False}, None

    monkeypatch.setattr(checking.Decoder, "ask", ask)
    records = [made(str(i), video=f"{i % 2}.mp4") for i in range(6)]
    (tmp_path / "six.json").write_text(json.dumps(records))
    report = check(open_source(tmp_path / "six.json"), tmp_path, workers=2)
    assert not report.quarantine
    assert sorted(path for *_, path in asked) == [f"{tmp_path}/{i}.mp4" for i in range(2)]
    assert len({thread for thread, *_ in asked}) == len({decoder for _, decoder, _ in asked}) == 2


def test_a_fault_of_the_source_stops_the_check(folder, tmp_path, monkeypatch):
    (tmp_path / "one.json").write_text((folder / "good.json").read_text())
    source = open_source(tmp_path / "one.json")
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(ValueError, match="has changed"):
        check(source, folder)


def test_the_command_tells_by_its_exit_code(folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    arguments = ["data", "check", str(folder / "good.json"), "--workers", "2"]
    assert main([*arguments, "--model", "tiny", "--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "toys" in printed and "quarantined:" not in printed
    data = read_report(out, open_source(folder / "good.json").fingerprint)
    assert data["quarantine"] == [] and data["records"] == 6
    assert [entry["id"] for entry in data["lengths"]["records"]][:2] == ["whole", "part"]
    assert main(["data", "check", str(folder / "mixed.json")]) == 1
    printed = capsys.readouterr().out
    for id, cause in BAD.items():
        assert f"(id {id}): " in printed and cause in printed
    for file, message in (("0.png", "not a .json list"), ("nowhere.json", "nowhere.json")):
        assert main(["data", "check", str(folder / file)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1


def test_paths_are_relative_to_the_media_root(folder, tmp_path, capsys):
    (tmp_path / "good.json").write_text((folder / "good.json").read_text())
    assert main(["data", "check", str(tmp_path / "good.json")]) == 1
    options = ["--media-root", str(folder), "--workers", "1"]
    assert main(["data", "check", str(tmp_path / "good.json"), *options]) == 0
