"""How Toybox's scenes sound."""

import numpy as np

from vllama2_jax.data.toybox.scenes import SECONDS, TIMBRES, Event

SAMPLE_RATE = 16_000
NUM_SAMPLES = round(SECONDS * SAMPLE_RATE)
# Amplitudes of a tone's harmonics, 1 and up.
_HARMONICS = dict(
    zip(TIMBRES, ((1,), (1, 0, 1 / 3, 0, 1 / 5), (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5)), strict=True)
)
_HIGHEST = 7000.0  # Hz; harmonics above are left out
_FADE = 0.01  # seconds in which events come and go
_BACKGROUND = (0.0005, 0.003)  # range of the level of what is always heard
_BUZZ = (85.0, 115.0)  # Hz
_CRACKS = 40.0  # a second


def synthesise(events: tuple[Event, ...], rng: np.random.Generator) -> np.ndarray:
    """The sound of a clip, float32 [NUM_SAMPLES] within [-1, 1] at `SAMPLE_RATE`.

    Args:
      events: what is heard; without any, a background that can hardly be.
      rng: of the noise in it.
    """
    sound = rng.uniform(*_BACKGROUND) * rng.standard_normal(NUM_SAMPLES)
    for event in events:
        begin, count = round(event.start * SAMPLE_RATE), round(event.seconds * SAMPLE_RATE)
        made = _tone(event, count) if event.kind == "tone" else _NOISES[event.kind](rng, count)
        along = np.arange(count)
        ends = np.minimum(along, count - 1 - along) / (_FADE * SAMPLE_RATE)
        level = np.linspace(*event.levels, count) * np.minimum(ends, 1)
        sound[begin : begin + count] += level * made
    return np.clip(sound, -1, 1).astype(np.float32)


def _tone(event: Event, count: int) -> np.ndarray:
    """Its pitch moves evenly in octaves from start to end."""
    first, last = event.pitches
    phase = 2 * np.pi / SAMPLE_RATE * np.cumsum(np.geomspace(first, last, count))
    weights = _HARMONICS[event.timbre]
    heard = [
        (n, weight)
        for n, weight in enumerate(weights, start=1)
        if weight and n * max(event.pitches) < _HIGHEST
    ]
    return sum(weight * np.sin(n * phase) for n, weight in heard) / sum(w for _, w in heard)


def _coloured(rng, count: int, gain) -> np.ndarray:
    """Noise whose spectrum has the shape of `gain`, a function of Hz; 1/3 is its deviation."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    made = np.fft.irfft(spectrum * gain(np.fft.rfftfreq(count, 1 / SAMPLE_RATE)), count)
    return made / (3 * made.std())


def _hiss(rng, count: int) -> np.ndarray:
    return _coloured(rng, count, lambda hz: (hz > 2500).astype(float))


def _rumble(rng, count: int) -> np.ndarray:
    return _coloured(rng, count, lambda hz: 1 / (1 + (hz / 120) ** 2))


def _crackle(rng, count: int) -> np.ndarray:
    """Clicks at times of their own, each a few milliseconds long."""
    clicks = (rng.random(count) < _CRACKS / SAMPLE_RATE) * rng.uniform(-1, 1, count)
    decay = np.exp(-np.arange(48) / 12)
    return np.convolve(clicks, decay)[:count]


def _buzz(rng, count: int) -> np.ndarray:
    """A saw tooth."""
    turns = np.arange(count) * rng.uniform(*_BUZZ) / SAMPLE_RATE
    return 1.6 * (turns % 1 - 0.5)


_NOISES = {"hiss": _hiss, "rumble": _rumble, "crackle": _crackle, "buzz": _buzz}
