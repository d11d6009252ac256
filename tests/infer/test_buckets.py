"""Buckets hold every length and waste at most a quarter."""

from vllama2_jax.infer.buckets import bucket


def test_a_bucket_holds_its_length_and_wastes_at_most_a_fifth_of_itself():
    for length in range(1, 5000):
        assert bucket(length) >= length
        if length > 64:
            assert bucket(length) - length <= 0.2 * bucket(length)


def test_buckets_are_few_and_stable():
    buckets = {bucket(length) for length in range(1, 4097)}
    assert len(buckets) == 25
    assert all(bucket(size) == size for size in buckets)
