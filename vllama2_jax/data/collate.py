"""Examples and clips -> the arrays of a batch, in NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllama2_jax.media import NUM_BINS, Clip
from vllama2_jax.text import Supervised

NOTHING = Supervised(
    np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32)
)


class Part(NamedTuple):
    """What a record gives to its row.

    Attributes:
      example: its ids.
      seen, heard: whether slots of the example are for a clip, and for a sound behind it.
      clip: None where it could not be read.
      bank: of the sound, float32 [frames, 128]; None where it could not be read.
    """

    example: Supervised
    seen: bool = False
    heard: bool = False
    clip: Clip | None = None
    bank: np.ndarray | None = None


def pack_rows(
    rows: Sequence[Sequence[Part]],
    length: int,
    max_clips: int,
    media_tokens: int,
    sound_tokens: int = 0,
) -> dict[str, np.ndarray]:
    """The text arrays of a `Batch`: each row's examples one after the other.

    Segments count from 1 in the order of the examples (one without tokens keeps its number), and
    positions restart with each. The media of a row take its slots for clips and for sounds from
    left to right. `media_index` counts the tokens of all slots for clips, then those for sounds.

    Args:
      rows: of each row what its records give; one without any is padding.
      length: slots of a row.
      max_clips: of a row.
      media_tokens: slots of a clip.
      sound_tokens: slots of a sound.

    Returns:
      "tokens", "positions", "segment_ids", "media_index" and "targets", int32 [B, length], and
      "target_weights", float32 [B, length].

    Raises:
      ValueError: if the examples of a row do not fit it.
    """
    shape = (len(rows), length)
    names = ("tokens", "positions", "segment_ids", "targets")
    out = {name: np.zeros(shape, np.int32) for name in names}
    out["media_index"] = np.full(shape, -1, np.int32)
    out["target_weights"] = np.zeros(shape, np.float32)
    for i, parts in enumerate(rows):
        needed = sum(len(part.example.tokens) for part in parts)
        if needed > length:
            raise ValueError(f"examples of {needed} tokens do not fit a row of {length}")
        begin = clips = sounds = 0
        for segment, (example, seen, heard, *_) in enumerate(parts, start=1):
            end = begin + len(example.tokens)
            for name in ("tokens", "targets", "target_weights"):
                out[name][i, begin:end] = getattr(example, name)
            out["positions"][i, begin:end] = np.arange(end - begin)
            out["segment_ids"][i, begin:end] = segment
            # The example counts its own: a clip's tokens, then those of a sound.
            index, of_clip = example.media_index, seen * media_tokens
            of_sound = max_clips * media_tokens + sounds * sound_tokens - of_clip
            offset = np.where(index < of_clip, clips * media_tokens, of_sound)
            out["media_index"][i, begin:end] = np.where(index >= 0, index + offset, -1)
            clips, sounds, begin = clips + seen, sounds + heard, end
    return out


def pack_clips(
    rows: Sequence[Sequence[Part]], max_clips: int, num_frames: int, size: int
) -> dict[str, np.ndarray]:
    """The arrays of a `Batch` that hold pictures.

    Args:
      rows: of each row what its records give.
      max_clips: clip slots of a row (K).
      num_frames: time steps of a clip (T).
      size: pixels of a frame's side (S).

    Returns:
      "frames" uint8 [B, K * T, S, S, 3], each distinct frame once in its slot's share;
      "clip_frames" int32 [B, K, T]; "clip_mask" bool [B, K].

    Raises:
      ValueError: if a row has more clips than slots.
    """
    frames = np.zeros((len(rows), max_clips * num_frames, size, size, 3), np.uint8)
    clip_frames = np.zeros((len(rows), max_clips, num_frames), np.int32)
    clip_mask = np.zeros((len(rows), max_clips), bool)
    for i, parts in enumerate(rows):
        clips = [part.clip for part in parts if part.seen]
        if len(clips) > max_clips:
            raise ValueError(f"a row has {len(clips)} clips and {max_clips} slots for them")
        for slot, clip in enumerate(clips):
            if clip is None:
                continue
            begin = slot * num_frames
            frames[i, begin : begin + len(clip.frames)] = clip.frames
            clip_frames[i, slot] = begin + clip.frame_index
            clip_mask[i, slot] = True
    return {"frames": frames, "clip_frames": clip_frames, "clip_mask": clip_mask}


def pack_sounds(
    rows: Sequence[Sequence[Part]], max_sounds: int, num_frames: int
) -> dict[str, np.ndarray]:
    """The arrays of a `Batch` that hold sound.

    Args:
      rows: of each row what its records give.
      max_sounds: slots of a row for sounds (A).
      num_frames: of a filter bank.

    Returns:
      "audio" float32 [B, A, num_frames, 128] and "audio_mask" bool [B, A].

    Raises:
      ValueError: if a row has more sounds than slots.
    """
    audio = np.zeros((len(rows), max_sounds, num_frames, NUM_BINS), np.float32)
    audio_mask = np.zeros((len(rows), max_sounds), bool)
    for i, parts in enumerate(rows):
        banks = [part.bank for part in parts if part.heard]
        if len(banks) > max_sounds:
            raise ValueError(f"a row has {len(banks)} sounds and {max_sounds} slots for them")
        for slot, bank in enumerate(banks):
            if bank is not None:
                audio[i, slot], audio_mask[i, slot] = bank, True
    return {"audio": audio, "audio_mask": audio_mask}
