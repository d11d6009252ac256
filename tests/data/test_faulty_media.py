"""A run over files of which some are bad: they are counted and named, and it goes on without."""

import dataclasses

import av
import jax
import numpy as np
import optax
import pytest
from feeding import MAX_LENGTH, NUM_FRAMES, SPEC, record, segments, write
from learning import CONFIG, as_batch, loss, random_parts

from vllama2_jax.data.assemble import Hearing, SoundReader
from vllama2_jax.data.pipeline import Feed, TooManyFaults
from vllama2_jax.data.schedule import Step
from vllama2_jax.media import PAPER, SoundSpec, load_clip
from vllama2_jax.train.step import init_state, make_step

BAD = {
    "missing": "missing.mp4: no such file",
    "empty": "empty.mp4: the file is empty",
    "truncated": "truncated.mp4: is cut short",
    "corrupt": "corrupt.mp4: ",
    "sound alone": "sound.m4a: holds sound but no video",
    "words": "words.mp4: not a video",
}
GOOD = ("clip-0", "clip-1", "clip-2", "silent", "sounding")


def write_tracks(path, frames=None, sound=False):
    """An MP4 of these frames, of a second of silence, or of both."""
    with av.open(str(path), "w") as container:
        video = audio = None
        if frames is not None:
            # x264's look ahead does not see the same twice in such noise, whatever the threads.
            options = {"crf": "12", "threads": "1", "x264-params": "rc-lookahead=0"}
            video = container.add_stream("libx264", rate=12, options=options)
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=16000, layout="mono")
        if video:
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(video.encode(picture))
            container.mux(video.encode())
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(audio.encode(silence))
            container.mux(audio.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos that can be read, and one file of each way to be bad."""
    folder = tmp_path_factory.mktemp("faulty")
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (4, 24, 8, 8, 3), np.uint8).repeat(8, 2).repeat(8, 3)
    for number in range(3):
        write_tracks(folder / f"clip-{number}.mp4", clips[number])
    write_tracks(folder / "silent.mp4", clips[3])
    write_tracks(folder / "sounding.mp4", clips[3], sound=True)
    write_tracks(folder / "sound.m4a", sound=True)
    whole = (folder / "clip-0.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    begin = whole.index(b"mdat") + 1000
    (folder / "corrupt.mp4").write_bytes(
        whole[:begin] + rng.bytes(len(whole) // 2) + whole[begin + len(whole) // 2 :]
    )
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_text("Just words.\n" * 50)
    return folder


@pytest.fixture(scope="module")
def mixture(setting, folder):
    """Good and bad files in turn, and words beside them."""
    files = {"sound alone": "sound.m4a"}
    names = [*GOOD, *BAD]
    names = [names[i] for i in np.random.default_rng(1).permutation(len(names))]
    seen = [
        record(name, "video", files.get(name, f"{name}.mp4"), dataset="clips") for name in names
    ]
    told = [record(f"text-{i}", answer="Red. " * (1 + i), dataset="words") for i in range(6)]
    sources = (write(folder / "seen.json", seen), write(folder / "told.json", told))
    return dataclasses.replace(
        setting, folder=folder, sources=sources, media_tokens=CONFIG.num_media_tokens()
    )


def test_a_run_goes_on_without_the_media_that_are_bad(mixture):
    # One bucket, so that one step is compiled.
    schedule = mixture.schedule(buckets=(MAX_LENGTH,))
    feed = Feed(schedule, mixture.assembler(), max_faults=len(BAD))
    trainable, frozen = random_parts()
    optimizer = optax.sgd(0.05)
    step, state, losses = make_step(loss, optimizer), init_state(trainable, optimizer), []
    batches = []
    for batch in feed.batches():
        batches.append(batch)
        state, metrics = step(state, frozen, as_batch(batch.arrays))
        losses.append(float(metrics["loss"]))
        assert metrics["supervised_tokens"] == batch.arrays["target_weights"].sum()
    assert len(losses) == len(feed) >= 4 and np.isfinite(losses).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert int(state.step) == len(feed)
    assert_named(feed.faults.values())
    # Once in each of the two epochs, at their places, with weight zero and without a clip.
    assert sum(len(batch.faults) for batch in batches) == 2 * len(BAD)
    met = []
    for id, segment, row in segments(batches):
        met.append(id)
        assert (segment["target_weights"].sum() == 0) == (id in BAD)
        if id in BAD or id in GOOD:
            slot = segment["media_index"].max() // CONFIG.num_media_tokens()
            assert row["clip_mask"][slot] == (id in GOOD)
    assert sorted(met) == sorted(2 * [*GOOD, *BAD, *(f"text-{i}" for i in range(6))])


def assert_named(faults):
    assert {fault.record: fault.dataset for fault in faults} == dict.fromkeys(BAD, "clips")
    for fault in faults:
        assert BAD[fault.record] in fault.reason and "; " in fault.reason


def test_a_video_needs_no_sound_track(mixture, folder):
    rows = {id: row for id, _, row in segments(mixture.feed(packing=False).batches())}
    shown = {id: rows[id]["frames"][rows[id]["clip_frames"][0]] for id in ("silent", "sounding")}
    np.testing.assert_array_equal(shown["silent"], shown["sounding"])
    wanted = load_clip(folder / "silent.mp4", spec=SPEC, num_frames=NUM_FRAMES)
    np.testing.assert_array_equal(shown["silent"], wanted.frames[wanted.frame_index])


def test_silence_stands_for_a_track_and_not_for_a_sound_file(mixture, folder):
    spec = SoundSpec(1.0)
    own = {"track": True, "file": "sound.m4a", "mute file": "clip-0.mp4"}
    records = [
        record(name, "video", "silent.mp4", dataset="films") | {"audio": sound}
        for name, sound in own.items()
    ]
    assembler = dataclasses.replace(
        mixture.assembler(max_clips=1),
        sources=(write(folder / "heard.json", records),),
        record_format=mixture.format(sound_tokens=5),
        dataset_codes=None,
        hearing=Hearing((SoundReader(spec, PAPER, str(folder)),), spec.num_frames, max_sounds=1),
    )
    batch = assembler(Step(0, MAX_LENGTH, tuple(((0, number),) for number in range(len(own)))))
    (fault,) = batch.faults
    assert (fault.record, fault.dataset) == ("mute file", "films")
    assert "clip-0.mp4: has no sound track" in fault.reason and "; " in fault.reason
    heard = batch.arrays["target_weights"].sum(1) > 0
    np.testing.assert_array_equal(heard, [True, True, False])
    np.testing.assert_array_equal(batch.arrays["audio_mask"][:, 0], heard)
    np.testing.assert_allclose(batch.arrays["audio"][0], -15.942385, atol=1e-5)


def test_one_bad_file_more_than_allowed_stops_the_run_and_all_are_named(mixture):
    feed, done = mixture.feed(max_faults=len(BAD) - 1), 0
    with pytest.raises(TooManyFaults, match=r"6 records cannot be read, 5 are allowed: ") as error:
        for _ in feed.batches():
            done += 1
    assert done > 0  # it has trained until then
    for name, cause in BAD.items():
        assert f"{name} (" in str(error.value) and cause in str(error.value)
    assert_named(feed.faults.values())


def test_bad_files_are_named_by_workers_too(mixture):
    feed = mixture.feed(max_faults=len(BAD), workers=1, epochs=1)
    assert sum(len(batch.faults) for batch in feed.batches()) == len(BAD)
    assert_named(feed.faults.values())


def test_files_mended_since_are_read_again(mixture, folder):
    (folder / "late.mp4").write_bytes(b"")
    source = write(folder / "late.json", [record("late", "video", "late.mp4"), record("text")])
    late = dataclasses.replace(mixture, sources=(source,))
    (first,) = late.feed(epochs=1).batches()
    assert [fault.record for fault in first.faults] == ["late"]
    (folder / "late.mp4").write_bytes((folder / "clip-1.mp4").read_bytes())
    (again,) = late.feed(epochs=1).batches()
    assert not again.faults and again.records == first.records
    weights = [batch.arrays["target_weights"].sum() for batch in (first, again)]
    assert weights[0] < weights[1]
