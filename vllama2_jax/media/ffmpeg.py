"""Opening a file with FFmpeg (PyAV), and saying in words why it cannot be opened."""

import contextlib
import functools

import av

from vllama2_jax.media.container import cut_short, is_known
from vllama2_jax.media.errors import MediaError

DAMAGED = "make the file again or copy it once more"
# What FFmpeg may open: containers of footage and of sound, from the file itself. Left to guess, it
# also follows playlists and draws text files as video.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,ivf,m4v,dv,nut,"
    "wav,mp3,flac,aac,aiff,amr,w64,wv"
)


def open_file(path: str, nothing: str, for_sound: bool = False):
    """The open container.

    Args:
      path: the file.
      nothing: what a file lacks whose container is whole and empty, "holds no frames" or the like.
      for_sound: only its sound is to be decoded. FFmpeg then needs no look at its first pictures,
        which takes most of the time.

    Raises:
      MediaError: for what is no video or sound, or is cut short.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    if for_sound:
        options["codec_whitelist"] = _sound_codecs()
    try:
        return av.open(path, metadata_errors="replace", options=options)
    except (av.FFmpegError, ValueError) as error:
        raise _cannot_open(path, nothing, error) from None


@functools.cache
def _sound_codecs() -> str:
    """Names of all decoders of sound."""
    names = []
    for name in sorted(av.codecs_available):
        with contextlib.suppress(ValueError):  # it only encodes
            if av.Codec(name, "r").type == "audio":
                names.append(name)
    return ",".join(names)


def _cannot_open(path: str, nothing: str, error) -> MediaError:
    cause = cut_short(path)
    if cause:
        return MediaError(path, cause, DAMAGED)
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, av.error.EOFError):
        if is_known(path):
            # Whole, but FFmpeg met its end while it looked for the first picture or sound.
            return MediaError(path, nothing, DAMAGED)
        reason = "it ends before any footage"
    return MediaError(
        path,
        f"not a video, image or sound that can be read ({reason})",
        "give an .mp4, .webm, .mkv, .avi, .mov, .gif, .wav, .flac, .mp3, .m4a or image file",
    )


def picture_streams(container) -> list:
    """Picture tracks of an open container; the cover of an album is none."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


@contextlib.contextmanager
def told(path: str):
    """What FFmpeg finds wrong inside, where nothing more exact is known, as a `MediaError`."""
    try:
        yield
    except MemoryError:  # PyAV's is an FFmpegError, too; it is no fault of the file
        raise
    except av.FFmpegError as error:
        raise MediaError(
            path, f"cannot be decoded ({error.strerror})", "make the file again or convert it"
        ) from None
