"""How records share rows, and rows steps, changes no loss and no gradient."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from feeding import MAX_LENGTH, segments
from learning import CONFIG, as_batch, loss, random_parts

from vllama2_jax.data.schedule import Step
from vllama2_jax.train.step import loss_and_gradients
from vllama2_jax.train.trainable import combine


@pytest.fixture(scope="module")
def small(setting):
    return dataclasses.replace(setting, media_tokens=CONFIG.num_media_tokens())


@pytest.fixture(scope="module")
def parts():
    return random_parts()


@pytest.fixture(scope="module")
def steps(small):
    """The same records packed and one to a row, all rows of equal length."""

    def planned(packing):
        schedule = small.schedule(packing, epochs=1)
        return [schedule[number]._replace(length=MAX_LENGTH) for number in range(len(schedule))]

    return {packing: planned(packing) for packing in (True, False)}


@jax.jit
def sums_of(trainable, frozen, batch):
    """(sum of losses, sum of weights, {path: gradient of the sum of losses})."""

    def total(trainable):
        sums = loss(combine(trainable, frozen), batch)
        return sums.total, sums.weight

    (value, weight), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
    return value, weight, gradients


def added_up(assembler, parts, steps):
    """`sums_of` all steps together."""
    found = [sums_of(*parts, as_batch(assembler(step).arrays)) for step in steps]
    return jax.tree.map(lambda *values: sum(np.asarray(v, np.float64) for v in values), *found)


def assert_close(found, wanted, tolerance=1e-5):
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=tolerance)
    assert float(found[1]) == float(wanted[1])
    assert set(found[2]) == set(wanted[2])
    for path, leaf in wanted[2].items():
        scale = np.abs(leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(found[2][path], leaf, atol=tolerance * scale, err_msg=path)


def test_packed_rows_equal_unpacked_rows(small, parts, steps):
    assembler = small.assembler()
    packed, alone = (added_up(assembler, parts, steps[packing]) for packing in (True, False))
    assert_close(packed, alone)
    # It is the same records that were shared differently, of every kind.
    made = {packing: [assembler(step) for step in steps[packing]] for packing in steps}
    ids = {packing: sorted(id for id, *_ in segments(made[packing])) for packing in made}
    assert ids[True] == ids[False] == sorted(r.id for s in small.sources for r in s)
    kinds = {r.media.kind if r.media else "text" for s in small.sources for r in s}
    assert kinds == {"text", "image", "video"}
    assert len(steps[True]) < len(steps[False])
    assert any(len(row) > 2 for batch in made[True] for row in batch.records)
    assert any(batch.arrays["clip_mask"].all(1).any() for batch in made[True])
    # Without the bounds between segments it would be another loss.
    batch = as_batch(made[True][0].arrays)
    erased = dataclasses.replace(batch, segment_ids=np.minimum(batch.segment_ids, 1))
    right, wrong = (float(sums_of(*parts, b)[0]) for b in (batch, erased))
    assert abs(right - wrong) > 1e-4 * right


def test_buckets_change_no_loss(small, parts, steps):
    assembler = small.assembler()
    step = min(steps[False], key=lambda step: _needed(assembler(step)))
    assert 0 < _needed(assembler(step)) <= 64 < MAX_LENGTH
    wanted = sums_of(*parts, as_batch(assembler(step).arrays))
    shorter = as_batch(assembler(step._replace(length=64)).arrays)
    assert shorter.tokens.shape[1] == 64
    sums = jax.jit(lambda *parts: loss(combine(*parts), shorter))(*parts)
    assert float(sums.total) == pytest.approx(float(wanted[0]), rel=1e-6)
    assert float(sums.weight) == float(wanted[1])


def _needed(batch):
    return int((batch.arrays["segment_ids"] > 0).sum(1).max())


def test_records_that_cannot_be_read_change_no_loss_of_others(small, parts, steps):
    assembler = small.assembler()
    step = steps[True][0]
    victim = next(place for row in step.rows for place in row if place[0] == 0)

    def refuse(source, number, media, read=assembler.readers[0]):
        if number == victim[1]:
            raise ValueError("is broken")
        return read(source, number, media)

    broken = dataclasses.replace(assembler, readers=(refuse, refuse))
    (fault,) = broken(step).faults
    assert (fault.source, fault.number) == victim
    without = Step(0, MAX_LENGTH, tuple(tuple(p for p in row if p != victim) for row in step.rows))
    assert_close(added_up(broken, parts, [step]), added_up(assembler, parts, [without]))


def test_accumulation_of_four_equals_one_batch_of_assembled_rows(small, parts, steps):
    batch = as_batch(small.assembler()(steps[True][0]).arrays)
    assert len(set(np.asarray(batch.target_weights).sum(1).tolist())) == 4
    total, weight, gradients = sums_of(*parts, batch)
    in_parts = jax.jit(functools.partial(loss_and_gradients, loss, micro_batches=4))
    sums, found = in_parts(*parts, batch)
    wanted = {path: leaf / weight for path, leaf in gradients.items()}
    assert_close((sums.total * weight, weight, found), (total, weight, wanted))
