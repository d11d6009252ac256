"""What can be wrong with a file, and how much of one is read at most."""

import dataclasses


class MediaError(ValueError):
    """Media that cannot be read as asked.

    Attributes:
      path: the file, or what stands for in-memory media.
      cause: what is wrong with it.
      remedy: what to do about it.
    """

    def __init__(self, path: str, cause: str, remedy: str):
        # All three are `args`, so that the error survives a pickle between processes.
        super().__init__(str(path), cause, remedy)
        self.path, self.cause, self.remedy = str(path), cause, remedy

    def __str__(self) -> str:
        text = f"{self.path}: {self.cause}; {self.remedy}"
        return " ".join(text.split())


def no_time_in(source: str) -> MediaError:
    """The error of start or end with media that know no time, on disk as in memory."""
    return MediaError(
        source,
        "start and end are for videos, GIFs and folders, not for images or frames in memory",
        "leave them out",
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one read; beyond each, a `MediaError` says which and how to raise it.

    Attributes:
      max_bytes: size of a file (8 GiB: several hours of 1080p).
      max_pixels: width times height of one frame (64 million: an 8K frame has 33), as it is read
        and on the way to the tower's size, which makes a narrow strip grow.
      max_frames: distinct frames that one clip may hold (a guard of memory in fps mode, where the
        preset itself does not cut).
      max_sound_seconds: length of a sound track that is read as a whole (four hours: 460 MB of
        samples); stretches of longer ones can be asked for.
      max_seconds: wall-clock seconds of one read; the decoder is killed when they are over.
      max_threads: threads of FFmpeg; 0 is one per core. Side by side, as in the workers of a
        training run, decoders with one thread each read more than decoders with many.
    """

    max_bytes: int = 8 << 30
    max_pixels: int = 64_000_000
    max_frames: int = 1024
    max_sound_seconds: float = 14_400.0
    max_seconds: float = 120.0
    max_threads: int = 0
