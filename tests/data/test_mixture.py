"""A mixture says what stands at each position of the stream, and the paper's tables as data."""

import numpy as np
import pytest

from vllama2_jax.data.mixture import ROUND, Mixture, joint_mixture, permute
from vllama2_jax.data.paper_mixtures import (
    AUDIO_PRETRAIN,
    AUDIO_PRINTED_USED,
    AUDIO_SFT,
    AV_JOINT,
    IMAGE,
    VIDEO,
    VIDEO_PRETRAIN,
    VIDEO_SFT,
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_visits_everything_once(size):
    order = permute(np.arange(size), size, 5, 1)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def _permute_in_plain_integers(index, size, *keys):
    """The same network, one index at a time, by Python's integers."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = 0
    for part in keys:
        key = mix(key ^ mix((part + 0x9E3779B97F4A7C15) % 2**64))
    half = max(3, -(-max(size - 1, 1).bit_length() // 2))
    while True:
        left, right = divmod(index, 1 << half)
        for number in range(1, 7):
            mixed = mix(right ^ (key + number * 0x9E3779B97F4A7C15) % 2**64)
            left, right = right, left ^ mixed % (1 << half)
        index = (left << half) + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 17, 64, 65, 100_000])
def test_permute_equals_plain_integers(size):
    index = np.random.default_rng(size).integers(0, size, 50)
    wanted = [_permute_in_plain_integers(int(i), size, 2**40, 3) for i in index]
    assert permute(index, size, 2**40, 3).tolist() == wanted


def test_permute_is_as_likely_to_put_a_thing_anywhere():
    keys, size = np.arange(20_000), 10
    seen = np.bincount(permute(np.full(20_000, 3), size, 9, keys), minlength=size)
    # 2,000 expected, standard deviation 42.
    assert abs(seen - 2000).max() < 5 * 42
    pairs = permute(np.full(20_000, 0), size, keys) * size + permute(np.ones(20_000), size, keys)
    counts = np.bincount(pairs.astype(int), minlength=size**2).reshape(size, size)
    assert (counts.diagonal() == 0).all()
    off = counts[~np.eye(size, dtype=bool)]  # 222 expected, standard deviation 15
    assert abs(off - 20_000 / 90).max() < 5 * 15


def test_orders_never_change_from_one_version_to_the_next():
    assert permute(np.arange(10), 10, 0).tolist() == [8, 7, 0, 5, 6, 3, 2, 4, 1, 9]
    source, record = Mixture.by_counts((5, 7), (3, 4), 1).locate(np.arange(7))
    assert list(zip(source.tolist(), record.tolist(), strict=True)) == [
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 5),
        (0, 2),
        (0, 4),
        (0, 0),
    ]


def _all(mixture, epochs):
    source, record = mixture.locate(np.arange(epochs * len(mixture)))
    return source.reshape(epochs, -1), record.reshape(epochs, -1)


def test_every_epoch_holds_the_given_number_of_samples_of_each_source():
    source, _ = _all(Mixture.by_counts((50, 9, 400), (30, 20, 100), 3), 4)
    for epoch in source:
        assert np.bincount(epoch).tolist() == [30, 20, 100]
    assert (source[0] != source[1]).any()


def test_no_record_returns_before_all_of_its_source_have_come():
    mixture = Mixture.by_counts((50, 9), (30, 20), 3)
    source, record = mixture.locate(np.arange(500))
    # Within a round the order is shuffled, so whole epochs are told by their draws: of 300 draws
    # of 50 records and 200 of 9, all come equally often, but for the epoch that is under way.
    assert (np.bincount(record[source == 0]) == 6).all()
    seen = np.bincount(record[source == 1])
    assert seen.sum() == 200 and set(seen) == {22, 23}


def test_each_epoch_of_a_source_has_an_order_of_its_own():
    _, record = _all(Mixture.in_groups((40,), (0,), 2, groups=40), 3)
    for epoch in record:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
    assert (record[0] != record[1]).any() and (record[1] != record[2]).any()
    _, other_seed = _all(Mixture.in_groups((40,), (0,), 3, groups=40), 2)
    # Not the same orders one epoch later either.
    assert (other_seed[0] != record[0]).any() and (other_seed[0] != record[1]).any()


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture.by_counts((50, 9), (30, 20), 3),
        Mixture.by_weights((50, 9), (0.9, 0.1), 3),
        joint_mixture(11, 5, 30, 3),
    ],
)
def test_a_position_holds_the_same_however_it_is_asked_for(mixture):
    together = np.stack(mixture.locate(np.arange(1000)), 1)
    some = np.random.default_rng(0).permutation(1000)[:50]
    np.testing.assert_array_equal(np.stack(mixture.locate(some), 1), together[some])
    np.testing.assert_array_equal(np.stack(mixture.locate([77]), 1), together[77:78])


def test_weights_are_shares_of_every_round():
    mixture = Mixture.by_weights((1000, 10, 10), (2, 1, 1), 0)
    source, record = mixture.locate(np.arange(2 * ROUND))
    for part in (source[:ROUND], source[ROUND:]):
        assert np.bincount(part).tolist() == [ROUND // 2, ROUND // 4, ROUND // 4]
    # Close to the shares in short stretches too: 500 expected of 1,000, deviation 16.
    assert abs((source[:1000] == 0).sum() - 500) < 5 * 16
    assert set(np.bincount(record[source == 0])) <= {65, 66}
    with pytest.raises(TypeError, match="has no end"):
        len(mixture)


def test_joint_groups_are_two_audio_video_one_audio_one_video():
    source, record = _all(joint_mixture(9, 4, 20, 0), 3)
    assert source.shape == (3, 20)
    assert (source.reshape(-1, 4) == [0, 0, 1, 2]).all()
    # Nine audio-video records in five groups: the tenth draw is the next epoch's first.
    draws = record[source == 0]
    for epoch in range(3):
        assert sorted(draws[9 * epoch : 9 * epoch + 9]) == list(range(9))
    # Audio (4 records) goes on through epochs, so that 12 draws are 3 of each.
    assert np.bincount(record[source == 1][:12]).tolist() == [3] * 4
    assert len(set(record[source == 2])) == 15


def test_the_originals_joint_training_reads_half_of_its_lists_again_and_again():
    source, record = _all(joint_mixture(10, 10, 20, 0, original=True), 3)
    for epoch in (1, 2):
        np.testing.assert_array_equal(record[epoch], record[0])
    assert len(set(record[source == 0])) == 10
    assert len(set(record[source == 1])) == 5 and len(set(record[source == 2])) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture.by_counts((3, 0), (1, 1), 0), "source 1 has 0 records"),
        (lambda: Mixture.by_counts((3, 4), (1, 0), 0), "source 1 has 4 records and 0 positions"),
        (lambda: Mixture.by_counts((3, 4), (1,), 0), "2 sources has 1 shares"),
        (lambda: Mixture.by_counts((), (), 0), "0 sources"),
        (lambda: Mixture.by_counts((3,), (1,), -1), "seed is -1"),
        (lambda: Mixture.by_weights((3, 4), (1, -1), 0), "must be positive"),
        (lambda: Mixture.by_weights((3, 4), (1, float("nan")), 0), "must be positive"),
        (lambda: Mixture.by_weights((3, 4), (1, 1e-9), 0), "source 1 has weight 1e-09"),
        (lambda: Mixture.in_groups((3, 4), (0, 2), 0, groups=1), "beyond the 2"),
        (lambda: Mixture.in_groups((3, 4), (0, 0), 0, groups=1), "source 1 has 4 records and 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_table_2_has_the_printed_ratios_and_original_total():
    rows = VIDEO_PRETRAIN.rows
    for row in rows:
        assert round(100 * row.used / row.original, 1) == row.ratio
    assert round(sum(row.original for row in rows), -6) == VIDEO_PRETRAIN.printed_original
    ratio = 100 * VIDEO_PRETRAIN.printed_used / VIDEO_PRETRAIN.printed_original
    assert round(ratio, 1) == VIDEO_PRETRAIN.printed_ratio


def test_table_2_prints_a_total_that_its_rows_do_not_reach():
    assert VIDEO_PRETRAIN.used == 10_852_800 < VIDEO_PRETRAIN.printed_used == 12_200_000


def test_table_3_has_488k_videos_and_746k_images():
    for modality, total in ((VIDEO, 488_000), (IMAGE, 746_000)):
        assert sum(row.used for row in VIDEO_SFT.rows if row.modality == modality) == total


def test_table_4_adds_up_to_the_printed_total():
    total = sum(mixture.used for mixture in (AUDIO_PRETRAIN, AUDIO_SFT, AV_JOINT))
    assert round(total, -5) == AUDIO_PRINTED_USED
