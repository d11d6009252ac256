"""Kept frames are those that decoding gives, and are used only where nothing has changed."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from feeding import NUM_FRAMES, SPEC, record, segments, write
from PIL import Image

from vllama2_jax.data import assemble, frame_cache
from vllama2_jax.data import cache_frames as caching
from vllama2_jax.data.assemble import ClipReader
from vllama2_jax.data.cache_frames import cache_frames
from vllama2_jax.data.examples import Subset
from vllama2_jax.data.frame_cache import CachedClipReader
from vllama2_jax.data.pack import pack
from vllama2_jax.data.pipeline import Feed
from vllama2_jax.data.sources import open_source
from vllama2_jax.media import PAPER, MediaError

RECORDS = [
    record("text"),
    record("image", "image", "1.png"),
    record("video", "video", "shades.mp4"),
    record("part", "video", "shades.mp4") | {"start": 0.5, "end": 1.0},
    record("again", "video", "shades.mp4"),
    record("broken", "video", "broken.mp4"),
    record("list", "video", ["2.png", "0.png", "2.png"]),
    {"id": "mute", "conversations": []},
    record("missing", "image", "nowhere.png"),
    record("folder", "video", "frames"),
]
_NO_SHARDS = json.dumps(
    dict.fromkeys(("format", "records", "spec", "num_frames", "preset"))
    | {"clips": [], "shards": []}
)
KEPT = ["image", "video", "part", "list", "folder"]  # the distinct ones that can be read
NAMES = [data["id"] for data in RECORDS]


@pytest.fixture
def root(media_folder, tmp_path):
    """A copy of the media, for tests to spoil, with a folder of frames."""
    root = tmp_path / "media"
    shutil.copytree(media_folder, root)
    (root / "frames").mkdir()
    for number in range(6):
        shutil.copy(root / f"{number}.png", root / "frames")
    return root


@pytest.fixture
def reader(root):
    return ClipReader(SPEC, NUM_FRAMES, root=str(root))


@pytest.fixture
def source(root):
    return write(root / "records.json", RECORDS)


@pytest.fixture
def cached(source, reader, tmp_path):
    done = cache_frames(source, reader, tmp_path / "kept")
    assert done.clips == len(KEPT) and done.bytes > 5 * 16 * 16 * 3
    return CachedClipReader(tmp_path / "kept", source, reader)


@pytest.fixture
def decoded(monkeypatch):
    """What has been decoded since."""
    seen, load = [], assemble.load_clip

    def load_clip(media, **options):
        seen.append(media)
        return load(media, **options)

    monkeypatch.setattr(assemble, "load_clip", load_clip)
    return seen


def clip_of(reader, source, name, names=NAMES):
    number = names.index(name)
    return reader(source, number, source[number].media)


def assert_same(clip, wanted):
    for name in ("frames", "frame_index", "times"):
        ours, theirs = getattr(clip, name), getattr(wanted, name)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert ours.dtype == theirs.dtype
    assert clip.is_image == wanted.is_image


def test_kept_clips_are_those_that_decoding_gives(source, reader, cached, decoded):
    for name in [*KEPT, "again"]:
        clip = clip_of(cached, source, name)
        assert decoded == []
        assert_same(clip, clip_of(reader, source, name))
        assert clip.source in (RECORDS[NAMES.index(name)].get("video"), "1.png", "2.png")
        decoded.clear()


def test_bad_media_are_not_kept_and_fail_as_without_a_cache(source, reader, cached, tmp_path):
    seen = []
    done = cache_frames(source, reader, tmp_path / "new", progress=lambda *at: seen.append(at))
    assert seen == [(n + 1, len(KEPT) + 2) for n in range(len(KEPT) + 2)]
    for name, told in zip(("broken", "missing"), done.bad, strict=True):
        errors = []
        for read in (reader, cached):
            with pytest.raises(MediaError) as error:
                clip_of(read, source, name)
            errors.append(str(error.value))
        assert errors[0] == errors[1] == told


def test_a_run_sees_the_same_with_a_cache_as_without(setting, source, reader, cached):
    feeds = []
    for read, workers in ((reader, 0), (cached, 1)):
        changed = dataclasses.replace(setting, sources=(source,))
        maker = dataclasses.replace(changed.assembler(), readers=(read,))
        feeds.append(Feed(changed.schedule(), maker, workers=workers))
    plain, kept = (list(feed.batches()) for feed in feeds)
    assert feeds[0].faults == feeds[1].faults and len(feeds[0].faults) == 3
    for ours, theirs in zip(kept, plain, strict=True):
        for name, array in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)
    assert {id for id, *_ in segments(kept)} == set(NAMES)


def test_records_of_a_subset_find_their_own_clips(source, reader, cached, tmp_path, decoded):
    numbers = [NAMES.index(name) for name in ("folder", "text", "part", "image")]
    subset = Subset(source, numbers)
    names = [NAMES[number] for number in numbers]
    for name in ("folder", "part", "image"):
        clip = clip_of(cached, subset, name, names)
        assert decoded == []
        assert_same(clip, clip_of(reader, source, name))
        decoded.clear()
    again = CachedClipReader(tmp_path / "kept", subset, reader)
    clip_of(again, subset, "part", names)
    assert decoded == []


def test_media_inside_a_pack_are_kept_too(root, reader, tmp_path, decoded):
    good = [data for data in RECORDS if data["id"] in ("text", "image", "video", "part", "list")]
    files = write(root / "good.json", good)
    pack(files, tmp_path / "pack", root)
    source = open_source(tmp_path / "pack")
    bare = dataclasses.replace(reader, root="")
    assert cache_frames(source, bare, tmp_path / "kept").clips == 4
    cached, names = CachedClipReader(tmp_path / "kept", source, bare), [d["id"] for d in good]
    decoded.clear()
    clips = {name: clip_of(cached, source, name, names) for name in names[1:]}
    assert decoded == []
    for name, clip in clips.items():
        assert_same(clip, clip_of(bare, source, name, names))


def test_of_records_with_sound_the_frames_alone_are_kept(root, reader, tmp_path, decoded):
    (root / "s.wav").write_bytes(b"any sound")
    records = [
        record("track", "video", "shades.mp4") | {"audio": True},
        record("dubbed", "video", "shades.mp4") | {"audio": "s.wav"},
        record("sound", "audio", "s.wav"),
        record("pictures", "video", "shades.mp4"),
    ]
    source, names = write(root / "heard.json", records), [data["id"] for data in records]
    done = cache_frames(source, reader, tmp_path / "kept")
    assert (done.clips, done.bad) == (3, ())
    # How sound is read is of no account.
    other = dataclasses.replace(reader.preset, sound=PAPER.sound)
    hearing = dataclasses.replace(reader, preset=other)
    cached = CachedClipReader(tmp_path / "kept", source, hearing)
    decoded.clear()
    clips = {name: clip_of(cached, source, name, names) for name in ("track", "dubbed", "pictures")}
    assert decoded == []
    for name, clip in clips.items():
        assert_same(clip, clip_of(reader, source, name, names))


def test_a_cache_of_before_sound_was_known_is_read(source, reader, cached, tmp_path, decoded):
    manifest = tmp_path / "kept" / "frames.json"
    data = json.loads(manifest.read_text())
    data["preset"].pop("sound", None)
    for clip in data["clips"]:
        del clip["sound"]
    manifest.write_text(json.dumps(data))
    fresh = CachedClipReader(tmp_path / "kept", source, reader)
    for name in KEPT:
        clip_of(fresh, source, name)
    assert decoded == []


def test_files_that_have_changed_are_decoded(root, source, reader, cached, decoded):
    before = os.stat(root / "1.png")
    Image.fromarray(np.full((20, 20, 3), 7, np.uint8)).save(root / "1.png")
    assert (clip_of(cached, source, "image").frames == 7).all() and len(decoded) == 1
    os.utime(root / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    clip_of(cached, source, "list")
    (root / "frames" / "5.png").unlink()
    clip_of(cached, source, "folder")
    assert len(decoded) == 3
    (root / "shades.mp4").unlink()
    with pytest.raises(MediaError, match=r"shades\.mp4: no such file"):
        clip_of(cached, source, "video")


def test_files_of_a_bucket_are_told_by_size_and_time(
    root, source, reader, tmp_path, decoded, monkeypatch
):
    # As if the media root were a bucket: its files are looked at through etils.
    monkeypatch.setattr(frame_cache, "is_remote", lambda path: True)
    cache_frames(source, reader, tmp_path / "kept")
    cached = CachedClipReader(tmp_path / "kept", source, reader)
    decoded.clear()
    clip_of(cached, source, "video")
    assert decoded == []
    shutil.copy(root / "2.png", root / "1.png")
    status = os.stat(root / "1.png")
    os.utime(root / "1.png", (status.st_atime, status.st_mtime + 5))
    assert_same(clip_of(cached, source, "image"), clip_of(reader, source, "image"))
    assert len(decoded) == 2


def test_a_damaged_shard_is_decoded_instead(source, reader, cached, tmp_path, decoded):
    path = tmp_path / "kept" / "frames-00000.arrayrecord"
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 500):
        content[place] ^= 255
    path.write_bytes(content)
    fresh = CachedClipReader(tmp_path / "kept", source, reader)
    for name in KEPT:
        assert_same(clip_of(fresh, source, name), clip_of(reader, source, name))
    assert len(decoded) > len(KEPT)
    path.unlink()
    fresh = CachedClipReader(tmp_path / "kept", source, reader)
    with pytest.warns(UserWarning, match="so it is decoded again; make the cache anew"):
        found = clip_of(fresh, source, "video")
    assert_same(found, clip_of(reader, source, "video"))


def test_a_cache_of_something_else_is_refused(source, reader, cached, tmp_path, root):
    others = {
        "spec": dataclasses.replace(reader, spec=dataclasses.replace(SPEC, size=14)),
        "num_frames": dataclasses.replace(reader, num_frames=8),
        "preset": dataclasses.replace(reader, preset=PAPER),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"of another {name} than this run's; make the cache"):
            CachedClipReader(tmp_path / "kept", source, other)
    fewer = write(root / "fewer.json", RECORDS[:3])
    with pytest.raises(ValueError, match="of another records than"):
        CachedClipReader(tmp_path / "kept", fewer, reader)


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": ["x", 1]}', _NO_SHARDS])
def test_an_unfinished_or_damaged_cache_is_refused(source, reader, cached, tmp_path, content):
    manifest = tmp_path / "kept" / "frames.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(ValueError, match=r"kept: holds no finished frame cache .* make it anew"):
        CachedClipReader(tmp_path / "kept", source, reader)


def test_clips_are_spread_over_shards_the_same_for_any_number_of_workers(
    source, reader, tmp_path, monkeypatch, decoded
):
    monkeypatch.setattr(caching, "_SHARD_BYTES", 2 * NUM_FRAMES * 3 * 16 * 16)
    for workers in (0, 1):
        cache_frames(source, reader, tmp_path / str(workers), workers=workers)
    files = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert files == [f"frames-0000{n}.arrayrecord" for n in range(3)] + ["frames.json"]
    for name in files:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    cached = CachedClipReader(tmp_path / "1", source, reader)
    decoded.clear()
    clips = {name: clip_of(cached, source, name) for name in KEPT}
    assert decoded == []
    for name, clip in clips.items():
        assert_same(clip, clip_of(reader, source, name))


def test_a_reader_travels_without_its_tables(source, reader, cached, decoded):
    clip_of(cached, source, "image")
    state = pickle.dumps(cached)
    assert b"shades.mp4" not in state
    there = pickle.loads(state)
    assert_same(clip_of(there, source, "video"), clip_of(cached, source, "video"))
    assert decoded == []


def test_what_reads_frames_in_workers_imports_no_jax():
    code = "import sys, vllama2_jax.data.frame_cache; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_frames_are_not_written_over_anything(source, reader, cached, tmp_path):
    with pytest.raises(ValueError, match="kept: exists and is not empty"):
        cache_frames(source, reader, tmp_path / "kept")
    with pytest.raises(ValueError, match="gs://b/kept: frames are kept locally"):
        cache_frames(source, reader, "gs://b/kept")
    assert json.loads((tmp_path / "kept" / "frames.json").read_text())["shards"]
