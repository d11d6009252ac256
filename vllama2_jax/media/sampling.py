"""Which frames of a video are looked at."""

import math

import numpy as np

from vllama2_jax.media.preset import MediaPreset


def midpoint(total: int, num_frames: int) -> np.ndarray:
    """The middle of each of `num_frames` equal segments of the frames 0 .. total-1.

    The original's `frame_sample`: round((total-1)/n * (i + 1/2) + 1e-6); a video shorter than n
    repeats frames.

    Returns:
      int64 [num_frames], not decreasing.
    """
    segment = (total - 1) / num_frames
    return np.round(segment * (np.arange(num_frames) + 0.5) + 1e-6).astype(np.int64)


def linspace(total: int, num_frames: int) -> np.ndarray:
    """The rule of June 2024: int64 [num_frames], evenly spaced from first to last, truncated."""
    return np.linspace(0, total - 1, num_frames).astype(np.int64)


def every_second(total: int, fps: float) -> np.ndarray:
    """The original's fps mode: one frame per floor(fps) frames, from the middle of the first step.

    A rate below 1 (where the original divides by zero) takes every frame.
    """
    step = max(min(math.floor(fps), total), 1)
    return np.arange(step // 2, total, step)


def clip_range(
    total: int, fps: float, start: float | None, end: float | None, preset: MediaPreset
) -> tuple[int, int]:
    """First and last (inclusive) frame of a clip given in seconds.

    Args:
      total: frames of the file.
      fps: its average rate.
      start, end: seconds; None is the file's own. Where both are given, negative ones count as 0,
        a reversed pair is swapped, and an empty clip becomes one second.
      preset: its `clip_end_minus_one`.

    Raises:
      ValueError: if no frame lies in the clip.
    """
    asked = f"{start if start is not None else 0:g}-{end if end is not None else total / fps:g} s"
    if start is not None and end is not None:
        start, end = sorted((max(start, 0.0), max(end, 0.0)))
        end = start + 1 if start == end else end
    if preset.clip_end_minus_one:
        first = 0 if start is None else max(int(start * fps) - 1, 0)
        last = total - 1 if end is None else min(int(end * fps) - 1, total - 1)
    else:
        # 1e-6: a whole number of frames may come out of the product a rounding error high.
        first = 0 if start is None else max(math.ceil(start * fps - 1e-6), 0)
        last = total - 1
        if end is not None:
            # A clip between two frames shows the one that is on screen at its start.
            last = min(math.ceil(end * fps - 1e-6) - 1, total - 1)
            if last < first and end > 0 and first - 1 < total:
                first = last
    if first > last or last < 0:
        raise ValueError(
            f"no frame lies in the clip {asked}: the file has {total} frames, {total / fps:.2f} s"
        )
    return first, last


def sample(
    total: int,
    fps: float,
    num_frames: int | None,
    preset: MediaPreset,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Frame numbers of a clip.

    Args:
      total: frames of the file.
      fps: its average rate.
      num_frames: how many; None is fps mode, about one a second.
      preset: the rule, and how many are kept.
      start, end: seconds of the clip, see `clip_range`.

    Returns:
      int64 [num_frames], not decreasing; another length in fps mode or after the preset's cut.

    Raises:
      ValueError: if no frame lies in the clip.
    """
    first, last = clip_range(total, fps, start, end, preset)
    length = last - first + 1
    if num_frames is None:
        numbers = every_second(length, fps)
    else:
        numbers = (midpoint if preset.sampling == "midpoint" else linspace)(length, num_frames)
    return first + (numbers[: preset.max_frames] if preset.max_frames else numbers)
