"""Exact frames of a video file, decoding only the groups of pictures that hold them (PyAV).

Runs inside the decoder subprocess (`decoder.py`).
"""

import dataclasses
from collections.abc import Callable, Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vllama2_jax.media.container import cut_short
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.ffmpeg import DAMAGED, open_file, picture_streams
from vllama2_jax.media.packets import PacketIndex
from vllama2_jax.media.rotation import display_matrix, turn

# A picture may be shown at most so many pictures after its packet (H.264 and HEVC level limits).
_MAX_REORDER = 16
_NO_FRAMES = "holds no frames"


class _Mismatch(Exception):
    """The packet index does not describe what the decoder gives; decode from the start instead."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video holds: frames (as counted from packets), rate, size as shown, and sound."""

    num_frames: int
    fps: float
    width: int
    height: int
    has_audio: bool


class VideoFile:
    """One open video.

    Attributes:
      num_frames: frames that a plain decode gives; counted from the packets, and corrected by
        `read` in the rare case that the decoder gives another number.
      fps: the container's average rate.
    """

    def __init__(self, path: str, limits: Limits):
        """Open the file and list its packets, decoding nothing.

        Raises:
          MediaError: not a video, audio only, no frames, frames beyond the limits, or cut.
        """
        self.path, self._limits = path, limits
        self._container = open_file(self.path, _NO_FRAMES)
        self._stream = self._pick_stream()
        self._check_size(self._stream.codec_context.width, self._stream.codec_context.height)
        self._reformatter = VideoReformatter()
        self._scan()
        self.fps = self._rate()

    def close(self):
        """Close the file."""
        self._container.close()

    def _pick_stream(self):
        streams = picture_streams(self._container)
        if not self._container.streams:
            raise MediaError(self.path, _NO_FRAMES, DAMAGED)  # not even tracks for them
        if not streams:
            sound = bool(self._container.streams.audio)
            raise MediaError(
                self.path,
                "holds sound but no video" if sound else "holds no video",
                "give a file with a picture track, or ask a model that hears",
            )
        for stream in self._container.streams:
            if stream.index != streams[0].index:
                stream.discard = av.stream.Discard.all
        if streams[0].codec_context is None:
            raise MediaError(
                self.path, "its video codec is not known to FFmpeg", "convert it to H.264"
            )
        streams[0].thread_type, streams[0].thread_count = "AUTO", self._limits.max_threads
        return streams[0]

    def _check_size(self, width: int, height: int):
        if width * height > self._limits.max_pixels:
            raise MediaError(
                self.path,
                f"frames of {width}x{height} are beyond the limit of "
                f"{self._limits.max_pixels} pixels",
                "scale the video down, or raise Limits.max_pixels",
            )

    def _scan(self):
        """Read every packet's times and flags; nothing is decoded."""
        self._index = index = PacketIndex()
        try:
            for packet in self._of_stream(self._container.demux):
                if packet.size:
                    index.add(packet)
        except av.FFmpegError:
            index.complete = False
        cut = cut_short(self.path)
        if index.count == 0:
            raise MediaError(self.path, cut or _NO_FRAMES, DAMAGED)
        self._indexed = index.close(self._stream.codec.canonical_name)
        self.num_frames = self._readable = index.count
        self._complete = index.complete
        if "mp4" in self._container.format.name and self._stream.frames:
            # All frames are listed in one place (unless the file is in fragments), so that which
            # ones a missing tail takes along is known exactly.
            promised = sum(not entry.is_discard for entry in self._stream.index_entries)
            self.num_frames = max(index.count, promised)
            self._complete &= index.count >= promised
        elif cut or not index.complete:
            raise MediaError(self.path, cut or "its data are damaged", DAMAGED)
        if not self._complete:
            # The last pictures may lack neighbours that come before them on the screen.
            self._readable = max(index.count - 1 - _MAX_REORDER, 0)

    def _of_stream(self, read: Callable) -> Iterator:
        """Packets or frames of the picture track."""
        try:
            yield from read(self._stream)
        except IndexError:  # PyAV knows only the tracks that were there when it opened the file
            raise MediaError(
                self.path, "a track begins in the middle of it", "convert it to H.264 .mp4"
            ) from None

    def _rate(self) -> float:
        for rate in (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate):
            if rate and rate > 0:
                return float(rate)
        return 25.0

    def read(self, choose: Callable[[int], np.ndarray], take: Callable) -> np.ndarray:
        """Decode chosen frames.

        Args:
          choose: from the number of frames to the wanted numbers; called again in the rare case
            that decoding finds another number of frames than the packets promise.
          take: called once for each distinct wanted frame with its number, its RGB pixels as shown
            (uint8 [H, W, 3]), and its time in seconds from the start of the video (nan if unknown).
            A later call for the same number replaces the earlier one.

        Returns:
          what `choose` returned at last.

        Raises:
          MediaError: frames that are damaged, cut off or beyond the limits.
        """
        wanted = choose(self.num_frames)
        self._check_readable(wanted)
        if self._indexed:
            try:
                self._read_groups(wanted, take)
                return wanted
            except (_Mismatch, av.FFmpegError):
                # Nothing is lost by silence: the decode from the start, below, either gives every
                # wanted frame exactly (and replaces those taken so far) or reports its own error
                # with the frame at which it met it. It only takes longer.
                pass
        total = self._read_all(wanted, take)
        if total == self.num_frames:
            return wanted
        if not self._complete:
            self._check_readable(np.asarray([self.num_frames]))
        self.num_frames = total
        wanted = choose(total)
        self._read_all(wanted, take)
        return wanted

    def _check_readable(self, wanted: np.ndarray):
        if not self._complete and wanted.max() >= self._readable:
            raise MediaError(
                self.path,
                f"is cut short: frame {int(wanted.max())} is needed, and of {self.num_frames} "
                f"frames only {self._readable} can be trusted",
                DAMAGED,
            )

    def _read_groups(self, wanted: np.ndarray, take: Callable):
        """Group by group: seek, decode up to the last wanted picture, go on."""
        for start, numbers in self._index.groups(wanted).items():
            self._read_group(start, numbers, take)

    def _read_group(self, start: int, numbers: dict[int, int], take: Callable):
        context = self._stream.codec_context
        pts, dts = self._index.times(start)
        # Matroska is indexed by presentation times, others by decoding times; an index that leads
        # before the group costs a few packets, one that leads behind it is caught.
        time = pts if "matroska" in self._container.format.name else dts
        self._container.seek(time, stream=self._stream, backward=True)
        # dav1d reads the setting only once, at its start.
        may_skip = self._stream.codec.canonical_name != "av1"
        left = len(numbers)  # packets of wanted pictures still to be fed
        started = False
        for packet in self._of_stream(self._container.demux):
            if packet.size == 0:
                break
            if not started:
                if not packet.is_keyframe or packet.pts < pts:
                    continue
                if packet.pts > pts:
                    raise _Mismatch
                started = True
            needed = packet.pts in numbers
            left -= needed
            if may_skip:
                # Pictures that nothing refers to need not be decoded; the decoder knows which.
                context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in context.decode(packet):
                self._take_wanted(frame, numbers, take)
            if left == 0:
                break
        for frame in context.decode(None):
            self._take_wanted(frame, numbers, take)
        if numbers:
            raise _Mismatch

    def _take_wanted(self, frame, numbers: dict[int, int], take: Callable):
        if frame.pts in numbers:
            self._take(frame, numbers.pop(frame.pts), take)

    def _read_all(self, wanted: np.ndarray, take: Callable) -> int:
        """Decode from the start to the end; returns the number of frames."""
        self._container.close()
        self._container = open_file(self.path, _NO_FRAMES)
        self._stream = self._pick_stream()
        remaining, total = set(wanted.tolist()), 0
        try:
            for frame in self._of_stream(self._container.decode):
                if total in remaining:
                    self._take(frame, total, take)
                total += 1
        except av.FFmpegError as error:
            raise MediaError(
                self.path, f"cannot be decoded at frame {total} ({error.strerror})", DAMAGED
            ) from None
        if total == 0:
            raise MediaError(self.path, "holds no frames that can be decoded", DAMAGED)
        return total

    def _take(self, frame, number: int, take: Callable):
        self._check_size(frame.width, frame.height)
        if frame.is_corrupt:
            raise MediaError(self.path, f"frame {number} is damaged", DAMAGED)
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        seconds = float("nan")
        if frame.pts is not None:
            seconds = float((frame.pts - (self._stream.start_time or 0)) * self._stream.time_base)
        take(number, turn(pixels, display_matrix(frame)), seconds)

    def info(self) -> VideoInfo:
        """Size, length and sound; the size is as shown, so the first frame is decoded.

        Raises:
          MediaError: a file that is cut short, wherever the cut is.
        """
        if not self._complete:
            self._check_readable(np.asarray([self.num_frames]))
        sizes = {}
        self.read(
            lambda total: np.zeros(1, np.int64),
            lambda number, pixels, seconds: sizes.update(shape=pixels.shape),
        )
        height, width = sizes["shape"][:2]
        sound = bool(self._container.streams.audio)
        return VideoInfo(self.num_frames, self.fps, width, height, sound)
