"""Every way in which a file can be bad is one error that names file, cause and remedy."""

import os
import pickle
import re
import struct

import av
import numpy as np
import pytest
from PIL import Image
from rendered import pictures, write_gif, write_sound, write_video

from vllama2_jax.media import CLIP_336, PAPER, REFERENCE, Limits, MediaError, load_clip, probe


def error_of(media, **options):
    options = {"num_frames": 8, **options}
    with pytest.raises(MediaError) as caught:
        load_clip(media, spec=CLIP_336, **options)
    error = caught.value
    assert "\n" not in str(error)
    assert error.cause in str(error) and error.remedy in str(error) and error.path in str(error)
    return error


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("bad") / "v.mp4", pictures(90), g="12", bf="2")


def faststart(path):
    options = {"movflags": "faststart"}
    return write_video(path, pictures(90), container_options=options, g="12", bf="2")


def cut(source, target, share):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def test_missing(tmp_path):
    path = tmp_path / "nowhere.mp4"
    error = error_of(path)
    assert error.path == str(path) and error.cause == "no such file"


@pytest.mark.parametrize("name", ["e.mp4", "e.gif", "e.jpg"])
def test_empty(tmp_path, name):
    (tmp_path / name).touch()
    assert error_of(tmp_path / name).cause == "the file is empty"


@pytest.mark.parametrize("name", ["t.mp4", "t.txt", "t.jpg", "t.gif"])
def test_not_a_video(tmp_path, name):
    (tmp_path / name).write_text("Just words.\n" * 400)
    assert "not a" in error_of(tmp_path / name).cause


def test_playlists_are_not_followed(tmp_path, video):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:3,\n{video}\n#EXT-X-ENDLIST\n")
    assert "not a video" in error_of(playlist).cause
    concat = tmp_path / "list.ffconcat"
    concat.write_text(f"ffconcat version 1.0\nfile {video}\n")
    assert "not a video" in error_of(concat).cause


@pytest.mark.parametrize("name", ["s.mp4", "s.m4a", "s.mkv"])
def test_audio_only(tmp_path, name):
    assert error_of(write_sound(tmp_path / name)).cause == "holds sound but no video"


def test_mp4_without_its_index(tmp_path, video):
    assert "cut short" in error_of(cut(video, tmp_path / "c.mp4", 0.5)).cause


@pytest.mark.parametrize("share", [0.7, 0.8, 0.95])
def test_mp4_with_its_index_but_without_its_tail(tmp_path, share):
    whole = faststart(tmp_path / "whole.mp4")
    path = cut(whole, tmp_path / "c.mp4", share)
    error = error_of(path)
    assert "cut short" in error.cause
    with pytest.raises(MediaError, match="cut short"):
        probe(path)
    # What is there is still exact.
    start = load_clip(path, spec=CLIP_336, num_frames=3, start=0, end=0.3)
    truth = load_clip(whole, spec=CLIP_336, num_frames=3, start=0, end=0.3)
    assert np.array_equal(start.frames, truth.frames)


def test_mp4_in_fragments_without_its_tail(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov"}
    whole = write_video(
        tmp_path / "whole.mp4", pictures(90), container_options=options, g="12", bf="2"
    )
    assert probe(whole).num_frames == 90
    assert "cut short" in error_of(cut(whole, tmp_path / "c.mp4", 0.7)).cause


@pytest.mark.parametrize(
    ("name", "codec"),
    [("c.mkv", "libx264"), ("c.webm", "libvpx-vp9"), ("c.avi", "mpeg4"), ("c.mov", "libx264")],
)
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_other_containers_cut(tmp_path, name, codec, share):
    whole = write_video(tmp_path / f"whole-{name}", pictures(60), codec)
    load_clip(whole, spec=CLIP_336, num_frames=2)
    assert "cut short" in error_of(cut(whole, tmp_path / name, share)).cause


@pytest.mark.parametrize("name", ["i.jpg", "i.png", "i.webp", "i.gif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_images_cut(tmp_path, name, share):
    whole = tmp_path / f"whole-{name}"
    if name.endswith("gif"):
        write_gif(whole, pictures(10))
    else:
        noise = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(noise).save(whole)
    load_clip(whole, spec=CLIP_336, num_frames=2)
    cause = error_of(cut(whole, tmp_path / name, share)).cause
    assert re.search(r"is cut short|truncated", cause, re.IGNORECASE)


@pytest.mark.parametrize("end", ["just before the end mark", "at a semicolon in the data"])
def test_a_gif_cut_where_a_byte_looks_like_its_end_is_cut_short(tmp_path, end):
    data = write_gif(tmp_path / "whole.gif", pictures(10)).read_bytes()
    last = len(data) - 1 if end.startswith("just") else data.index(b";", len(data) // 2) + 1
    assert last < len(data)
    (tmp_path / "g.gif").write_bytes(data[:last])
    assert "cut short" in error_of(tmp_path / "g.gif").cause


@pytest.mark.parametrize("tail", [b"\0\0", b"trailing words", b"\n"])
def test_bytes_behind_the_end_of_a_gif_do_no_harm(tmp_path, tail):
    whole = write_gif(tmp_path / "whole.gif", pictures(10))
    (tmp_path / "g.gif").write_bytes(whole.read_bytes() + tail)
    truth = load_clip(whole, spec=CLIP_336, num_frames=4)
    found = load_clip(tmp_path / "g.gif", spec=CLIP_336, num_frames=4)
    assert np.array_equal(found.frames, truth.frames)


@pytest.mark.parametrize("name", ["z.mp4", "z.mkv", "z.avi", "z.mov"])
def test_zero_frames(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    assert error_of(path).cause == "holds no frames"


@pytest.mark.parametrize("as_list", [False, True])
def test_a_gif_without_frames(tmp_path, as_list):
    path = tmp_path / "z.gif"
    path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";")
    assert error_of([path] if as_list else path).cause == "holds no frames"


def test_huge_video(video):
    error = error_of(video, limits=Limits(max_pixels=96 * 64 - 1))
    assert "96x64" in error.cause and "max_pixels" in error.remedy


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    # A PNG header that promises 60000 x 60000 pixels, and no data.
    def chunk(kind, data):
        import zlib

        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "h.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    assert "60000x60000" in error_of(path).cause
    gif = bytearray(write_gif(tmp_path / "h.gif", pictures(3)).read_bytes())
    gif[6:10] = struct.pack("<HH", 65000, 65000)
    (tmp_path / "h.gif").write_bytes(gif)
    assert "65000x65000" in error_of(tmp_path / "h.gif").cause
    image = Image.new("RGB", (100, 100))
    assert "limit" in error_of(image, limits=Limits(max_pixels=9999)).cause


def test_a_gif_whose_later_frame_is_huge_is_refused_before_it_is_decoded(tmp_path):
    gif = bytearray(write_gif(tmp_path / "h.gif", pictures(3)).read_bytes())
    place = gif.rindex(b"\x00,") + 2  # the last picture: left, top, width, height
    gif[place + 4 : place + 8] = struct.pack("<HH", 65000, 65000)
    (tmp_path / "h.gif").write_bytes(gif)
    assert "beyond the limit" in error_of(tmp_path / "h.gif").cause


@pytest.mark.parametrize("kind", ["file", "folder", "paths", "pil", "array", "arrays"])
@pytest.mark.parametrize("preset", [REFERENCE, PAPER], ids=lambda preset: preset.name)
def test_a_strip_that_grows_beyond_the_limit_when_resized_is_refused(tmp_path, kind, preset):
    strip = Image.new("RGB", (1, 60000))
    path = tmp_path / "strip.png"
    strip.save(path)
    array = np.asarray(strip)
    media = {"file": path, "folder": tmp_path, "paths": [path]}
    media |= {"pil": strip, "array": array, "arrays": [array]}
    error = error_of(media[kind], preset=preset)
    grown = "336x20160000" if preset is REFERENCE else "60000x60000"
    assert "1x60000" in error.cause and grown in error.cause
    assert "max_pixels" in error.remedy
    in_memory = "image" if kind in ("pil", "array") else "frames"
    assert error.path == (in_memory if kind in ("pil", "array", "arrays") else str(path))


def test_a_low_limit_does_not_refuse_what_the_tower_needs():
    frames = pictures(1, width=96, height=24)
    clip = load_clip(frames, spec=CLIP_336, num_frames=1, limits=Limits(max_pixels=96 * 24))
    assert clip.frames.shape == (1, 336, 336, 3)


def test_too_many_bytes(video):
    error = error_of(video, limits=Limits(max_bytes=1000))
    assert "limit of 1000" in error.cause and "max_bytes" in error.remedy


def test_too_many_frames(video):
    error = error_of(
        video, num_frames=None, preset=PAPER, limits=Limits(max_frames=2), start=0, end=3
    )
    assert "max_frames" in error.remedy


@pytest.mark.parametrize("preset", [REFERENCE, PAPER], ids=lambda preset: preset.name)
def test_clip_outside_the_file(tmp_path, video, preset):
    error = error_of(video, start=50, end=60, preset=preset)
    assert "90 frames, 3.00 s" in error.cause and "inside the file" in error.remedy
    gif = write_gif(tmp_path / "g.gif", pictures(5))
    assert "no frame lies" in error_of(gif, start=50, end=60, preset=preset).cause


def test_damaged_in_the_middle(tmp_path, video):
    data = bytearray(video.read_bytes())
    begin = data.index(b"mdat") + 2000
    assert begin + 1000 < data.index(b"moov")
    data[begin : begin + 1000] = b"\xff" * 1000
    path = tmp_path / "d.mp4"
    path.write_bytes(data)
    error = error_of(path, num_frames=90, preset=PAPER)
    assert re.search(r"frame \d+ is damaged|cannot be decoded at frame \d+", error.cause)
    assert error.remedy.startswith("make the file again")


def test_a_track_that_begins_in_the_middle_is_told(tmp_path):
    path = write_video(tmp_path / "t.ts", pictures(40))
    data = bytearray(path.read_bytes())
    # Packets of 188 bytes, each with the number of its track: 0x100 with the mark of a new picture.
    starts = [n for n in range(0, len(data), 188) if data[n + 1 : n + 3] == b"\x41\x00"]
    data[starts[-1] + 2] = 0x77
    path.write_bytes(data)
    assert error_of(path).cause == "a track begins in the middle of it"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_not_a_regular_file(tmp_path, kind):
    path = tmp_path / "f.mp4"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path = "/dev/zero"
    assert error_of(path).cause == "not a regular file"


def test_folders_without_images(tmp_path):
    assert error_of(tmp_path).cause == "the folder is empty"
    (tmp_path / "notes.txt").write_text("words")
    assert error_of(tmp_path).cause == "the folder holds no image files"


def test_a_bad_frame_in_a_folder_or_list_is_named(tmp_path):
    for number in range(4):
        Image.fromarray(pictures(1)[0]).save(tmp_path / f"{number}.png")
    bad = cut(tmp_path / "2.png", tmp_path / "2b.png", 0.6)
    assert error_of(tmp_path).path == str(bad)
    assert error_of([tmp_path / "0.png", str(bad)]).path == str(bad)


@pytest.mark.parametrize(
    ("media", "cause"),
    [
        ([], "no frames in list"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames in ndarray"),
        (np.zeros((4, 4, 3)), "an image is uint8 [H, W, 3], this is float64 [4, 4, 3]"),
        ([3], "an image is uint8 [H, W, 3], this is int64 []"),
        (None, "no frames in NoneType"),
        ({}, "no frames in dict"),
    ],
)
def test_media_in_memory_that_are_none(media, cause):
    assert error_of(media).cause == cause


@pytest.mark.parametrize("kind", ["file", "pil", "array", "arrays", "paths", "video array"])
@pytest.mark.parametrize("times", [{"start": 0, "end": 1}, {"start": 0}, {"end": 1}])
def test_start_and_end_are_refused_alike_where_there_is_no_time(tmp_path, kind, times):
    picture, path = pictures(1)[0], tmp_path / "i.png"
    Image.fromarray(picture).save(path)
    media = {"file": path, "pil": Image.fromarray(picture), "array": picture}
    media |= {"arrays": [picture], "paths": [path], "video array": pictures(3)}
    error = error_of(media[kind], **times)
    assert error.cause.startswith("start and end are for videos") and "leave" in error.remedy


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf"), 1e300, "soon"])
def test_times_that_are_no_seconds_are_refused_in_words(video, name, value):
    error = error_of(video, **{name: value})
    assert error.cause == f"{name} is {value}, not a time" and error.path == str(video)


def test_probe_names_bad_files_too(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        probe(tmp_path / "nowhere.mp4")


def test_errors_travel_between_processes():
    error = MediaError("a.mp4", "is bad", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.mp4: is bad; mend it"
    assert isinstance(error, ValueError)
    error.add_note("Traceback")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["Traceback"]
    assert (again.path, again.cause, again.remedy) == ("a.mp4", "is bad", "mend it")
