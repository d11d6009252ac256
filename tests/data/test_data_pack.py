"""Packed records are the same records, with their media inside."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vllama2_jax.cli import main
from vllama2_jax.data.check import check
from vllama2_jax.data.files import local_media
from vllama2_jax.data.pack import pack
from vllama2_jax.data.sources import open_source
from vllama2_jax.data.toybox.files import write_video
from vllama2_jax.media import MediaError


def made(id, question="<video>\nWas ist größer?", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red ball."}]
    return {"id": id, "conversations": turns, **keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    write_video(folder / "ball.mp4", noise)
    for i in range(3):
        Image.fromarray(noise[i]).save(folder / f"{i}.png")
    records = [
        made("whole", video="ball.mp4", kind="shape", dataset="toys"),
        made("text", "Hello?"),
        made("part", video="ball.mp4", start=0.0, end=0.5),
        made("image", "<image>\nWhat?", image="0.png"),
        made("frames", video=["2.png", "0.png", "2.png"]),
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("packs") / "new"
    seen = []
    done = pack(
        open_source(folder / "records.json"),
        target,
        folder,
        shard_bytes=400,
        progress=lambda *counts: seen.append(counts),
    )
    assert seen == [(i + 1, 5) for i in range(5)]
    size = sum((folder / name).stat().st_size for name in ("ball.mp4", "0.png", "2.png"))
    assert done == {"records": 5, "media": 3, "bytes": size}
    return target


def contents(source, number):
    media = source[number].media
    return None if media is None else source.media_bytes(number)


def test_records_and_media_come_out_as_they_went_in(folder, packed):
    before, after = open_source(folder / "records.json"), open_source(packed)
    assert list(after) == list(before)
    for number, record in enumerate(before):
        paths = record.media.paths if record.media else ()
        wanted = tuple((folder / path).read_bytes() for path in paths)
        assert after.media_bytes(number) == (wanted or None)
        assert after.read(number) == before.read(number)


def test_small_shards_are_many_and_random_access_crosses_them(packed):
    assert len(list(packed.glob("records-*.arrayrecord"))) > 1
    assert len(list(packed.glob("media-*.arrayrecord"))) == 3
    source = open_source(packed)
    order = [4, 0, 3, 1, 2]
    ids = [source[i].id for i in order]
    assert ids == ["frames", "whole", "image", "text", "part"]


def test_a_pack_travels_into_workers(packed):
    source = open_source(packed)
    source.media_bytes(0)  # open readers must not travel
    state = pickle.dumps(source)
    assert len(state) < 4000
    assert list(pickle.loads(state)) == list(source)


def test_a_check_needs_only_the_pack_and_finds_what_the_files_give(folder, packed):
    files = check(open_source(folder / "records.json"), folder)
    report = check(open_source(packed), "nowhere")
    assert report.checked == files.checked and not report.quarantine and not report.notes()


def test_damaged_media_are_named_as_the_record_does(folder, tmp_path):
    (tmp_path / "ball.mp4").write_bytes((folder / "ball.mp4").read_bytes()[:2000])
    (tmp_path / "one.json").write_text(json.dumps([made("a", video="ball.mp4")]))
    pack(open_source(tmp_path / "one.json"), tmp_path / "pack", tmp_path)
    (entry,) = check(open_source(tmp_path / "pack"), tmp_path).quarantine
    assert entry.cause.startswith("ball.mp4: is cut short")


def test_a_pack_can_be_packed_again(packed, tmp_path):
    pack(open_source(packed), tmp_path / "again", "nowhere")
    again, source = open_source(tmp_path / "again"), open_source(packed)
    assert list(again) == list(source)
    assert again.fingerprint == source.fingerprint
    with local_media(again, 2, again[2].media, "nowhere") as (place,):
        assert open(place, "rb").read() == source.media_bytes(0)[0]


def test_an_unfinished_pack_is_refused(packed, tmp_path):
    for path in packed.glob("*.arrayrecord"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"not a finished pack .*pack\.json"):
        open_source(tmp_path)


def test_a_pack_that_stopped_half_way_is_none(folder, tmp_path):
    records = [made("kept", video="ball.mp4"), made("gone", video="gone.mp4")]
    (tmp_path / "two.json").write_text(json.dumps(records))
    with pytest.raises(MediaError, match="no such file"):
        pack(open_source(tmp_path / "two.json"), tmp_path / "pack", folder)
    assert list((tmp_path / "pack").glob("media-*"))
    with pytest.raises(ValueError, match="not a finished pack"):
        open_source(tmp_path / "pack")


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_damaged_shard_is_an_error_of_the_source(packed, tmp_path, harm):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "media-00000.arrayrecord"
    shard.unlink() if harm == "gone" else shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="a shard cannot be read") as error:
        open_source(tmp_path).media_bytes(0)
    assert "\n" not in str(error.value) and not isinstance(error.value, MediaError)


def test_the_command_leaves_the_quarantine_out(folder, tmp_path, capsys):
    records = [made("gone", video="gone.mp4"), made("kept", video="ball.mp4")]
    file, report = folder / "two.json", tmp_path / "report.json"
    file.write_text(json.dumps(records))
    assert main(["data", "pack", str(file), str(tmp_path / "whole")]) == 2
    assert "gone.mp4: no such file" in capsys.readouterr().err
    assert main(["data", "check", str(file), "--report", str(report)]) == 1
    options = ["--report", str(report)]
    assert main(["data", "pack", str(file), str(tmp_path / "pack"), *options]) == 0
    assert "1 left out" in capsys.readouterr().out
    assert [record.id for record in open_source(tmp_path / "pack")] == ["kept"]
    file.write_text(json.dumps(records[::-1]))
    assert main(["data", "pack", str(file), str(tmp_path / "other"), *options]) == 2
    assert "is about other records" in capsys.readouterr().err


def test_what_cannot_be_packed_is_one_line(folder, packed, tmp_path):
    source = open_source(folder / "records.json")
    with pytest.raises(ValueError, match="exists and is not empty"):
        pack(source, packed, folder)
    with pytest.raises(ValueError, match="every record is left out"):
        pack(source, tmp_path / "none", folder, leave_out=range(5))
    with pytest.raises(ValueError, match="copy it to the bucket afterwards"):
        pack(source, "gs://bucket/pack", folder)
    (tmp_path / "frames").mkdir()
    (tmp_path / "folder.json").write_text(json.dumps([made("a", video="frames")]))
    with pytest.raises(MediaError, match="a folder cannot be packed"):
        pack(open_source(tmp_path / "folder.json"), tmp_path / "other", tmp_path)
