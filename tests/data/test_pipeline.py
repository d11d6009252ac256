"""Every step holds the same records on any number of workers and hosts, and from any start."""

import dataclasses
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from feeding import BUCKETS, MAX_LENGTH, MEDIA_TOKENS, NUM_FRAMES, ROWS, SPEC, segments

from vllama2_jax.data.index import joint_datasets
from vllama2_jax.data.mixture import Mixture
from vllama2_jax.data.pipeline import Feed
from vllama2_jax.data.schedule import Schedule
from vllama2_jax.media import load_clip
from vllama2_jax.models.vllama2 import Batch
from vllama2_jax.text import sft_example, supervise

TEXT = ("tokens", "targets", "positions", "segment_ids", "media_index")
SOUND = {"audio", "audio_mask", "audio_keep"}  # of runs whose records have any


@pytest.fixture(scope="module")
def whole_run(setting):
    return list(setting.feed().batches())


def _assert_equal(batch, wanted):
    assert batch[0] == wanted[0] and batch[2:] == wanted[2:]
    assert batch.arrays.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        np.testing.assert_array_equal(batch.arrays[name], array, err_msg=name)
        assert batch.arrays[name].dtype == array.dtype


def test_the_number_of_steps_is_known_before_the_first(setting, whole_run):
    feed = setting.feed()
    assert len(feed) == len(whole_run) and [b.step for b in whole_run] == list(range(len(feed)))
    ids = [id for batch in whole_run for row in batch.records for id in row]
    assert sorted(ids) == sorted(2 * [r.id for source in setting.sources for r in source])


@pytest.mark.parametrize(
    ("workers", "start"), [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0), (2, 3)]
)
def test_steps_are_the_same_for_any_number_of_workers_and_from_any_start(
    setting, whole_run, workers, start
):
    batches = list(setting.feed(workers=workers).batches(start))
    assert len(batches) == len(whole_run) - start
    for batch, wanted in zip(batches, whole_run[start:], strict=True):
        _assert_equal(batch, wanted)


def test_a_finished_run_has_no_more_batches_and_none_lie_beyond(setting):
    feed = setting.feed()
    assert list(feed.batches(len(feed))) == []
    with pytest.raises(ValueError, match="cannot start at step"):
        next(feed.batches(len(feed) + 1))


def test_what_runs_in_workers_imports_no_jax():
    code = "import sys, vllama2_jax.data.assemble; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("hosts", "start"), [(2, 0), (4, 1)])
def test_hosts_share_the_rows_of_every_step(setting, whole_run, hosts, start):
    feeds = [setting.feed(host=host, hosts=hosts).batches(start) for host in range(hosts)]
    for wanted, *parts in zip(whole_run[start:], *feeds, strict=True):
        for name, array in wanted.arrays.items():
            joined = np.concatenate([part.arrays[name] for part in parts])
            np.testing.assert_array_equal(joined, array, err_msg=name)
        assert sum((part.records for part in parts), ()) == wanted.records


def test_arrays_have_the_fields_shapes_and_types_of_a_batch(whole_run):
    fields = {field.name for field in dataclasses.fields(Batch)}
    for batch in whole_run:
        arrays = batch.arrays
        assert arrays.keys() | SOUND == fields
        length = arrays["tokens"].shape[1]
        assert length in BUCKETS
        for name in (*TEXT, "dataset_ids"):
            assert arrays[name].shape == (ROWS, length) and arrays[name].dtype == np.int32
        assert arrays["target_weights"].shape == (ROWS, length)
        assert arrays["target_weights"].dtype == np.float32
        assert arrays["frames"].shape == (ROWS, 2 * NUM_FRAMES, 16, 16, 3)
        assert arrays["frames"].dtype == np.uint8
        assert arrays["clip_frames"].shape == (ROWS, 2, NUM_FRAMES)
        assert arrays["clip_mask"].shape == (ROWS, 2) and arrays["clip_mask"].dtype == bool


def test_every_slot_tells_the_dataset_of_its_record(setting, whole_run):
    names, _ = joint_datasets(setting.indices())
    assert names == ("toys", "words")
    for batch in whole_run:
        for row, ids in enumerate(batch.arrays["dataset_ids"]):
            segments = batch.arrays["segment_ids"][row]
            assert not ids[segments == 0].any()
            for segment, dataset in enumerate(batch.datasets[row], start=1):
                assert {names[code] for code in ids[segments == segment]} == {dataset}


def test_dataset_codes_must_cover_the_sources_and_are_optional(setting):
    maker = setting.assembler()
    with pytest.raises(ValueError, match=r"codes cover \(9, 2\) records, .* hold \(9, 10\)"):
        dataclasses.replace(maker, dataset_codes=(np.zeros(9, int), np.zeros(2, int)))
    arrays = dataclasses.replace(maker, dataset_codes=None)(setting.schedule()[0]).arrays
    assert "dataset_ids" not in arrays


@pytest.mark.parametrize("packing", [False, True])
def test_a_segment_holds_what_its_record_says_alone(setting, packing):
    records = {record.id: record for source in setting.sources for record in source}
    batches = list(setting.feed(packing, epochs=1).batches())
    shared = [len(row) for batch in batches for row in batch.records]
    assert (max(shared) > 1) == packing
    met = []
    for id, segment, _ in segments(batches):
        messages = records[id].messages()
        clips = 0 if records[id].media is None else MEDIA_TOKENS
        alone = supervise(sft_example(messages, "chatml", setting.tokenizer), clips)
        for name in ("tokens", "targets", "target_weights"):
            np.testing.assert_array_equal(segment[name], getattr(alone, name), err_msg=name)
        np.testing.assert_array_equal(segment["positions"], np.arange(len(alone.tokens)))
        slots = segment["media_index"]
        np.testing.assert_array_equal(slots >= 0, alone.media_index >= 0)
        met.append(id)
    assert sorted(met) == sorted(records)


def test_media_slots_lead_to_the_frames_of_theirrecord(setting, whole_run):
    seen = set()
    for id, segment, row in segments(whole_run):
        slots = segment["media_index"][segment["media_index"] >= 0]
        if not slots.size:
            continue
        clip = slots[0] // MEDIA_TOKENS
        np.testing.assert_array_equal(slots, clip * MEDIA_TOKENS + np.arange(MEDIA_TOKENS))
        assert row["clip_mask"][clip]
        shown = row["frames"][row["clip_frames"][clip]]
        if id == "shades":
            path = setting.folder / "shades.mp4"
            wanted = load_clip(path, spec=SPEC, num_frames=NUM_FRAMES)
            np.testing.assert_array_equal(shown, wanted.frames[wanted.frame_index])
            assert len(set(row["clip_frames"][clip])) == NUM_FRAMES
        else:
            assert (shown[..., 0] == 20 * int(id.removeprefix("image-"))).all()
            # An image is there once, whatever the number of time steps.
            assert len(set(row["clip_frames"][clip])) == 1
        seen.add((id == "shades", clip))
    assert {(False, 0), (False, 1)} <= seen and (True in {video for video, _ in seen})
    for batch in whole_run:
        clips = [sum(not id.startswith("text") for id in row) for row in batch.records]
        assert batch.arrays["clip_mask"].sum(1).tolist() == clips


def test_a_stale_length_index_is_an_error(setting):
    short = [np.ones(len(source), int) for source in setting.sources]
    schedule = setting.schedule(lengths=short)
    with pytest.raises(ValueError, match="more than the 64 that the length index planned"):
        list(Feed(schedule, setting.assembler()).batches())
    with pytest.raises(ValueError, match=r"covers \(9, 9\) records, .* hold \(9, 10\)"):
        setting.schedule(lengths=[short[0], short[0]])


def test_hosts_and_clip_slots_must_fit_the_schedule(setting):
    with pytest.raises(ValueError, match="4 rows do not divide among 3 hosts"):
        setting.feed(hosts=3)
    with pytest.raises(ValueError, match=r"max_clips: the schedule plans 2 per row, .* for 1"):
        Feed(setting.schedule(), setting.assembler(max_clips=1))
    with pytest.raises(ValueError, match="host 2 is not one of 2"):
        setting.assembler(host=2, hosts=2)


def test_workers_that_would_die_of_too_little_shared_memory_are_not_started(setting, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 16))
    with pytest.raises(ValueError, match=r"2 workers need 0 MiB .* has 0 MiB free; enlarge it"):
        next(setting.feed(workers=2).batches())
    next(setting.feed().batches())


def test_text_alone_has_no_media_arrays(setting):
    only = dataclasses.replace(setting, sources=setting.sources[1:])
    feed = Feed(only.schedule(max_clips=0), only.assembler(max_clips=0))
    for batch in feed.batches():
        assert batch.arrays["frames"] is batch.arrays["clip_mask"] is None
        assert (batch.arrays["media_index"] == -1).all()


def test_a_schedule_may_end_at_a_number_of_steps(setting):
    form = setting.format()
    index = setting.indices()[1]
    lengths = form.slots(index.text_tokens, index.clips)
    how = dict(rows=2, max_length=MAX_LENGTH, max_clips=0, packing=False, buckets=BUCKETS)
    mixture = Mixture.by_weights((10,), (1,), 0)
    made = Schedule(mixture, [lengths], [index.clips], num_steps=50, window=16, **how)
    assert len(made) == 50 and made[49].number == 49
    # Each window of 16 positions is eight steps of two rows, and all of them are there.
    sources, records = mixture.locate(np.arange(96))
    for window in range(6):
        steps = [made[8 * window + i] for i in range(8)]
        met = sorted(place for step in steps for row in step.rows for place in row)
        part = slice(16 * window, 16 * window + 16)
        assert met == sorted(zip(sources[part].tolist(), records[part].tolist(), strict=True))
    with pytest.raises(IndexError, match="step 50 is not one of the 50"):
        made[50]
    with pytest.raises(ValueError, match="either epochs or num_steps"):
        Schedule(Mixture.by_counts((1,), (1,), 0), [np.ones(1)], [np.zeros(1)], **how)
