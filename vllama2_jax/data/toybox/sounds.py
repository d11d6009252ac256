"""What is heard in Toybox: how the sounds of each family come about by lot.

* pitch: one tone, low or high. glide: one tone that rises or falls. beeps: so many short ones.
* noise: one of four, in few or many bursts, each of which keeps its level, swells or fades.
* timing: one beep, at one of three times.

Tones have a voice, one of six registers and three timbres. Where there are only two answers the
voice alone is held out: what a voice answers in training would otherwise be wrong of it later.
"""

import dataclasses

from vllama2_jax.data.toybox.scenes import (
    COUNTS,
    GLIDES,
    MOMENT_SECONDS,
    NOISES,
    PITCHES,
    REGISTERS,
    SECONDS,
    TIMES,
    VOICES,
    Event,
    Scene,
    is_voice_heldout,
)

_LEVEL = (0.15, 0.4)  # range of amplitudes
_BEEP = 0.1  # seconds
_BETWEEN = 0.38  # seconds from one beep to the next
_GLIDE = 2**0.5  # of pitches, from where a glide starts to its middle
# A noise comes in bursts, so many, each so many seconds long (a range), and each with such a level
# at its start and end.
_BURSTS = ((1, (1.2, 1.8)), (1, (0.4, 0.8)), (2, (0.4, 0.7)), (5, (0.15, 0.25)))
_SWELLS = ((1, 1), (0.1, 1), (1, 0.1))
_PAUSE = (0.1, 0.15)  # range of seconds between bursts


def pitch(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    half = len(REGISTERS) // 2
    voice = _voice(rng, split, among=lambda register: register // half == stratum)
    tone = _tone(rng, voice, rng.uniform(0.6, 1.6))
    return Scene("pitch", (), (), PITCHES[stratum], (tone,))


def glide(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    voice = _voice(rng, split)
    tone = _tone(rng, voice, rng.uniform(0.9, 1.6), glide=_GLIDE if stratum == 0 else 1 / _GLIDE)
    return Scene("glide", (), (), GLIDES[stratum], (tone,))


def beeps(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    voice, count = _voice(rng, split, stratum), stratum + 1
    first = _tone(rng, voice, _BEEP)
    start = rng.uniform(0.05, SECONDS - 0.1 - _BEEP - _BETWEEN * stratum)
    events = (_again(first, start + _BETWEEN * i) for i in range(count))
    return Scene("beeps", (), (), COUNTS[stratum], tuple(events))


def noise(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    shapes = [
        (bursts, swell)
        for bursts in range(len(_BURSTS))
        for swell in range(len(_SWELLS))
        if ((bursts + swell + stratum) % 6 == 0) == (split == "heldout")
    ]
    number, swell = shapes[rng.integers(len(shapes))]
    bursts, length = _BURSTS[number]
    seconds, pause, level = (rng.uniform(*range_) for range_ in (length, _PAUSE, _LEVEL))
    whole = bursts * (seconds + pause) - pause
    start = rng.uniform(0.05, SECONDS - 0.05 - whole)
    event = Event(NOISES[stratum], 0, seconds, tuple(level * part for part in _SWELLS[swell]))
    events = tuple(_again(event, start + i * (seconds + pause)) for i in range(bursts))
    return Scene("noise", (), (), NOISES[stratum], events)


def timing(rng, split, stratum) -> Scene:
    """A scene of the family; `stratum` is that of `families.sample_scene`."""
    when = list(TIMES)[stratum]
    return Scene("timing", (), (), when, (beep(rng, _voice(rng, split, stratum), TIMES[when]),))


def beep(rng, voice, moment: int) -> Event:
    """A beep in the middle of a moment, nearly."""
    middle = (moment + 0.5) * MOMENT_SECONDS + rng.uniform(-0.03, 0.03)
    return _again(_tone(rng, voice, _BEEP), middle - _BEEP / 2)


def any_voice(rng) -> tuple[int, str]:
    """A voice, (register, timbre)."""
    return VOICES[rng.integers(len(VOICES))]


def tone_within(rng, voice, first: float, last: float) -> Event:
    """A tone that begins and ends between two times, at most 0.45 s long."""
    seconds = min(0.45, last - first - 0.1)
    spare = last - first - 0.1 - seconds
    return _again(_tone(rng, voice, seconds), first + 0.05 + spare * rng.random())


def _voice(rng, split, fact: int = 0, among=lambda register: True) -> tuple[int, str]:
    voices = [
        voice
        for voice in VOICES
        if among(voice[0]) and is_voice_heldout(voice, fact) == (split == "heldout")
    ]
    return voices[rng.integers(len(voices))]


def _tone(rng, voice, seconds: float, glide: float = 1.0) -> Event:
    """A tone somewhere in the clip, whose middle has the voice's pitch, nearly."""
    register, timbre = voice
    middle = REGISTERS[register] * rng.uniform(0.88, 1.12)
    level = float(rng.uniform(*_LEVEL))
    start = float(rng.uniform(0.05, SECONDS - 0.1 - seconds))
    pitches = (middle / glide, middle * glide)
    return Event("tone", start, float(seconds), (level, level), pitches, timbre)


def _again(event: Event, start: float) -> Event:
    """The same at another time."""
    return dataclasses.replace(event, start=float(start))
