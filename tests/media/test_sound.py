"""What is heard of a file: which channel, which stretch, at which rate."""

import dataclasses
import random
import wave
from fractions import Fraction

import audio_oracle
import ml_dtypes
import numpy as np
import pytest
from rendered import pictures
from scipy import fft
from sounds import noise, tone, write_coded, write_film, write_wav

from vllama2_jax.media import PAPER, REFERENCE, MediaError, SoundSpec, load_sound
from vllama2_jax.media.audio import AudioFile
from vllama2_jax.media.errors import Limits
from vllama2_jax.media.fbank import filter_bank
from vllama2_jax.media.guard import DECODER
from vllama2_jax.media.waveform import piece_bounds

SHORT = SoundSpec(4.0)
EXACT = dataclasses.replace(REFERENCE.sound, bfloat16=False)
REFERENCE_EXACT = dataclasses.replace(REFERENCE, sound=EXACT)


def as_bank(samples, seconds=4.0):
    """The filter bank of samples at 16 kHz, filled with silence."""
    wanted = round(seconds * 16000)
    return filter_bank(np.pad(samples[:wanted], (0, max(0, wanted - len(samples)))))


def same_bank(found, expected):
    """Products of matrices round by the number of threads, of which the decoder has one."""
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def original_wav(path, seed=None):
    """The original's way with a WAV file, written down again from the spec: [2998, 128]."""
    with wave.open(str(path)) as file:
        rate, channels = file.getframerate(), file.getnchannels()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    samples = samples.reshape(-1, channels)[:, 0] / 32768
    whole = 30 * rate
    if len(samples) > whole:
        random.seed(seed)
        first = random.randint(0, len(samples) - whole)
        samples = samples[first : first + whole]
    samples = np.pad(samples, (0, whole - len(samples)))
    if rate != 16000:
        spectrum, count = fft.rfft(samples), 480000
        kept = np.zeros(count // 2 + 1, complex)
        shared = min(len(spectrum), len(kept))
        kept[:shared] = spectrum[:shared]
        if rate > 16000:
            kept[-1] = 2 * kept[-1].real
        elif whole % 2 == 0:
            kept[shared - 1] /= 2
        samples = fft.irfft(kept, count) * count / whole
    return audio_oracle.kaldi_bank(samples)


@pytest.mark.parametrize(
    "rate, channels, seconds",
    [(16000, 1, 3), (44100, 2, 5), (8000, 1, 4), (48000, 1, 31), (22050, 2, 33)],
)
def test_reference_wav_equals_the_originals_steps(tmp_path, rate, channels, seconds):
    path = write_wav(tmp_path / "a.wav", noise(seconds, rate, channels), rate)
    sound = load_sound(path, spec=SoundSpec(), preset=REFERENCE_EXACT, seed=5)
    expected = original_wav(path, seed=5)
    # What the spectrum leaves empty holds rounding errors on both sides, around 1e-12 of the sound.
    heard = expected > expected.max() - 40
    assert np.abs(sound.bank - expected)[heard].max() <= 1e-3
    rounded = load_sound(path, spec=SoundSpec(), preset=REFERENCE, seed=5).bank
    np.testing.assert_array_equal(rounded, sound.bank.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_reference_hears_the_first_channel_and_paper_the_mix(tmp_path):
    left, right = noise(3, 16000, 1, seed=1), noise(3, 16000, 1, seed=2)
    path = write_wav(tmp_path / "s.wav", np.concatenate([left, right]), 16000)
    first = load_sound(path, spec=SHORT, preset=REFERENCE_EXACT)
    same_bank(first.bank, as_bank(left[0] / 32768))
    mixed = load_sound(path, spec=SHORT, preset=PAPER)
    expected = as_bank((left[0].astype(float) + right[0]) / 2 / 32768)
    np.testing.assert_allclose(mixed.bank, expected, atol=0.05)  # rounded to whole steps


def test_resampled_tone_stays_the_tone(tmp_path):
    samples = (tone(440, 3, 44100) * 32767).astype(np.int16)
    path = write_wav(tmp_path / "t.wav", samples[None], 44100)
    file = AudioFile(str(path), Limits())
    heard = file.mixed(0, 3)
    file.close()
    assert len(heard) == 48000
    inside = slice(200, -200)
    np.testing.assert_allclose(heard[inside], tone(440, 3, 16000)[inside], atol=1e-3)


def test_stretch_holds_the_samples_that_the_whole_track_holds_there(tmp_path):
    samples = noise(6, 44100, 2)
    for path in (
        write_wav(tmp_path / "s.wav", samples, 44100),
        write_coded(tmp_path / "s.flac", samples, 44100, "flac", "stereo"),
    ):
        file = AudioFile(str(path), Limits())
        whole, stretch = file.mixed(0, 6), file.mixed(2.5, 4.25)
        np.testing.assert_array_equal(stretch, whole[40000:68000])
        own = file.first_channel(2.5, 4.25)
        np.testing.assert_array_equal(own, samples[0, 110250:187425] / 32768)
        file.close()


@pytest.mark.parametrize(
    "name, codec", [("s.flac", "flac"), ("s.mp3", "libmp3lame"), ("s.m4a", "aac")]
)
def test_coded_sound_is_heard_like_the_same_wav(tmp_path, name, codec):
    samples = (tone(700, 3, 16000) * 32767).astype(np.int16)[None]
    wav = load_sound(write_wav(tmp_path / "s.wav", samples, 16000), spec=SHORT, preset=PAPER)
    path = write_coded(tmp_path / name, samples, 16000, codec)
    coded = load_sound(path, spec=SHORT, preset=PAPER)
    assert abs(coded.seconds - 3) < 0.1
    loud = wav.bank > wav.bank.max() - 5
    assert np.abs(coded.bank - wav.bank)[20:250][loud[20:250]].max() < (
        1e-3 if codec == "flac" else 0.5
    )


def test_start_and_end_choose_the_stretch(tmp_path):
    samples = noise(10, 16000)
    path = write_wav(tmp_path / "s.wav", samples, 16000)
    for preset in (PAPER, REFERENCE_EXACT):
        sound = load_sound(path, spec=SHORT, preset=preset, start=2.5, end=4.0)
        same_bank(sound.bank, as_bank(samples[0, 40000:64000] / 32768))
        assert sound.heard == ((2.5, 4.0),) and sound.seconds == 10.0


def test_paper_hears_the_first_seconds_of_long_sound_and_says_which(tmp_path):
    samples = noise(10, 16000)
    sound = load_sound(write_wav(tmp_path / "s.wav", samples, 16000), spec=SHORT, preset=PAPER)
    same_bank(sound.bank, as_bank(samples[0] / 32768))
    assert sound.heard == ((0.0, 4.0),)


def test_reference_crops_at_random_by_the_seed(tmp_path):
    path = write_wav(tmp_path / "s.wav", noise(10, 16000), 16000)
    starts = set()
    for seed in range(4):
        sound = load_sound(path, spec=SHORT, preset=REFERENCE, seed=seed)
        again = load_sound(path, spec=SHORT, preset=REFERENCE, seed=seed)
        np.testing.assert_array_equal(sound.bank, again.bank)
        ((start, end),) = sound.heard
        assert end - start == pytest.approx(4.0)
        assert start == random.Random(seed).randint(0, 96000) / 16000
        starts.add(start)
    assert len(starts) == 4


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    samples = noise(10, 16000, seed=3)
    path = tmp_path_factory.mktemp("film") / "f.mkv"
    return write_film(path, pictures(50), samples), samples[0] / 32768


def test_reference_hears_eight_pieces_of_two_seconds_of_a_video(film):
    path, samples = film
    sound = load_sound(path, spec=SoundSpec(), preset=REFERENCE_EXACT, joint=True, start=3, end=4)
    # The starts that the original gave for ten seconds at 16 kHz.
    starts = [0, 18285, 36571, 54857, 73142, 91428, 109714, 128000]
    pieces = [samples[start : start + 32000] for start in starts]
    same_bank(sound.bank, as_bank(np.concatenate(pieces), 30.0))
    assert [round(first * 16000) for first, _ in sound.heard] == starts
    np.testing.assert_allclose(sound.bank[1600:], -15.942385, atol=1e-5)


@pytest.mark.parametrize("preset, item", [(REFERENCE, 2), (REFERENCE_EXACT, 4)])
def test_silence_behind_the_sound_stays_out_of_the_pipe(film, monkeypatch, preset, item):
    path, _ = film
    sent, ask = [], DECODER.ask

    def listening(*args, **details):
        result, body = ask(*args, **details)
        sent.append(body)
        return result, body

    monkeypatch.setattr(DECODER, "ask", listening)
    sound = load_sound(path, spec=SoundSpec(), preset=preset, joint=True)
    ((rows, bands),) = [body.shape for body in sent]
    assert rows == 1600 and sent[0].nbytes == rows * bands * item
    assert sound.bank.shape == (2998, 128) and sound.bank.dtype == np.float32


def test_paper_hears_the_part_of_a_video_that_is_seen(film):
    path, samples = film
    sound = load_sound(path, spec=SHORT, preset=PAPER, joint=True, start=3, end=5)
    same_bank(sound.bank, as_bank(samples[48000:80000]))


@pytest.mark.parametrize("count", [1, 16000, 31999, 32000, 32001, 80000, 160001, 16000 * 3600])
def test_pieces_follow_the_exact_fractions(count):
    seconds = Fraction(count, 16000)
    expected = []
    for i in range(8):
        start = max(seconds - 2, Fraction(0)) * i / 7
        expected.append((int(start * 16000), min(int((start + 2) * 16000), count)))
    assert piece_bounds(count, 16000, 8) == expected


def test_missing_track_is_an_error_unless_silence_is_asked_for(tmp_path):
    from rendered import write_gif, write_video

    silent = write_video(tmp_path / "v.mp4", pictures(9))
    gif = write_gif(tmp_path / "g.gif", pictures(3))
    for path, words in ((silent, "has no sound track"), (gif, "has no sound (a GIF)")):
        with pytest.raises(MediaError) as caught:
            load_sound(path, spec=SHORT)
        assert caught.value.cause == words
        for preset, level in ((PAPER, -15.942385), (REFERENCE, -15.9375)):
            sound = load_sound(path, spec=SHORT, preset=preset, joint=True, silence=True)
            assert sound.heard == () and sound.seconds == 0.0
            np.testing.assert_allclose(sound.bank, level, atol=1e-6)


def test_formats_that_state_no_length_are_not_cut_short(tmp_path):
    """A bit rate that rises from silence on makes FFmpeg's guess far too long."""
    samples = np.concatenate([np.zeros((1, 16000 * 4), np.int16), noise(8, 16000)], axis=1)
    for name, codec in (("s.aac", "aac"), ("s.mp3", "libmp3lame")):
        path = write_coded(tmp_path / name, samples, 16000, codec)
        assert load_sound(path, spec=SHORT, preset=PAPER).seconds == pytest.approx(12, abs=0.3)
