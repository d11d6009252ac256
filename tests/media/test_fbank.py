"""The filter bank against torchaudio's."""

import audio_oracle
import numpy as np
import pytest

from vllama2_jax.media.fbank import SILENCE, filter_bank, num_begun, num_frames, num_samples

SECONDS = 30


def _signals():
    rng = np.random.default_rng(0)
    time = np.arange(SECONDS * 16000) / 16000
    return {
        "noise": 0.1 * rng.normal(size=time.size),
        "quiet noise in whole steps": np.round(2 * rng.normal(size=time.size)) / 32768,
        "chirp over noise": 0.3 * np.sin(2 * np.pi * 100 * time**2)
        + 0.001 * rng.normal(size=time.size),
        "noise over an offset": 0.02 + 0.05 * rng.normal(size=time.size),
    }


# torchaudio's own float32 is off by 0.2 beside a chirp 50 dB above the noise, and by 3e-3 with an
# offset.
@pytest.mark.parametrize("name", ["noise", "quiet noise in whole steps"])
def test_filter_bank_equals_torchaudios_in_float32(name):
    samples = _signals()[name].astype(np.float32)
    assert np.abs(filter_bank(samples) - audio_oracle.kaldi_bank(samples)).max() <= 1e-3


@pytest.mark.parametrize("name", _signals())
def test_filter_bank_equals_torchaudios_in_float64(name):
    samples = _signals()[name]
    bank = filter_bank(samples)
    assert bank.shape == (2998, 128) and bank.dtype == np.float32
    assert np.abs(bank - audio_oracle.kaldi_bank(samples)).max() <= 2e-4


def test_bands_beside_a_pure_tone_are_exact_also_for_float32_samples():
    tone = 0.2 + 0.3 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    kept = tone.astype(np.float32)
    exact = audio_oracle.kaldi_bank(kept.astype(np.float64))
    assert np.abs(filter_bank(kept) - exact).max() <= 1e-4


def test_silence_is_the_floor_everywhere():
    np.testing.assert_allclose(filter_bank(np.zeros(16000, np.float32)), -15.942385, atol=1e-5)


@pytest.mark.parametrize("count", [1, 399, 400, 10240, 10241, 16000])
def test_behind_the_samples_stands_silence(count):
    samples = _signals()["noise"][:count].astype(np.float32)
    bank = filter_bank(samples, 250)
    np.testing.assert_array_equal(bank, filter_bank(np.pad(samples, (0, num_samples(250) - count))))
    # Windows that begin behind them are silent to the last bit, whether they share a block or not.
    heard = (bank != SILENCE).any(axis=1)
    assert heard[: num_begun(count)].all() and not heard[num_begun(count) :].any()


def test_numpys_own_buffer_stays_as_it_is():
    before = np.getbufsize()
    filter_bank(np.ones(16000, np.float32))
    assert np.getbufsize() == before


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 16000, 20880, 480000])
def test_only_whole_windows_count(samples):
    bank = filter_bank(np.zeros(samples, np.float32))
    expected = max(0, 1 + (samples - 400) // 160) if samples >= 400 else 0
    assert len(bank) == num_frames(samples) == expected
    if expected:
        assert num_frames(num_samples(expected)) == expected
        assert num_frames(num_samples(expected) - 1) == expected - 1


def test_other_samples_are_refused():
    for samples in (np.zeros((1, 16000), np.float32), np.zeros(16000, np.int16)):
        with pytest.raises(ValueError, match="not float32"):
            filter_bank(samples)
