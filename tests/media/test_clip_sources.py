"""What may be given as media, and the quirks of the presets."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from rendered import pictures, write_gif, write_video

from vllama2_jax.media import (
    CLIP_336,
    PAPER,
    REFERENCE,
    SIGLIP_384,
    ImageSpec,
    Limits,
    MediaError,
    MediaPreset,
    load_clip,
    normalise,
    prepare,
    probe,
)
from vllama2_jax.models.config import config_from_dict

SPEC = ImageSpec(32, "stretch", (0.5, 0.25, 0.75), (0.5,) * 3)
PADDED = dataclasses.replace(REFERENCE, square_pad=True)


def prepared(frames, square_pad=False):
    return np.stack([prepare(frame, SPEC, square_pad) for frame in frames])


def save_frames(folder, frames, names=None):
    for number, frame in enumerate(frames):
        name = names[number] if names else f"{number:03d}.png"
        Image.fromarray(frame).save(folder / name)


@pytest.mark.parametrize("as_type", ["path", "str", "pil", "array"])
def test_an_image_is_one_frame_for_all_time_steps(tmp_path, as_type):
    picture = pictures(1)[0]
    path = tmp_path / "i.png"
    Image.fromarray(picture).save(path)
    media = {"path": path, "str": str(path), "pil": Image.fromarray(picture), "array": picture}
    clip = load_clip(media[as_type], spec=SPEC, num_frames=8)
    assert clip.is_image
    assert np.array_equal(clip.frames, prepared([picture]))
    assert clip.frame_index.tolist() == [0] * 8 and clip.frame_index.dtype == np.int32
    assert np.isnan(clip.times).all()
    assert load_clip(media[as_type], spec=SPEC, num_frames=None).frame_index.tolist() == [0]


def test_grey_palette_and_alpha_images_become_rgb(tmp_path):
    picture = Image.fromarray(pictures(1)[0])
    for mode in ("L", "P", "RGBA"):
        picture.convert(mode).save(tmp_path / f"{mode}.png")
        clip = load_clip(tmp_path / f"{mode}.png", spec=SPEC, num_frames=2)
        assert np.array_equal(clip.frames[0], prepare(picture.convert(mode), SPEC, False))


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path):
    video = write_video(tmp_path / "v.mp4", pictures(9))
    truth = load_clip(video, spec=SPEC, num_frames=4).frames
    video.rename(tmp_path / "v.unknown")
    assert np.array_equal(load_clip(tmp_path / "v.unknown", spec=SPEC, num_frames=4).frames, truth)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "i.jpg")
    (tmp_path / "i.jpg").rename(tmp_path / "i.mp4")
    assert load_clip(tmp_path / "i.mp4", spec=SPEC, num_frames=4).is_image


def test_frames_of_a_folder_are_sampled_in_plain_order_of_names(tmp_path):
    frames = pictures(12)
    names = [f"{number}.png" for number in range(12)]
    save_frames(tmp_path, frames, names)
    (tmp_path / "notes.txt").write_text("not a frame")
    order = sorted(range(12), key=lambda number: names[number])  # 0, 1, 10, 11, 2 ...
    clip = load_clip(tmp_path, spec=SPEC, num_frames=4)
    wanted = [1, 4, 7, 10]
    assert np.array_equal(clip.frames, prepared(frames[[order[n] for n in wanted]]))
    assert np.allclose(clip.times, np.asarray(wanted) / 3)
    part = load_clip(tmp_path, spec=SPEC, num_frames=2, start=1, end=3)  # 3 a second: 2 to 8
    assert np.allclose(part.times * 3, [4, 7])
    info = probe(tmp_path)
    assert (info.kind, info.num_frames, info.fps) == ("folder", 12, None)


@pytest.mark.parametrize("as_type", ["array", "arrays", "pil", "paths", "mixed"])
def test_frames_in_memory_are_used_as_given(tmp_path, as_type):
    frames = pictures(5)
    save_frames(tmp_path, frames)
    images, paths = [Image.fromarray(f) for f in frames], sorted(tmp_path.iterdir())
    media = {
        "array": frames,
        "arrays": list(frames),
        "pil": images,
        "paths": paths,
        "mixed": [paths[0], images[1], frames[2], str(paths[3]), frames[4]],
    }[as_type]
    for num_frames in (None, 3, 5):
        clip = load_clip(media, spec=SPEC, num_frames=num_frames)
        assert not clip.is_image
        assert np.array_equal(clip.frames[clip.frame_index], prepared(frames))


def test_a_frame_given_twice_is_kept_once(tmp_path):
    frames = pictures(2)
    save_frames(tmp_path, frames)
    a, b = sorted(tmp_path.iterdir())
    first, second = frames
    for media in ([a, b, a], [first, second, first]):
        clip = load_clip(media, spec=SPEC, num_frames=3)
        assert clip.frame_index.tolist() == [0, 1, 0] and len(clip.frames) == 2


def test_too_few_frames_are_filled_with_black():
    frames = pictures(3)
    clip = load_clip(frames, spec=SPEC, num_frames=8)
    assert clip.frame_index.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert np.array_equal(clip.frames[:3], prepared(frames))
    assert not clip.frames[3].any()
    assert np.isnan(clip.times[3])


def test_padded_black_frames_alternate_their_orientation_as_in_the_original():
    frames = pictures(3, width=64, height=40)
    clip = load_clip(frames, spec=SPEC, num_frames=7, preset=PADDED)
    wide, tall = np.zeros((40, 64, 3), np.uint8), np.zeros((64, 40, 3), np.uint8)
    expected = prepared([*frames, tall, wide, tall, wide], square_pad=True)
    assert np.array_equal(clip.frames[clip.frame_index], expected)
    assert len(clip.frames) == 5
    straight = load_clip(frames, spec=SPEC, num_frames=7, preset=PAPER)
    expected = prepared([*frames, wide, wide, wide, wide], square_pad=True)
    assert np.array_equal(straight.frames[straight.frame_index], expected)


def test_a_short_gif_drops_repeats_and_ends_in_black(tmp_path):
    frames = pictures(3)
    path = write_gif(tmp_path / "g.gif", frames)
    clip = load_clip(path, spec=SPEC, num_frames=8)
    assert clip.frame_index.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert clip.frames[:3].reshape(3, -1).any(1).all() and not clip.frames[3].any()
    repeated = load_clip(path, spec=SPEC, num_frames=8, preset=PAPER)
    assert repeated.frame_index.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_the_reference_cuts_to_the_first_32_frames():
    frames = pictures(40)
    clip = load_clip(frames, spec=SPEC, num_frames=40)
    assert np.array_equal(clip.frames[clip.frame_index], prepared(frames[:32]))
    filled = load_clip(frames[:3], spec=SPEC, num_frames=64)
    assert filled.frame_index.tolist() == [0, 1, 2] + [3] * 29
    assert len(load_clip(frames, spec=SPEC, num_frames=40, preset=PAPER).frame_index) == 40
    assert len(load_clip(frames[0], spec=SPEC, num_frames=40).frame_index) == 32


def test_exif_orientation_counts_in_the_paper_only(tmp_path):
    picture = Image.fromarray(pictures(1)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    path = tmp_path / "e.png"
    picture.save(path, exif=exif)
    assert np.array_equal(load_clip(path, spec=SPEC, num_frames=1).frames, prepared([picture]))
    turned = np.rot90(np.asarray(picture), -1)
    assert np.array_equal(
        load_clip(path, spec=SPEC, num_frames=1, preset=PAPER).frames, prepared([turned], True)
    )


def test_presets_and_specs_are_plain_json():
    for preset in (REFERENCE, PAPER):
        data = json.loads(json.dumps(dataclasses.asdict(preset)))
        assert config_from_dict(MediaPreset, data) == preset
    for spec in (CLIP_336, SIGLIP_384):
        data = json.loads(json.dumps(dataclasses.asdict(spec)))
        data["mean"], data["std"] = tuple(data["mean"]), tuple(data["std"])
        assert ImageSpec(**data) == spec
    with pytest.raises(ValueError, match="unknown sampling 'random'"):
        dataclasses.replace(REFERENCE, sampling="random")
    with pytest.raises(ValueError, match="unknown geometry"):
        ImageSpec(8, "fill", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("num_frames", "words"), [(0, "at least one frame"), (2.5, "a whole number"), ("8", "a whole")]
)
def test_num_frames_that_are_no_count_are_refused(num_frames, words):
    with pytest.raises(ValueError, match=words):
        load_clip(pictures(2), spec=SPEC, num_frames=num_frames)


def test_numbers_of_numpy_are_numbers(tmp_path):
    path = write_video(tmp_path / "v.mp4", pictures(60))
    truth = load_clip(path, spec=SPEC, num_frames=2, start=1, end=2)
    found = load_clip(
        path,
        spec=SPEC,
        num_frames=np.int64(2),
        start=np.float32(1),
        end=np.int32(2),
        limits=Limits(max_pixels=np.int64(10**6), max_seconds=np.float32(60)),
    )
    assert np.array_equal(found.frames, truth.frames)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_relative_path_is_of_the_current_folder(tmp_path, monkeypatch, as_list):
    for folder, picture in zip("ab", pictures(2), strict=True):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture).save(tmp_path / folder / "x.png")
        monkeypatch.chdir(tmp_path / folder)
        clip = load_clip(["x.png"] if as_list else "x.png", spec=SPEC, num_frames=1)
        assert np.array_equal(clip.frames, prepared([picture]))
        assert clip.source == ("frames" if as_list else "x.png")


def test_errors_name_a_relative_path_as_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "frames").mkdir()
    for name in ("good.png", "frames/bad.png", "bad.png.png"):
        Image.fromarray(pictures(1)[0]).save(tmp_path / name)
    (tmp_path / "bad.png").write_text("words")
    (tmp_path / "frames/bad.png").write_text("words")
    monkeypatch.chdir(tmp_path)
    named = {
        "bad.png": "bad.png",
        "./bad.png": "./bad.png",
        "frames": "frames/bad.png",
        "frames/": "frames/bad.png",
        "frames/../bad.png": "frames/../bad.png",
        "nowhere/v.mp4": "nowhere/v.mp4",
    }
    for path, name in named.items():
        with pytest.raises(MediaError) as caught:
            load_clip(path, spec=SPEC, num_frames=1)
        assert caught.value.path == name
    with pytest.raises(MediaError) as caught:
        load_clip(["good.png", "bad.png"], spec=SPEC, num_frames=1)
    assert caught.value.path == "bad.png"
    with pytest.raises(MediaError, match="the path is empty"):
        load_clip("", spec=SPEC, num_frames=1)


def test_a_name_that_looks_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip:1.mp4", pictures(5))
    assert probe("clip:1.mp4").num_frames == 5


def test_a_relative_path_in_a_folder_that_is_gone_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(MediaError, match=r"^v\.mp4: .*current folder is gone"):
        load_clip("v.mp4", spec=SPEC, num_frames=1)


def test_real_images_equal_the_pil_processor(real_media):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    for path in sorted(real_media.glob("*.jpg")):
        clip = load_clip(path, spec=CLIP_336, num_frames=8)
        with Image.open(path) as image:
            expected = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"]
        assert np.array_equal(normalise(clip.frames, CLIP_336), expected.transpose(0, 2, 3, 1))


def test_a_recording_is_not_a_video(real_media):
    with pytest.raises(ValueError, match="holds sound but no video"):
        load_clip(real_media / "bird-twitter-car.wav", spec=CLIP_336, num_frames=8)
