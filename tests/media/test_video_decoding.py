import dataclasses

import av
import numpy as np
import pytest
from rendered import pictures, plain_decode, write_gif, write_video

from vllama2_jax.media import PAPER, REFERENCE, ImageSpec, Limits, load_clip, prepare, probe
from vllama2_jax.media.rotation import turn
from vllama2_jax.media.sampling import midpoint
from vllama2_jax.media.video import VideoFile

SPEC = ImageSpec(32, "stretch", (0.5,) * 3, (0.5,) * 3)

# name: codec and its options. Small groups of pictures, so that there are many.
ENCODINGS = {
    "b-frames.mp4": ("libx264", {"g": "12", "bf": "3", "b-pyramid": "normal"}),
    "open-groups.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "one-group.mp4": ("libx264", {"g": "1000"}),
    "all-key.mp4": ("libx264", {"g": "1"}),
    "h265.mp4": ("libx265", {"g": "12", "x265-params": "log-level=none:open-gop=1"}),
    "plain.mov": ("libx264", {"g": "10"}),
    "plain.mkv": ("libx264", {"g": "10", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "lag-in-frames": "8"}),
    "vp8.webm": ("libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "mpeg4.avi": ("mpeg4", {"g": "10"}),
    "b-frames.avi": ("mpeg4", {"g": "10", "bf": "2"}),
    "h264.avi": ("libx264", {"g": "10", "bf": "0"}),
    "motion-jpeg.avi": ("mjpeg", {}),
    "stream.ts": ("libx264", {"g": "10", "bf": "2"}),
    "interlaced.mkv": ("libx264", {"g": "10", "x264-params": "interlaced=1"}),
    "intra-refresh.mp4": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "intra-refresh.mkv": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "intra-refresh.ts": ("libx264", {"g": "12", "x264-params": "intra-refresh=1:bframes=2"}),
    "open-groups.ts": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "open-groups.mkv": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "av1.mp4": ("libsvtav1", {"g": "12", "preset": "11"}),
}
# Their packets do not tell which frames there are. (A picture built up by intra refresh may or may
# not be whole where its index points; the decoder notices.)
FROM_THE_START = ("vp8.webm", "mpeg4.avi", "b-frames.avi")


def read(path, numbers):
    """Frames through our reader: {number: pixels}, and whether the index sufficed."""
    file, found = VideoFile(str(path), Limits()), {}
    sequential = []
    read_all = file._read_all
    file._read_all = lambda *args: sequential.append(1) or read_all(*args)
    try:
        file.read(
            lambda total: np.asarray([n % total for n in numbers]),
            lambda number, pixels, seconds: found.update({number: pixels}),
        )
        return found, file.num_frames, not sequential
    finally:
        file.close()


@pytest.mark.parametrize("name", ENCODINGS)
def test_sampled_frames_equal_a_plain_decode(tmp_path, name):
    codec, options = ENCODINGS[name]
    path = write_video(tmp_path / name, pictures(61), codec, **options)
    truth = plain_decode(path)
    for numbers in ([0], [60], [11, 12, 13], range(61), midpoint(61, 8), [5, 5, 37, 58]):
        found, total, by_index = read(path, numbers)
        assert total == len(truth) == 61
        assert sorted(found) == sorted({n % total for n in numbers})
        assert all(np.array_equal(pixels, truth[n]) for n, pixels in found.items())
        if not name.startswith("intra-refresh"):
            assert by_index == (name not in FROM_THE_START)


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    # Seven frames before time zero: stored, needed for decoding, never shown.
    path = write_video(tmp_path / "e.mp4", pictures(40), first=-7, g="12", bf="2")
    truth = plain_decode(path)
    found, total, by_index = read(path, range(33))
    assert total == len(truth) == 33 and by_index
    assert all(np.array_equal(found[n], truth[n]) for n in range(33))


def test_a_variable_rate_is_sampled_by_frame_and_timed_by_the_file(tmp_path):
    times = np.cumsum([0] + [20, 40, 100, 10] * 10)
    path = write_video(tmp_path / "v.mp4", pictures(41), times=times, g="8", bf="2")
    truth = plain_decode(path)
    clip = load_clip(path, spec=SPEC, num_frames=6)
    numbers = midpoint(41, 6)
    assert np.array_equal(clip.frames, [prepare(truth[n], SPEC, False) for n in numbers])
    assert np.allclose(clip.times, times[numbers] / 1000)


@pytest.mark.parametrize("name", ["count.webm", "count.mkv"])
def test_files_without_a_frame_count_are_counted(tmp_path, name):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_video(tmp_path / name, pictures(23), codec, container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).num_frames == 23
    clip = load_clip(path, spec=SPEC, num_frames=8)
    truth = plain_decode(path)
    assert np.array_equal(
        clip.frames, [prepare(truth[n], SPEC, False) for n in np.unique(midpoint(23, 8))]
    )


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_the_display_matrix_is_honoured(tmp_path, degrees, hflip):
    # One dark corner tells where each corner went; the filter of FFmpeg itself is the judge.
    frames = np.full((3, 48, 64, 3), 200, np.uint8)
    frames[:, :12, :12] = 20
    frames[:, 36:, :12, 0] = 20
    rotation = {"degrees": degrees, "hflip": hflip}
    path = write_video(tmp_path / "r.mp4", frames, rotation=rotation)
    stored = plain_decode(path)[0]
    # Counter-clockwise by `degrees`, then mirrored.
    expected = np.rot90(stored, degrees // 90)
    if hflip:
        expected = expected[:, ::-1]
    assert np.array_equal(read(path, [0])[0][0], expected)
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]


def test_no_display_matrix_turns_nothing():
    pixels = pictures(1)[0]
    assert turn(pixels, None) is pixels
    assert np.array_equal(turn(pixels, np.diag([65536, 65536, 1 << 30])), pixels)


def test_a_gif_is_composed_and_sampled(tmp_path):
    frames = pictures(20)
    path = write_gif(tmp_path / "g.gif", frames)
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        truth = [
            np.asarray(f.convert("RGBA").convert("RGB")) for f in ImageSequence.Iterator(image)
        ]
    clip = load_clip(path, spec=SPEC, num_frames=8)
    numbers = midpoint(20, 8)
    assert np.array_equal(clip.frames, [prepare(truth[n], SPEC, False) for n in numbers])
    assert np.allclose(clip.times, numbers * 0.1)
    assert not clip.is_image
    info = probe(path)
    assert (info.kind, info.num_frames, info.width, info.height) == ("gif", 20, 96, 64)
    assert info.fps == pytest.approx(10)


def test_a_gif_counts_25_frames_a_second_in_the_reference_and_its_own_in_the_paper(tmp_path):
    path = write_gif(tmp_path / "g.gif", pictures(50))
    times = {
        preset.name: load_clip(path, spec=SPEC, num_frames=4, preset=preset, start=1, end=2).times
        for preset in (REFERENCE, PAPER)
    }
    assert np.allclose(times["reference"] * 10, 24 + midpoint(26, 4))
    assert np.allclose(times["paper"] * 10, 10 + midpoint(10, 4))


def test_clips_and_fps_mode_of_a_file(tmp_path):
    path = write_video(tmp_path / "c.mp4", pictures(90), g="15")
    truth = plain_decode(path)
    clip = load_clip(path, spec=SPEC, num_frames=4, start=1, end=2)
    assert np.array_equal(
        clip.frames, [prepare(truth[29 + n], SPEC, False) for n in midpoint(31, 4)]
    )
    every = load_clip(path, spec=SPEC, num_frames=None)
    assert np.allclose(every.times * 30, [15, 45, 75])


def test_a_short_video_repeats_frames_and_decodes_each_once(tmp_path):
    path = write_video(tmp_path / "s.mp4", pictures(5))
    clip = load_clip(path, spec=SPEC, num_frames=8)
    assert clip.frame_index.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert clip.frame_index.dtype == np.int32 and clip.frames.shape == (5, 32, 32, 3)


def test_linspace_preset_reaches_the_file(tmp_path):
    path = write_video(tmp_path / "l.mp4", pictures(30))
    preset = dataclasses.replace(REFERENCE, sampling="linspace")
    clip = load_clip(path, spec=SPEC, num_frames=4, preset=preset)
    assert np.allclose(clip.times * 30, [0, 9, 19, 29])


def test_probe_tells_size_length_and_sound(tmp_path):
    info = probe(write_video(tmp_path / "p.mp4", pictures(45), sound=True))
    assert dataclasses.astuple(info) == ("video", 45, 30.0, 1.5, 96, 64, True)
    assert not probe(write_video(tmp_path / "q.mp4", pictures(5))).has_audio


def test_real_clips_equal_a_plain_decode(real_media):
    for path in sorted(real_media.glob("*demo*.mp4")) + sorted(real_media.glob("output*.mp4")):
        truth = plain_decode(path)
        found, total, by_index = read(path, midpoint(len(truth), 16))
        assert total == len(truth) and by_index
        assert all(np.array_equal(pixels, truth[n]) for n, pixels in found.items())
