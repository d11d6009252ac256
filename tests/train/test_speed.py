"""Rates are sums over sums of the last steps, without those that compile."""

import pytest

from vllama2_jax.train.speed import Speed


def step(speed, seconds, tokens=100, shape=None):
    return speed.update(
        tokens=tokens, samples=4, seconds=seconds, model_flops=1e9 * tokens, shape=shape
    )


def test_nothing_is_known_until_the_compiling_steps_are_over():
    speed = Speed(skip=2)
    assert [step(speed, 60.0), step(speed, 30.0)] == [{}, {}]
    assert step(speed, 0.5)["tokens_per_second"] == 200


def test_a_slow_step_counts_for_as_long_as_it_lasted():
    speed = Speed(skip=0, peak_flops=1e12)
    step(speed, 1.0)
    assert step(speed, 3.0, tokens=300) == {
        "tokens_per_second": 100.0,  # 400 tokens in 4 s
        "samples_per_second": 2.0,
        "model_flops_per_second": 1e11,
        "utilisation": 0.1,
    }


def test_only_the_last_steps_count():
    speed = Speed(skip=0, window=3)
    for seconds in (100.0, 1.0, 1.0, 2.0):
        rates = step(speed, seconds)
    assert rates["tokens_per_second"] == 75


def test_every_shape_compiles_once_and_the_rates_stay_meanwhile():
    speed = Speed()
    step(speed, 60.0, shape=512)
    before = step(speed, 1.0, shape=512)
    assert step(speed, 60.0, shape=1024) == before
    assert step(speed, 3.0, shape=1024)["tokens_per_second"] == 50


def test_padding_is_told_apart_from_utilisation():
    speed = Speed(skip=0)
    work = dict(samples=1, seconds=1.0, model_flops=1e9)
    speed.update(tokens=30, slots=100, **work)
    assert speed.update(tokens=90, slots=100, **work)["useful_fraction"] == 0.6


@pytest.mark.parametrize("peak", [None, 0.0])
def test_without_a_known_peak_there_is_no_utilisation(peak):
    assert "utilisation" not in step(Speed(skip=0, peak_flops=peak), 1.0)
