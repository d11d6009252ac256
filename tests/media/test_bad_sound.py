"""Bad sound is one clear error; odd sound is heard."""

import av
import numpy as np
import pytest
from rendered import pictures
from sounds import noise, tone, write_coded, write_film, write_wav

from vllama2_jax.media import PAPER, REFERENCE, Limits, MediaError, SoundSpec, load_sound
from vllama2_jax.media.fbank import filter_bank

SPEC = SoundSpec(4.0)


def error_of(path, **options):
    with pytest.raises(MediaError) as caught:
        load_sound(path, spec=SPEC, **options)
    error = caught.value
    assert "\n" not in str(error) and str(path) in str(error) and error.remedy in str(error)
    return error.cause


def test_missing_and_empty(tmp_path):
    assert error_of(tmp_path / "nowhere.wav") == "no such file"
    (tmp_path / "e.wav").touch()
    assert error_of(tmp_path / "e.wav") == "the file is empty"


def test_no_sound_at_all(tmp_path):
    (tmp_path / "t.mp3").write_text("Just words.\n" * 400)
    assert "not a video, image or sound" in error_of(tmp_path / "t.mp3")


def test_header_alone(tmp_path):
    assert error_of(write_wav(tmp_path / "h.wav", noise(0, 16000), 16000)) == "holds no sound"


def test_a_track_without_packets_beside_pictures_is_none(tmp_path):
    path = tmp_path / "f.mkv"
    whole = write_film(tmp_path / "whole.mkv", pictures(9), noise(1, 16000))
    with av.open(str(whole)) as film, av.open(str(path), "w") as container:
        tracks = [container.add_stream_from_template(stream) for stream in film.streams]
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = tracks[packet.stream_index]
                container.mux(packet)
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert error_of(path) == "has no sound track"
    sound = load_sound(path, spec=SPEC, joint=True, silence=True)
    assert sound.heard == () and sound.seconds == 0.0


@pytest.mark.parametrize("name, codec", [("s.wav", None), ("s.flac", "flac"), ("s.m4a", "aac")])
def test_truncated(tmp_path, name, codec):
    path, samples = tmp_path / name, noise(5, 16000)
    if codec:
        write_coded(path, samples, 16000, codec)
    else:
        write_wav(path, samples, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cut short" in error_of(path)


def test_damaged_inside(tmp_path):
    path = write_coded(tmp_path / "s.flac", noise(5, 16000), 16000, "flac")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20000] = bytes(20000)
    path.write_bytes(content)
    assert "is damaged" in error_of(path)


def test_a_track_that_begins_in_the_middle_is_told(tmp_path):
    path = write_coded(tmp_path / "s.ts", noise(3, 16000), 16000, "aac")
    data = bytearray(path.read_bytes())
    # Packets of 188 bytes, each with the number of its track: 0x100 with the mark of a new frame.
    starts = [n for n in range(0, len(data), 188) if data[n + 1 : n + 3] == b"\x41\x00"]
    data[starts[-1] + 2] = 0x77
    path.write_bytes(data)
    assert error_of(path) == "a track begins in the middle of it"


def test_part_behind_the_end(tmp_path):
    path = write_wav(tmp_path / "s.wav", noise(2, 16000), 16000)
    assert "ends at 2.00 s" in error_of(path, start=3.0)
    assert "not a time" in error_of(path, start=float("nan"))


@pytest.mark.parametrize("preset", [PAPER, REFERENCE])
def test_eight_channels_are_heard(tmp_path, preset):
    samples = noise(2, 16000, 8)
    bank = load_sound(write_wav(tmp_path / "8.wav", samples, 16000), spec=SPEC, preset=preset).bank
    if preset is REFERENCE:
        first = filter_bank(np.pad(samples[0] / 32768, (0, 32000)))
        np.testing.assert_allclose(bank, first, atol=0.0626)  # as bfloat16
    assert bank[:100].mean() > 5


def test_a_track_that_turns_from_mono_to_stereo_is_heard_on_both_sides(tmp_path):
    low, high = (tone(hertz, 2, 48000) for hertz in (400, 2000))
    parts = {"mono": low[None], "stereo": np.stack([0 * high, high])}
    coded = [
        write_coded(
            tmp_path / f"{layout}.mp2", np.int16(32767 * samples), 48000, "mp2", layout
        ).read_bytes()
        for layout, samples in parts.items()
    ]
    path = tmp_path / "both.mp2"
    path.write_bytes(b"".join(coded))
    bank = load_sound(path, spec=SPEC, preset=PAPER).bank
    for frames, hertz in ((bank[20:180], 400), (bank[220:380], 2000)):
        assert set(frames.argmax(axis=1)) == {filter_bank(tone(hertz, 1, 16000))[50].argmax()}


def test_a_track_that_changes_its_rate_is_mixed_or_refused(tmp_path):
    parts = [
        write_coded(
            tmp_path / f"{rate}.mp2", np.int16(32767 * tone(400, 2, rate))[None], rate, "mp2"
        ).read_bytes()
        for rate in (48000, 32000)
    ]
    path = tmp_path / "both.mp2"
    path.write_bytes(b"".join(parts))
    bank = load_sound(path, spec=SPEC, preset=PAPER).bank
    wanted = filter_bank(tone(400, 1, 16000))[50].argmax()
    assert set(bank[20:180].argmax(axis=1)) == set(bank[220:380].argmax(axis=1)) == {wanted}
    assert "changes its rate at 2.0 s" in error_of(path, preset=REFERENCE)


@pytest.mark.parametrize("preset", [PAPER, REFERENCE])
def test_192_khz_is_heard(tmp_path, preset):
    high = (tone(1000, 2, 192000) * 32767).astype(np.int16)[None]
    low = (tone(1000, 2, 16000) * 32767).astype(np.int16)[None]
    banks = [
        load_sound(write_wav(tmp_path / f"{rate}.wav", x, rate), spec=SPEC, preset=preset).bank
        for rate, x in ((192000, high), (16000, low))
    ]
    loud = banks[1] > banks[1].max() - 5
    inside = np.zeros_like(loud)
    inside[5:190] = True
    assert np.abs(banks[0] - banks[1])[loud & inside].max() < 0.1


@pytest.mark.parametrize("preset", [PAPER, REFERENCE])
def test_ten_milliseconds_are_heard_with_silence_behind(tmp_path, preset):
    path = write_wav(tmp_path / "10ms.wav", noise(0.01, 16000), 16000)
    sound = load_sound(path, spec=SPEC, preset=preset)
    assert sound.heard == ((0.0, 0.01),)
    assert sound.bank[0].mean() > 5
    np.testing.assert_allclose(sound.bank[2:], -15.942385, atol=0.06)


def test_three_hours(tmp_path):
    one = noise(60, 8000)
    path = write_wav(tmp_path / "3h.wav", np.tile(one, 180), 8000)
    late = load_sound(path, spec=SPEC, preset=PAPER, start=3 * 3600 - 60, end=3 * 3600)
    assert late.heard == ((10740.0, 10744.0),) and late.seconds == 10800.0
    early = load_sound(path, spec=SPEC, preset=PAPER, start=60)
    np.testing.assert_array_equal(late.bank, early.bank)  # the same minute, over and over
    pieces = load_sound(path, spec=SoundSpec(), preset=REFERENCE, joint=True)
    assert pieces.heard[-1] == (10798.0, 10800.0)
    short = Limits(max_sound_seconds=3600)
    cause = error_of(path, preset=REFERENCE, joint=True, limits=short)
    assert cause == "its 10800 s of sound are beyond the limit of 3600"
