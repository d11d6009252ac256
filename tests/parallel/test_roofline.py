"""The roofline's formula against pencil and paper, and published steps under their rooflines."""

import pytest

from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.published import published_rows
from vllama2_jax.parallel.roofline import assumptions, moved_bytes, roofline
from vllama2_jax.parallel.topology import topology

# A v5p's, per second.
PEAK, MEMORY, CHIPS = 459e12, 2.8e12, 64


def sent(seconds, overlapped, between_slices=False):
    """Gathered in so many seconds over all links of a slice, or summed between two."""
    if between_slices:
        size = round(seconds * 6.25e9)
        return Collective("all-reduce", ("data",), size, 1, (0, 64), overlapped, True)
    size = round(seconds * 6 * 90e9 * 64 / 63)
    return Collective("all-gather", ("fsdp",), size, 1, tuple(range(64)), overlapped)


def of_seconds(compute, memory, collectives, name="v5p-128", again=0.0):
    chips = topology(name).num_chips
    return roofline(
        Placement.in_order(topology(name)),
        model_flops=compute * PEAK * chips,
        chip_flops=(compute + again) * PEAK,
        hbm_bytes=memory * MEMORY,
        collectives=collectives,
    )


@pytest.mark.parametrize(
    ("compute", "memory", "collectives", "step"),
    [
        (3, 1, [], 3),
        (3, 4, [], 4),
        (3, 1, [sent(2, True)], 3),
        (3, 1, [sent(2, True), sent(2, True)], 4),
        (3, 1, [sent(2, False)], 5),
        (3, 1, [sent(1, False), sent(2, True), sent(0.5, False)], 4.5),
    ],
)
def test_a_step_is_its_longest_part_and_what_nothing_hides(compute, memory, collectives, step):
    found = of_seconds(compute, memory, collectives)
    assert found.step_seconds == pytest.approx(step)
    assert found.utilisation == pytest.approx(compute / step)
    assert (found.compute_seconds, found.hbm_seconds) == pytest.approx((compute, memory))


def test_recomputation_takes_time_and_is_no_use():
    found = of_seconds(3, 0, [], again=1)
    assert (found.step_seconds, found.utilisation) == pytest.approx((4, 3 / 4))


def test_slices_and_the_network_between_them_work_at_the_same_time():
    collectives = [sent(4, True), sent(5, True, between_slices=True), sent(1, False)]
    found = of_seconds(3, 0, collectives, "2xv5p-128")
    assert (found.ici_seconds, found.dcn_seconds) == pytest.approx((5, 5))
    assert (found.exposed_seconds, found.step_seconds) == pytest.approx((1, 6))


def test_what_moves_is_written_and_read_once_per_use():
    moved = moved_bytes(weights_read=3, weights_gathered=2, gradients=10, state=100, saved=1000)
    assert moved == 3 + 2 + 2 * (10 + 100 + 1000)


def test_simulated_devices_have_no_roofline():
    with pytest.raises(ValueError, match="cpu:8: no peak is stated for a cpu"):
        assumptions(topology("cpu:8"))


def test_every_published_step_took_longer_than_its_roofline():
    rows = {(row.name, row.topology): row for row in published_rows()}
    assert {key: row.measured for key, row in rows.items()} == {
        ("Mixtral-8x7B", "v5p:4x4x4"): 0.5489,
        ("Mixtral-8x7B", "v5p:4x8x8"): 0.5256,
        ("Llama2-70B", "v5p:8x8x8"): 0.654,
        ("22B", "v4:4x4x4"): 0.567,
    }
    for row in rows.values():
        assert row.measured < row.exposed.utilisation < row.hidden.utilisation < 1
        assert row.source


def test_full_recomputation_bounds_utilisation_by_three_quarters():
    # Three passes of four; what is never computed again (head, last product) lets it be a bit more.
    mixtral = published_rows()[0].hidden
    assert 0.75 < mixtral.utilisation < 0.76
    # 12.9e9 active parameters of 46.7e9: 6 FLOPs each per token, and 4 % for attention.
    tokens = 36 * 4096
    flops = mixtral.utilisation * mixtral.step_seconds * PEAK
    assert flops == pytest.approx(6 * 12.75e9 * tokens * 1.04, rel=0.02)
    # Gathered twice and scattered once, over all six links.
    assert mixtral.ici_seconds == pytest.approx(3 * 2 * 46.7e9 * 63 / 64 / 540e9, rel=0.01)


@pytest.mark.parametrize("name", ["v5p-128", "2xv5e-256", "h100:8x4"])
def test_assumptions_are_sentences_with_the_chips_numbers(name):
    wanted = topology(name)
    sentences = assumptions(wanted)
    assert all(sentence.endswith(".") for sentence in sentences)
    text = " ".join(sentences)
    assert f"{wanted.chip.link_bandwidth / 1e9:g} GB/s per link" in text
    assert ("Between slices" in text) == (wanted.num_slices > 1)
