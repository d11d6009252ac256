"""Any media as the frames that a tower looks at: `load_clip`."""

import dataclasses
import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vllama2_jax.media.assemble import Reel
from vllama2_jax.media.errors import Limits, MediaError, no_time_in
from vllama2_jax.media.guard import DECODER
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import REFERENCE, MediaPreset
from vllama2_jax.media.times import seconds_of


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a tower looks at.

    Attributes:
      frames: uint8 [F, size, size, 3], each distinct frame once.
      frame_index: int32 [T], which frame each time step uses.
      times: float64 [F], seconds from the start of the file; nan where unknown.
      source: the path, or what stands for in-memory media.
      is_image: whether the media are one still image.
    """

    frames: np.ndarray
    frame_index: np.ndarray
    times: np.ndarray
    source: str
    is_image: bool = False


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file holds.

    Attributes:
      kind: "video", "gif", "image", "folder" or "audio".
      num_frames: frames that decode to pictures, as the packets tell; 0 for audio.
      fps: average rate; None for images, folders and audio.
      seconds: length; None for images and folders.
      width, height: pixels as shown (of a folder's first image).
      has_audio: whether there is a sound track.
    """

    kind: str
    num_frames: int
    fps: float | None
    seconds: float | None
    width: int
    height: int
    has_audio: bool


def load_clip(
    media,
    *,
    spec: ImageSpec,
    num_frames: int | None,
    preset: MediaPreset = REFERENCE,
    start: float | None = None,
    end: float | None = None,
    limits: Limits | None = None,
) -> Clip:
    """Read media and prepare their frames for a tower.

    Args:
      media: path of a video, GIF, image or folder of frames; an image (PIL, or uint8 [H, W, 3]);
        or frames (uint8 [T, H, W, 3], or a list of images, arrays or image paths), which are used
        as given, without sampling.
      spec: the tower's input.
      num_frames: time steps of the clip; None is fps mode for files (about one frame a second) and
        as many as there are for frames. An image is repeated.
      preset: the numeric quirks.
      start, end: seconds, of files with a time axis only.
      limits: bounds of the read.

    Returns:
      the clip; T is `num_frames`, but for fps mode, more frames given, and the preset's cut.

    Raises:
      MediaError: naming the file, what is wrong and what to do.
    """
    limits = limits or Limits()
    num_frames = _count(num_frames)
    is_path = isinstance(media, str | os.PathLike)
    is_image = isinstance(media, Image.Image) or (
        isinstance(media, np.ndarray) and media.ndim in (2, 3)
    )
    source = os.fspath(media) if is_path else "image" if is_image else "frames"
    start, end = seconds_of("start", start, source), seconds_of("end", end, source)
    if is_path:
        return _from_file(source, spec, num_frames, preset, start, end, limits)
    if start is not None or end is not None:
        raise no_time_in(source)
    reel = Reel(spec, preset, limits, source)
    try:
        if is_image:
            reel.add(_within(media, limits, source))
            reel.index = [0] * (num_frames or 1)
        else:
            _add_frames(reel, media, limits)
    except MediaError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise MediaError(
            source, str(error), "give a path, a PIL image, or uint8 [H, W, 3] or [T, H, W, 3]"
        ) from None
    reel.finish(num_frames)
    return Clip(
        np.stack(reel.frames),
        np.asarray(reel.index, np.int32),
        np.asarray(reel.times, np.float64),
        source,
        is_image,
    )


def probe(path: str | Path, limits: Limits | None = None) -> MediaInfo:
    """Look into a file or folder without reading it whole; decodes its first frame.

    Raises:
      MediaError: naming the file, what is wrong and what to do.
    """
    result, _ = DECODER.ask("probe", [os.fspath(path)], limits or Limits())
    return MediaInfo(**result)


def media_kind(path: str | Path, limits: Limits | None = None) -> str:
    """ "video", "av" (with a sound track), "gif", "image", "folder" or "audio", by content.

    Nothing is decoded.

    Raises:
      MediaError: naming the file, what is wrong and what to do.
    """
    result, _ = DECODER.ask("kind", [os.fspath(path)], limits or Limits())
    return result["kind"]


def _count(num_frames) -> int | None:
    """A whole number as Python's own, whichever library it is of."""
    if num_frames is None:
        return None
    try:
        count = operator.index(num_frames)
    except TypeError:
        raise ValueError(f"num_frames is {num_frames!r}; it is a whole number, or None") from None
    if count < 1:
        raise ValueError(f"num_frames is {count}; a clip has at least one frame")
    return count


def _from_file(path, spec, num_frames, preset, start, end, limits) -> Clip:
    result, frames = DECODER.ask(
        "clip",
        [path],
        limits,
        spec=dataclasses.asdict(spec),
        preset=dataclasses.asdict(preset),
        num_frames=num_frames,
        start=start,
        end=end,
    )
    times = [np.nan if seconds is None else seconds for seconds in result["times"]]
    return Clip(
        frames,
        np.asarray(result["index"], np.int32),
        np.asarray(times, np.float64),
        path,
        result["kind"] == "image",
    )


def _add_frames(reel: Reel, media: Sequence, limits: Limits):
    """Frames in memory, or image paths, which go through the guard; the same one counts once."""
    if not isinstance(media, Sequence | np.ndarray) or len(media) == 0:
        raise MediaError("frames", f"no frames in {type(media).__name__}", "give at least one")
    if len(media) > limits.max_frames:
        raise MediaError(
            "frames",
            f"{len(media)} frames are beyond the limit of {limits.max_frames}",
            "give fewer, or raise Limits.max_frames",
        )
    if reel.preset.max_frames:
        media = media[: reel.preset.max_frames]
    paths = {os.fspath(item): None for item in media if isinstance(item, str | os.PathLike)}
    places: dict = {}
    if paths:
        result, frames = DECODER.ask(
            "stills",
            list(paths),
            limits,
            spec=dataclasses.asdict(reel.spec),
            preset=dataclasses.asdict(reel.preset),
        )
        for path, frame, size in zip(paths, frames, result["sizes"], strict=True):
            places[path] = reel.add_prepared(frame, tuple(size), float("nan"))
    for item in media:
        is_path = isinstance(item, str | os.PathLike)
        key = os.fspath(item) if is_path else id(item)
        # Rows of one array are views that come and go, so their ids say nothing.
        if key not in places or isinstance(media, np.ndarray):
            places[key] = reel.add(_within(item, limits, "frames"))
        reel.index.append(places[key])


def _within(image, limits: Limits, source: str):
    size = image.size if isinstance(image, Image.Image) else np.shape(image)[1::-1]
    if len(size) == 2 and size[0] * size[1] > limits.max_pixels:
        raise MediaError(
            source,
            f"{size[0]}x{size[1]} pixels are beyond the limit of {limits.max_pixels}",
            "scale it down, or raise Limits.max_pixels",
        )
    return image
