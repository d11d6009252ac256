"""Bandwidths and times against pencil and paper."""

import numpy as np
import pytest

from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.topology import topology

GB = 1e9
LINK = 90 * GB  # of a v5p, one way


def placed(name):
    return Placement.in_order(topology(name))


def collective(kind, group, size=GB, count=1, **options):
    return Collective(kind, ("fsdp",), round(size), count, tuple(group), **options)


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5p:4x4x4", range(64), 3 * 2),
        ("v5p:4x4x4", range(4), 2),  # one edge of the cube, a ring
        ("v5p:4x4x4", range(0, 64, 4), 2 * 2),  # one of its faces
        ("v5p:4x4x4", (0, 1), 1),  # half an edge is no ring
        ("v5p:4x4x4", (0, 2), 1 / 2),  # two hops, over links that two groups share
        ("v5p:2x2x1", range(4), 2),  # no rings in less than a cube
        ("v5p:4x4x8", range(128), 3 * 2),
    ],
)
def test_a_group_receives_over_the_links_of_the_box_that_it_fills(name, group, links):
    placement = placed(name)
    places = placement.places[list(group)][:, 1:]
    assert placement.bandwidth(places) == pytest.approx(links * LINK)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # 63/64 of a gigabyte over six links.
        ("all-gather", range(64), 63 / 64 / (6 * 90)),
        ("all-reduce", range(64), 2 * 63 / 64 / (6 * 90)),
        # The result is a 64th of what is scattered.
        ("reduce-scatter", range(64), 63 / (6 * 90)),
        # A quarter of what gathering four times as much takes over a ring of four.
        ("all-to-all", range(4), 4 / (2 * 90) / 4),
        ("collective-permute", range(4), 1 / 90),
    ],
)
def test_times_within_a_slice(kind, group, seconds):
    one = collective(kind, group, count=3)
    assert placed("v5p-128").seconds(one) == pytest.approx((3 * seconds, 0))


def test_half_of_an_all_to_all_crosses_the_middle_of_the_longest_line():
    # 8 chips in a line: 4 of them send half of a gigabyte each across one link.
    one = collective("all-to-all", range(0, 128, 16))
    assert placed("v5e:8x16").seconds(one) == pytest.approx((4 * 0.5 / 45, 0))


def test_what_spans_slices_is_gathered_within_and_between():
    # Two slices of 64: each chip fetches its 64th from its counterpart, then its slice gathers.
    within, between = placed("2xv5p-128").seconds(collective("all-gather", range(128)))
    assert within == pytest.approx(63 / 64 / (6 * 90))
    assert between == pytest.approx(1 / 64 / 2 / 6.25)


def test_between_counterparts_goes_everything():
    one = collective("all-reduce", (0, 64), between_slices=True)
    assert placed("2xv5p-128").seconds(one) == pytest.approx((0, 2 / 2 / 6.25))
    one = collective("collective-permute", (0, 64), between_slices=True)
    assert placed("2xv5p-128").seconds(one) == pytest.approx((0, 1 / 6.25))


def test_a_switch_serves_a_node_and_the_network_joins_nodes():
    placement = placed("h100:8x4")
    assert placement.seconds(collective("all-gather", range(8))) == pytest.approx((7 / 8 / 450, 0))
    assert placement.seconds(collective("all-to-all", range(8))) == pytest.approx((7 / 8 / 450, 0))
    spread = collective("all-gather", range(0, 32, 8))
    assert placement.seconds(spread) == pytest.approx((0, 3 / 4 / 50))


def test_devices_lie_where_their_coordinates_say():
    class Device:
        def __init__(self, slice_index, coords):
            self.slice_index, self.coords = slice_index, coords

    grid = np.array([[Device(1, (0, 1, 0)), Device(0, (1, 1, 0))]])
    placement = Placement.of_devices(topology("2xv5p-8"), grid)
    assert placement.places.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
