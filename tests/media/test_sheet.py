"""Pictures of what was looked at and heard."""

import numpy as np

from vllama2_jax.media.fbank import filter_bank
from vllama2_jax.media.sheet import spectrum


def _bank(hertz, seconds=1.0):
    time = np.arange(round(16_000 * seconds)) / 16_000
    return filter_bank((0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32))


def test_spectrum_shows_time_to_the_right_and_pitch_upwards():
    bank = np.concatenate([_bank(300), _bank(3000)])
    brightness = np.asarray(spectrum(bank, width=200, height=128).convert("L"), float)
    assert brightness.shape == (128, 200)
    low, high = (brightness[:, part].mean(1).argmax() for part in (slice(0, 90), slice(110, 200)))
    assert low > 90 and high < 60  # rows are counted from the top


def test_spectrum_of_silence_is_one_colour():
    picture = np.asarray(spectrum(filter_bank(np.zeros(8000, np.float32))))
    assert (picture == picture[0, 0]).all()
