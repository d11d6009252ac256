"""From a sound track to the filter bank that a tower hears. Runs inside the decoder subprocess."""

import random

import ml_dtypes
import numpy as np

from vllama2_jax.media.audio import AudioFile
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.fbank import SAMPLE_RATE, filter_bank, num_begun, num_frames
from vllama2_jax.media.preset import SoundPreset
from vllama2_jax.media.waveform import fit, piece_bounds, resample


def listen(file: AudioFile, request: dict, limits: Limits) -> tuple[dict, np.ndarray]:
    """What `sound.load_sound` asks for.

    Args:
      file: its track.
      request: "seconds" of the tower's input, "rules" (a `SoundPreset`), "joint", "start", "end"
        and "seed".
      limits: bounds.

    Returns:
      {"heard": stretches of the track in seconds, "seconds": its length} and the filter bank up to
      the last sound, [frames, 128] of float32, or of bfloat16 in uint16 where the rules round.
    """
    rules = SoundPreset(**request["rules"])
    start, end = request["start"], request["end"]
    pieces = rules.joint_pieces if request["joint"] else 0
    if pieces and rules.joint_ignores_times:
        start = end = None
    start, end = _stretch(file, start, end)
    wanted = round(request["seconds"] * SAMPLE_RATE)
    if pieces:
        samples, heard = _pieces(file, start, end, pieces, limits)
    else:
        if end - start > request["seconds"]:
            start = _crop(file, rules, start, end, request["seconds"], request["seed"])
            end = start + request["seconds"]
        heard = [(start, end)]
        if rules.reader == "librosa" and not request["joint"]:
            samples = fit(file.first_channel(start, end), round(request["seconds"] * file.rate))
            samples = resample(samples, file.rate, SAMPLE_RATE)
        else:
            samples = file.mixed(start, end)
    if not len(samples):
        raise MediaError(file.path, "its sound gives no samples", "make the file again")
    # Rows of silence behind the sound are all the same: who asks fills them in.
    bank = filter_bank(samples, min(num_frames(wanted), num_begun(len(samples))))
    if rules.bfloat16:
        bank = bank.astype(ml_dtypes.bfloat16).view(np.uint16)
    return {"heard": heard, "seconds": file.seconds}, bank


def _stretch(file: AudioFile, start: float | None, end: float | None) -> tuple[float, float]:
    """The asked part of the track.

    Negative times are the start, and those the wrong way round are turned, as for frames.
    """
    first, last = max(start or 0.0, 0.0), file.seconds if end is None else max(end, 0.0)
    if first > last:
        first, last = last, first
    last = min(last, file.seconds)
    if first >= last:
        raise MediaError(
            file.path,
            f"its sound ends at {file.seconds:.2f} s, and the part from {first:g} s is asked for",
            "give a start and an end inside the file",
        )
    return first, last


def _crop(file, rules: SoundPreset, start: float, end: float, seconds: float, seed: int) -> float:
    """Where the heard part of a stretch that is too long begins."""
    if not rules.random_crop:
        return start
    # Whole samples, both ends included, by Python's generator: as the original draws it.
    spare = round((end - start) * file.rate) - round(seconds * file.rate)
    return start + random.Random(seed).randint(0, spare) / file.rate


def _pieces(file, start: float, end: float, pieces: int, limits: Limits):
    """Samples of the pieces, one after the other, and where they lie."""
    if end - start > limits.max_sound_seconds:
        raise MediaError(
            file.path,
            f"its {end - start:.0f} s of sound are beyond the limit of "
            f"{limits.max_sound_seconds:g}",
            "cut the file, or raise Limits.max_sound_seconds",
        )
    samples = file.mixed(start, end)
    bounds = piece_bounds(len(samples), SAMPLE_RATE, pieces)
    heard = [(start + first / SAMPLE_RATE, start + last / SAMPLE_RATE) for first, last in bounds]
    return np.concatenate([samples[first:last] for first, last in bounds]), heard
