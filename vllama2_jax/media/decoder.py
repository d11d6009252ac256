"""The decoder subprocess: reads one request after another, so that a bad file can only hurt it.

`python -m vllama2_jax.media.decoder`, started by `guard.py`; ends when its input does, or when its
parent is gone. Requests and replies are those of `wire.py`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback

import numpy as np

from vllama2_jax.media import stills, wire
from vllama2_jax.media.assemble import Reel
from vllama2_jax.media.errors import Limits, MediaError, no_time_in
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import MediaPreset, SoundPreset
from vllama2_jax.media.sampling import sample

_GIF_HEADS = (b"GIF87a", b"GIF89a")
_KINDS = {"folder": "a folder of images", "gif": "a GIF", "image": "an image"}


def kind_of(path: str, limits: Limits) -> str:
    """Folder, gif, image or video (also for sound), by content rather than by name.

    Raises:
      MediaError: for a file that is missing, empty, unreadable, too large or not a file at all.
    """
    try:
        if os.path.isdir(path):
            return "folder"
        if not os.path.exists(path):
            raise MediaError(path, "no such file", "check the path")
        if not os.path.isfile(path):
            raise MediaError(path, "not a regular file", "save the video to a file first")
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise MediaError(
            path, f"cannot be opened ({error.strerror})", "check its permissions"
        ) from None
    if size == 0:
        raise MediaError(path, "the file is empty", "copy or download it once more")
    if size > limits.max_bytes:
        raise MediaError(
            path,
            f"its {size} bytes are beyond the limit of {limits.max_bytes}",
            "cut the file, or raise Limits.max_bytes",
        )
    if head[:6] in _GIF_HEADS:
        return "gif"
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[:2] == b"BM":
        return "image"
    if (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif":
        return "image"
    return "image" if path.lower().endswith(tuple(stills.IMAGE_SUFFIXES)) else "video"


class _Chooser:
    """Frame numbers of the asked clip, with the errors and limits of the file they are for."""

    def __init__(self, request: dict, limits: Limits, preset: MediaPreset):
        self.path, self.preset, self._limits = request["paths"][0], preset, limits
        self._num_frames = request["num_frames"]
        self._start, self._end = request["start"], request["end"]

    def __call__(self, total: int, fps: float) -> np.ndarray:
        try:
            numbers = sample(total, fps, self._num_frames, self.preset, self._start, self._end)
        except ValueError as error:
            raise MediaError(
                self.path, str(error), "give a start and an end inside the file"
            ) from None
        if len(numbers) > self._limits.max_frames:
            raise MediaError(
                self.path,
                f"the clip has {len(numbers)} frames, beyond the limit of "
                f"{self._limits.max_frames}",
                "give num_frames or a shorter clip, or raise Limits.max_frames",
            )
        return numbers


def read_clip(request: dict, limits: Limits) -> tuple[dict, np.ndarray]:
    """Frames of a file or folder, prepared for the tower."""
    path = request["paths"][0]
    reel = _reel(request, limits)
    choose = _Chooser(request, limits, reel.preset)
    kind = kind_of(path, limits)
    target = request["num_frames"]
    if kind == "image":
        if request["start"] is not None or request["end"] is not None:
            raise no_time_in(path)
        reel.add(stills.read_image(path, limits, reel.preset.exif_rotation))
        reel.index = [0] * (target or 1)
    elif kind == "gif":
        _read_gif(path, limits, reel, choose)
    elif kind == "folder":
        _read_folder(path, limits, reel, choose)
    else:
        _read_video(path, limits, reel, choose)
    reel.finish(target)
    result = {"kind": kind, "index": reel.index, "times": _no_nan(reel.times)}
    return result, np.stack(reel.frames)


def _reel(request: dict, limits: Limits) -> Reel:
    sound = SoundPreset(**request["preset"]["sound"])
    preset = MediaPreset(**{**request["preset"], "sound": sound})
    return Reel(ImageSpec(**request["spec"]), preset, limits, request["paths"][0])


@contextlib.contextmanager
def _open_video(path: str, limits: Limits):
    """The open video; what FFmpeg finds wrong where nothing more exact is known, in words."""
    from vllama2_jax.media.ffmpeg import told
    from vllama2_jax.media.video import VideoFile

    with told(path), contextlib.closing(VideoFile(path, limits)) as file:
        yield file


def _read_video(path: str, limits: Limits, reel: Reel, choose: _Chooser):
    places: dict[int, int] = {}

    def take(number, pixels, seconds):
        places[number] = reel.add(pixels, seconds)

    with _open_video(path, limits) as file:
        wanted = file.read(lambda total: choose(total, file.fps), take)
    reel.index = [places[number] for number in wanted.tolist()]


def _read_gif(path: str, limits: Limits, reel: Reel, choose: _Chooser):
    gif = stills.Gif(path, limits)
    try:
        wanted = choose(gif.num_frames, reel.preset.gif_fps or gif.fps)
        places: dict[int, int] = {}

        def take(number, image, seconds):
            places[number] = reel.add(image, seconds)

        gif.read(wanted, take)
    finally:
        gif.close()
    if reel.preset.gif_drops_repeats:
        wanted = np.unique(wanted)
    reel.index = [places[number] for number in wanted.tolist()]


def _read_folder(path: str, limits: Limits, reel: Reel, choose: _Chooser):
    files, fps = stills.list_folder(path), reel.preset.folder_fps
    wanted = choose(len(files), fps)
    places = {}
    for number in np.unique(wanted).tolist():
        kind_of(files[number], limits)
        image = stills.read_image(files[number], limits, reel.preset.exif_rotation)
        places[number] = reel.add(image, number / fps, files[number])
    reel.index = [places[number] for number in wanted.tolist()]


def read_stills(request: dict, limits: Limits) -> tuple[dict, np.ndarray]:
    """A list of image files, each prepared; frame i is path i."""
    reel = _reel(request, limits)
    for path in request["paths"]:
        kind = kind_of(path, limits)
        if kind not in ("image", "gif"):
            raise MediaError(path, f"a {kind}, not an image", "give a list of image files")
        if kind == "gif":
            stills.check_gif(path)
        reel.add(stills.read_image(path, limits, reel.preset.exif_rotation), source=path)
    return {"sizes": reel.sizes}, np.stack(reel.frames)


def read_sound(request: dict, limits: Limits) -> tuple[dict, np.ndarray | None]:
    """The filter bank of a file's sound; None where it has none and that is no error."""
    from vllama2_jax.media.audio import AudioFile
    from vllama2_jax.media.ffmpeg import told
    from vllama2_jax.media.listen import listen

    path = request["paths"][0]
    kind = kind_of(path, limits)
    if kind == "video":
        with told(path), contextlib.closing(AudioFile(path, limits)) as file:
            if file.has_track:
                return listen(file, request, limits)
    if request["silence"]:
        return {"heard": [], "seconds": 0.0}, None
    cause = "has no sound track" if kind == "video" else f"has no sound ({_KINDS[kind]})"
    raise MediaError(path, cause, "give a file with sound, or ask about its pictures alone")


def kind_inside(path: str, limits: Limits) -> str:
    """`kind_of`, with "audio" for sound without pictures and "av" for a video with a track."""
    kind = kind_of(path, limits)
    if kind == "video":
        from vllama2_jax.media.ffmpeg import open_file, picture_streams, told

        with told(path), contextlib.closing(open_file(path, "holds nothing")) as container:
            if container.streams.audio:
                return "av" if picture_streams(container) else "audio"
    return kind


def tell_kind(request: dict, limits: Limits) -> tuple[dict, None]:
    """What a file is."""
    return {"kind": kind_inside(request["paths"][0], limits)}, None


def probe(request: dict, limits: Limits) -> tuple[dict, None]:
    """What a file holds."""
    path = request["paths"][0]
    kind = kind_inside(path, limits)
    kind = "video" if kind == "av" else kind
    info = {"kind": kind, "num_frames": 1, "fps": None, "seconds": None, "has_audio": False}
    if kind == "image":
        info["width"], info["height"] = stills.read_image(path, limits, False).size
    elif kind == "gif":
        gif = stills.Gif(path, limits)
        gif.read(np.zeros(1, np.int64), lambda *_: None)
        info.update(num_frames=gif.num_frames, fps=gif.fps, seconds=gif.num_frames / gif.fps)
        info["width"], info["height"] = gif.size
        gif.close()
    elif kind == "folder":
        files = stills.list_folder(path)
        info["num_frames"] = len(files)
        info["width"], info["height"] = stills.read_image(files[0], limits, False).size
    elif kind == "audio":
        from vllama2_jax.media.audio import AudioFile
        from vllama2_jax.media.ffmpeg import told

        with told(path), contextlib.closing(AudioFile(path, limits)) as file:
            info.update(num_frames=0, width=0, height=0, seconds=file.seconds, has_audio=True)
    else:
        with _open_video(path, limits) as file:
            found = file.info()
        info.update(
            num_frames=found.num_frames,
            fps=found.fps,
            seconds=found.num_frames / found.fps,
            width=found.width,
            height=found.height,
            has_audio=found.has_audio,
        )
    return info, None


_OPERATIONS = {
    "clip": read_clip,
    "stills": read_stills,
    "sound": read_sound,
    "kind": tell_kind,
    "probe": probe,
}


def answer(request: dict) -> tuple[dict, np.ndarray | None]:
    """Header and body of the reply to one request; never raises for what a file can cause."""
    path = "?"
    try:
        path = request["paths"][0]
        limits = Limits(**request["limits"])
        result, body = _OPERATIONS[request["operation"]](request, limits)
        if body is not None:
            result |= {"shape": body.shape, "dtype": body.dtype.name}
        return {"result": result}, body
    except MediaError as error:
        return {"error": [error.path, error.cause, error.remedy]}, None
    except MemoryError:
        cause = "decoding it takes more memory than there is"
        return {"error": [path, cause, "scale it down, or ask for fewer frames"]}, None
    except OSError as error:  # a failing disk, or a file that went away meanwhile
        cause = f"cannot be read ({error.strerror or error})"
        return {"error": [path, cause, "check the path and the disk it lies on"]}, None
    except Exception as error:
        # Damage is told apart where a library meets it, so this is a fault of ours: blaming the
        # file would hide it.
        cause = f"the decoder failed with an internal error ({type(error).__name__}: {error})"
        remedy = "report it as a bug, with its traceback and the file"
        return {"error": [path, cause, remedy], "traceback": traceback.format_exc()}, None


def _no_nan(times: list[float]) -> list[float | None]:
    return [None if time != time else time for time in times]


def _leave_with_parent(parent: int):
    """End this process soon after its parent is gone, even in the middle of a decode."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main():
    """Serve requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever a library prints must not reach the replies.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_leave_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    import av  # noqa: F401  (now, rather than within the deadline of the first request)

    while True:
        prefix = source.read(wire.PREFIX)
        if len(prefix) < wire.PREFIX:
            return
        header, body = answer(wire.read_header(source, prefix))
        view = memoryview(b"") if body is None else memoryview(body).cast("B")
        for part in (memoryview(wire.pack(header, len(view))), view):
            while part:
                part = part[sink.write(part) :]


if __name__ == "__main__":
    main()
