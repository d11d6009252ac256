"""Examples and clips -> the arrays of a batch, in NumPy."""

from collections.abc import Sequence

import numpy as np

from vllama2_jax.media import Clip
from vllama2_jax.text import Supervised

NOTHING = Supervised(
    np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32)
)


def pack_rows(
    rows: Sequence[Sequence[Supervised]], length: int, media_tokens: int
) -> dict[str, np.ndarray]:
    """The text arrays of a `Batch`: each row's examples one after the other.

    Segments count from 1 in the order of the examples (one without tokens keeps its number), and
    positions restart with each. The media of a row take its clip slots from left to right, so that
    `media_index` of the second begins at `media_tokens`.

    Args:
      rows: examples of each row; one without any is padding.
      length: slots of a row.
      media_tokens: slots of a clip.

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
    for i, examples in enumerate(rows):
        needed = sum(len(example.tokens) for example in examples)
        if needed > length:
            raise ValueError(f"examples of {needed} tokens do not fit a row of {length}")
        begin = clips = 0
        for segment, example in enumerate(examples, start=1):
            end = begin + len(example.tokens)
            for name in ("tokens", "targets", "target_weights"):
                out[name][i, begin:end] = getattr(example, name)
            out["positions"][i, begin:end] = np.arange(end - begin)
            out["segment_ids"][i, begin:end] = segment
            is_media = example.media_index >= 0
            offset = clips * media_tokens
            out["media_index"][i, begin:end] = np.where(is_media, example.media_index + offset, -1)
            clips += bool(is_media.any())
            begin = end
    return out


def pack_clips(
    rows: Sequence[Sequence[Clip | None]], max_clips: int, num_frames: int, size: int
) -> dict[str, np.ndarray]:
    """The media arrays of a `Batch`.

    Args:
      rows: the clips of each row's slots; None is one that could not be read.
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
    for i, clips in enumerate(rows):
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
