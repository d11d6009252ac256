"""Groups of devices in every form in which XLA writes them."""

import numpy as np
import pytest

from vllama2_jax.parallel.groups import axes_of, device_groups

MESH = dict(data=2, fsdp=2, tensor=2)


def as_lists(attributes, num_devices=8):
    return device_groups(attributes, num_devices).tolist()


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]], "data tensor"),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]], "data fsdp tensor"),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        (
            "replica_groups=mesh['a'=8,'b'=1] {'a','b'}",
            [[0, 1, 2, 3, 4, 5, 6, 7]],
            "data fsdp tensor",
        ),
        # `a` of 8 in parts: 2, then 2, then 2 behind them.
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        (
            "replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
            "data tensor",
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            "data",
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]0,2,4,6,1,3,5,7) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            "tensor",
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            "data",
        ),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", [[0, 4], [4, 0], [1, 5], [5, 1]], "data"),
    ],
)
def test_groups_and_the_axes_that_they_run_over(text, groups, axes):
    attributes = f", channel_id=1, {text}, dimensions={{0}}, use_global_device_ids=true"
    assert as_lists(attributes) == groups
    assert axes_of(device_groups(attributes, 8), MESH) == tuple(axes.split())


def test_every_device_is_in_one_group_of_a_part_of_an_axis():
    groups = device_groups("replica_groups=mesh['a'=16,'b'=3,'c'=4] {'a':(2)4,'c':(2)2}", 192)
    assert groups.shape == (24, 8)
    assert sorted(groups.reshape(-1)) == list(range(192))
    # Devices of a group differ in the middle part of `a`, by 2 of 16, and in the last part of `c`.
    np.testing.assert_array_equal(groups[0], [0, 1, 24, 25, 48, 49, 72, 73])


def test_what_cannot_be_read_is_said():
    with pytest.raises(
        ValueError, match="cannot read the groups of devices in ', replica_groups=x"
    ):
        device_groups(", replica_groups=x{0}", 8)
    with pytest.raises(ValueError, match="cannot read the groups"):
        device_groups("replica_groups={{0,1},{2}}", 3)
