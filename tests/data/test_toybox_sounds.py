"""Toybox's sounds: what is heard is what is answered, and neither half tells the whole."""

import collections
import wave

import numpy as np
import pytest
from scipy import signal

from vllama2_jax.data.toybox.families import FAMILIES_OF, sample_scene
from vllama2_jax.data.toybox.files import write_scene
from vllama2_jax.data.toybox.scenes import COUNTS, TIMES
from vllama2_jax.data.toybox.synthesis import NUM_SAMPLES, SAMPLE_RATE, synthesise
from vllama2_jax.media import PAPER, SoundSpec, load_sound
from vllama2_jax.media.fbank import filter_bank

SCENES = 30


def _scenes(family, split="train"):
    rng = np.random.default_rng(5)
    for _ in range(SCENES):
        scene = sample_scene(rng, split, family)
        yield scene, synthesise(scene.events, rng)


def _loudness(samples):
    """Root mean square of every 10 ms."""
    return np.sqrt((samples.reshape(-1, 160) ** 2).mean(1))


def _bursts(samples):
    """Stretches [start, end) in units of 10 ms that are much louder than the background."""
    loud = _loudness(samples) > 0.02
    edges = np.flatnonzero(np.diff(np.r_[False, loud, False].astype(int)))
    return edges.reshape(-1, 2)


def _pitch(samples):
    """Hz of the strongest part of the spectrum's lowest partial."""
    hz, power = signal.periodogram(samples, SAMPLE_RATE)
    return hz[np.argmax(power > 0.2 * power.max())]


@pytest.mark.parametrize("family", FAMILIES_OF["audio"] + FAMILIES_OF["av"])
def test_sound_fills_the_clip_and_is_never_cut(family):
    for scene, samples in _scenes(family):
        assert samples.shape == (NUM_SAMPLES,) and samples.dtype == np.float32
        assert 0.02 < np.abs(samples).max() < 1
        assert all(0 <= e.start and e.start + e.seconds < 2 for e in scene.events)


def test_pitch_is_low_or_high():
    for scene, samples in _scenes("pitch"):
        assert (_pitch(samples) > 700) == (scene.fact == "high")


def test_glide_rises_or_falls_by_an_octave():
    for scene, samples in _scenes("glide"):
        (start, end) = _bursts(samples)[0]
        third = (end - start) * 160 // 3
        early = _pitch(samples[start * 160 :][:third])
        late = _pitch(samples[: end * 160][-third:])
        assert (late > early) == (scene.fact == "rising")
        assert 1.3 < max(late / early, early / late) < 2


def test_beeps_are_as_many_as_the_answer():
    for scene, samples in _scenes("beeps"):
        assert len(_bursts(samples)) == COUNTS.index(scene.fact) + 1


def test_noises_differ_in_their_spectra():
    for scene, samples in _scenes("noise"):
        hz, power = signal.welch(samples, SAMPLE_RATE)
        centre = (hz * power).sum() / power.sum()
        peak = np.abs(samples).max() / samples.std()
        found = "hiss" if centre > 3000 else "rumble" if centre < 250 and peak > 3.2 else None
        if found or scene.fact in ("hiss", "rumble"):
            assert found == scene.fact
        elif scene.fact == "crackle":
            assert peak > 6
        else:  # a saw tooth: its spectrum is a comb
            assert peak < 6


@pytest.mark.parametrize("family", ["timing", "sync"])
def test_beep_is_heard_in_its_moment(family):
    for scene, samples in _scenes(family):
        ((start, end),) = _bursts(samples)
        moment = int((start + end) / 2 / 25)
        assert moment in TIMES.values()
        if family == "timing":
            assert moment == TIMES[scene.fact]
        else:
            lowest = int(np.argmax([m.things[0].y for m in scene.moments]))
            assert (lowest == moment) == (scene.fact == "yes")


def test_thing_that_sounds_is_there_all_the_while():
    for scene, samples in _scenes("sounding"):
        ((start, end),) = _bursts(samples)
        shown = {scene.moments[i // 25].things[0].name for i in range(start, end)}
        assert shown == {scene.fact}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_neither_pictures_nor_sound_alone_tell_whether_they_coincide(split):
    rng, seen = np.random.default_rng(0), collections.Counter()
    shown = collections.defaultdict(list)
    for stratum in range(6000):
        scene = sample_scene(rng, split, "sync", stratum)
        lowest = int(np.argmax([m.things[0].y for m in scene.moments]))
        beep = int((scene.events[0].start + 0.075) / 0.25)
        seen.update([("bounce", lowest, scene.fact), ("beep", beep, scene.fact)])
        shown[scene.things[0].name, lowest].append(scene.fact == "yes")
    assert len(seen) == 2 * 3 * 2 and set(seen.values()) == {1000}
    # Nor does the thing, with when it bounces.
    for answers in shown.values():
        assert abs(np.mean(answers) - 0.5) < 4 * 0.5 / len(answers) ** 0.5


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_voice_does_not_tell_which_way_a_tone_glides(split):
    rng, heard = np.random.default_rng(0), collections.defaultdict(list)
    for stratum in range(2000):
        (event,) = sample_scene(rng, split, "glide", stratum).events
        octaves = np.log2(np.sqrt(np.prod(event.pitches)) / 250)
        rises = event.pitches[1] > event.pitches[0]
        heard[round(octaves / 0.6), event.timbre].append(rises)
    assert len(heard) == {"train": 15, "heldout": 3}[split]
    for answers in heard.values():
        assert abs(np.mean(answers) - 0.5) < 4 * 0.5 / len(answers) ** 0.5


def test_either_thing_of_a_pair_sounds_as_often():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "heldout", "sounding", stratum) for stratum in range(720)]
    assert sum(scene.fact == scene.things[0].name for scene in scenes) == 360


def test_written_files_sound_as_they_were_made(tmp_path):
    """AAC keeps the time of a sound to a hundredth, and 16 bits all of it."""
    for family in ("beeps", "sync"):
        scene = sample_scene(np.random.default_rng(1), "train", family)
        media = write_scene(tmp_path, family, scene, np.random.default_rng(2))
        samples = synthesise(scene.events, np.random.default_rng(2))
        path = tmp_path / media.source
        heard = load_sound(path, spec=SoundSpec(2.0), preset=PAPER, joint=media.seen)
        assert heard.heard == ((0.0, 2.0),)
        error = np.abs(heard.bank - filter_bank(samples))
        assert error.mean() < (0.5 if media.seen else 0.01)
    with wave.open(str(tmp_path / "sounds/beeps.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 32000)
