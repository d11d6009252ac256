"""Plans put every record of a window into a row once, and every row fits its step."""

import itertools

import numpy as np
import pytest

from vllama2_jax.data.packing import plan_window

HOW = dict(rows=8, max_length=512, max_clips=2, buckets=(128, 256, 512), seed=0, window=0)


def _records(count, seed=0, longest=512):
    """Lengths like those of a conversation set, and media for two in three."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.8, 0.7, count), 3, longest).astype(int)
    return lengths, (rng.random(count) < 0.66).astype(int)


def _rows(plan):
    return [row for step in plan for row in step.rows if row]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 500])
def test_every_record_is_in_one_row_that_fits_its_step(packing, count):
    lengths, clips = _records(count)
    plan = plan_window(lengths, clips, packing=packing, **HOW)
    assert sorted(sum(_rows(plan), ())) == list(range(count))
    for step in plan:
        assert len(step.rows) == 8
        needed = [sum(lengths[i] for i in row) for row in step.rows]
        assert step.length == min(b for b in (128, 256, 512) if b >= max(needed))
        assert max(sum(clips[i] for i in row) for row in step.rows) <= 2
        assert all(list(row) == sorted(row) for row in step.rows)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [17, 63, 500])
def test_rows_left_over_are_spread_so_that_no_step_is_nearly_empty(packing, count):
    plan = plan_window(*_records(count), packing=packing, **HOW)
    filled = [sum(bool(row) for row in step.rows) for step in plan]
    assert len(plan) == -(-sum(filled) // 8)
    assert max(filled) - min(filled) <= 1


def test_a_plan_depends_on_seed_and_window_and_nothing_else():
    records = _records(300)
    for packing in (False, True):
        plan = plan_window(*records, packing=packing, **HOW)
        assert plan_window(*records, packing=packing, **HOW) == plan
        for other in ({"seed": 1}, {"window": 1}):
            changed = plan_window(*records, packing=packing, **{**HOW, **other})
            assert changed != plan
            # Rows meet other rows, too.
            assert sorted(changed, key=str) != sorted(plan, key=str)


def test_without_packing_a_row_is_a_record_and_a_step_holds_rows_of_one_bucket():
    lengths, clips = _records(500)
    plan = plan_window(lengths, clips, packing=False, **HOW)
    assert all(len(row) == 1 for row in _rows(plan))
    buckets = np.searchsorted(HOW["buckets"], lengths)
    spans = sorted(
        (min(s), max(s))
        for s in ([buckets[i] for i, *_ in filter(None, step.rows)] for step in plan)
    )
    for before, after in itertools.pairwise(spans):
        assert before[1] <= after[0]
    assert sum(low < high for low, high in spans) <= len(HOW["buckets"]) - 1
    # Not from short to long: a run must not meet all long ones last.
    longest = [max(lengths[row[0]] for row in step.rows if row) for step in plan]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_packing_wastes_less_than_next_fit():
    lengths, clips = _records(20_000)
    packed = len(_rows(plan_window(lengths, clips, packing=True, **HOW)))
    rows, room, media = 0, 0, 0
    for size, clip in zip(lengths, clips, strict=True):
        if size > room or clip > media:
            rows, room, media = rows + 1, 512, 2
        room, media = room - size, media - clip
    assert packed < 0.83 * rows
    # Nothing can need fewer rows than all slots, or all media, laid end to end.
    bound = max(lengths.sum() / 512, clips.sum() / 2)
    assert bound <= packed < 1.06 * bound
    without_media = _rows(plan_window(lengths, 0 * clips, packing=True, **HOW))
    assert lengths.sum() / (512 * len(without_media)) > 0.97


def test_packed_steps_mix_long_and_short_records():
    lengths, clips = _records(5000)
    plan = plan_window(lengths, 0 * clips, packing=True, **HOW)
    means = [np.mean([lengths[i] for row in step.rows for i in row]) for step in plan]
    assert np.std(means) < 0.35 * lengths.mean()


def test_a_record_longer_than_a_row_counts_as_a_full_row():
    for packing in (False, True):
        plan = plan_window([9999, 4, 5], [0, 0, 0], packing=packing, **HOW)
        assert sorted(sum(_rows(plan), ())) == [0, 1, 2]
        assert plan[0].length == 512


def test_an_empty_window_has_no_steps():
    assert plan_window([], [], packing=True, **HOW) == ()


def test_no_record_of_a_large_window_is_left_out():
    lengths, clips = _records(100_000, longest=3000)
    how = {**HOW, "max_length": 3072, "buckets": (1024, 3072), "rows": 128}
    plan = plan_window(lengths, clips, packing=True, **how)
    assert len(list(itertools.chain.from_iterable(_rows(plan)))) == 100_000


@pytest.mark.parametrize(
    ("lengths", "clips", "change", "message"),
    [
        ([3], [0, 0], {}, "must be lists of equal length"),
        ([3], [0], {"rows": 0}, "0 rows"),
        ([3], [0], {"buckets": (128, 256)}, r"end with the longest row, 512"),
        ([3], [0], {"buckets": (512, 128, 512)}, "must rise"),
        ([3], [0], {"buckets": ()}, "must rise"),
        ([3], [0], {"buckets": (0, 512)}, "must be positive"),
        ([3, 0], [0, 0], {}, "record 1 of the window has 0 slots"),
        ([3, 3], [0, 3], {}, "record 1 of the window has 3 clips, a row holds 0 to 2"),
        ([3, 3], [0, -1], {}, "has -1 clips"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_words(lengths, clips, change, message):
    with pytest.raises(ValueError, match=message):
        plan_window(lengths, clips, packing=True, **{**HOW, **change})


@pytest.mark.parametrize(("records", "rows"), [(10, 4), (20, 4), (100, 16)])
def test_without_packing_a_step_of_a_small_set_holds_different_records(records, rows):
    """A window of a small set holds many copies of each record."""
    copies = 12
    lengths = np.tile(np.arange(100, 100 + records), copies)
    plans = plan_window(
        lengths,
        np.zeros(len(lengths), int),
        rows=rows,
        max_length=512,
        max_clips=1,
        packing=False,
        buckets=(256, 512),
        seed=3,
        window=0,
    )
    different = [len({record % records for (record,) in filter(None, p.rows)}) for p in plans]
    assert np.mean(different) > 0.8 * rows
