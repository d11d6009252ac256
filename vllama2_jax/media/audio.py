"""The sound track of a file, decoded where it is asked for (PyAV).

Runs inside the decoder subprocess (`decoder.py`).
"""

import math
from collections.abc import Iterator

import av
import numpy as np
from av.filter import Graph

from vllama2_jax.media.container import cut_short
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.fbank import SAMPLE_RATE
from vllama2_jax.media.ffmpeg import DAMAGED, open_file, picture_streams

# Decoding begins so much before what is wanted: a packet may lean on some before it.
_LEAD_SECONDS = 1.0
# Packets of so many bytes are kept between looking through them and decoding them.
_MOST_KEPT = 16 << 20
# Samples that are resampled together; the frames of a track are as short as 20 ms.
_BLOCK = 1 << 14
# A header may promise this much more than the packets hold: encoders count their own padding.
_TOLERANCE_SECONDS = 0.5
_NO_SOUND = "holds no sound"
# Formats whose packets follow each other without gaps.
_UNBROKEN = ("aac", "flac", "mp3", "wav")
# Formats that state no length, so that FFmpeg guesses one from the first bit rate; of MP3 only a
# file with one of these marks near its start does.
_GUESSED = ("aac", "amr", "mp3")
_MP3_LENGTHS = (b"Xing", b"Info", b"VBRI")


class AudioFile:
    """The first sound track of an open file.

    Attributes:
      has_track: whether there is one; without, nothing else here may be used.
      seconds: its length, as its packets tell.
      rate: its samples per second.
      channels: how many.
    """

    def __init__(self, path: str, limits: Limits):
        """Open the file and list the track's packets, decoding nothing.

        Raises:
          MediaError: not a file with sound or footage, or one that is cut short.
        """
        self.path, self._limits = path, limits
        self._container = open_file(path, _NO_SOUND, for_sound=True)
        self.has_track = bool(self._container.streams.audio)
        if self.has_track:
            self._stream = self._pick_stream()
            context = self._stream.codec_context
            self.rate, self.channels = context.sample_rate, context.channels
            self._scan()

    def close(self):
        """Close the file."""
        self._container.close()

    def _pick_stream(self):
        stream = self._container.streams.audio[0]
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        if stream.codec_context is None:
            raise MediaError(
                self.path, "its sound codec is not known to FFmpeg", "convert it to AAC or FLAC"
            )
        return stream

    def _scan(self):
        """Read every packet's time; nothing is decoded."""
        base, held, size = self._stream.time_base, 0, 0
        first, end, kept = None, 0, []
        for packet in self._packets():
            if kept is not None:
                kept.append(packet)
                size += packet.size
                if size > _MOST_KEPT:
                    kept = None
            begin = packet.pts
            if begin is None or not packet.size or packet.is_discard:
                continue
            length = packet.duration or 0
            if first is None or begin < first:
                first = begin
            if begin + length > end:
                end = begin + length
            held += length
        self._kept = kept
        cut = cut_short(self.path)
        if first is None and not cut and picture_streams(self._container):
            self.has_track = False  # there is one, without any sound in it
            return
        if first is None or end <= first or not self.rate:
            raise MediaError(self.path, cut or _NO_SOUND, DAMAGED)
        # Samples before the start of the track serve to warm the decoder up and are not given.
        if self._stream.start_time is not None:
            first = max(first, self._stream.start_time)
        self._begin = float(first * base)
        self.seconds = float((end - first) * base)
        promised = float((self._stream.duration or 0) * base) if self._states_length() else 0.0
        if cut or self.seconds < promised - _TOLERANCE_SECONDS:
            cause = (
                f"is cut short: its header speaks of {promised:.1f} s of sound, "
                f"{self.seconds:.1f} s are there"
            )
            raise MediaError(self.path, cut or cause, DAMAGED)
        held = float(held * base)
        # FFmpeg skips what is damaged. Other containers may leave sound out where there is none.
        if self._container.format.name in _UNBROKEN and held < self.seconds - _TOLERANCE_SECONDS:
            cause = f"is damaged: of {self.seconds:.1f} s of sound {held:.1f} s can be read"
            raise MediaError(self.path, cause, DAMAGED)

    def _packets(self) -> Iterator:
        """Packets of the track."""
        try:
            yield from self._container.demux(self._stream)
        except IndexError:  # PyAV knows only the tracks that were there when it opened the file
            raise MediaError(
                self.path, "a track begins in the middle of it", "convert it to H.264 .mp4"
            ) from None

    def _states_length(self) -> bool:
        name = self._container.format.name
        if name != "mp3":
            return name not in _GUESSED
        with open(self.path, "rb") as file:
            head = file.read(1 << 16)
        return any(mark in head for mark in _MP3_LENGTHS)

    def mixed(self, start: float, end: float) -> np.ndarray:
        """All channels mixed, at 16 kHz, as `ffmpeg -ac 1 -ar 16000 -f s16le` gives them.

        Args:
          start, end: seconds from the start of the track.

        Returns:
          float32 [n] in steps of 1 / 32768; shorter than asked where the track ends before.
        """
        parts, begin, mixer = [np.zeros(0, np.int16)], None, None
        for frame in self._frames(start, end):
            if begin is None:
                frame, begin = self._on_grid(frame, self._begin_of(frame))
            if mixer is None or mixer.form != _form(frame):
                parts += mixer.end() if mixer else []
                mixer = _Mixer(_form(frame))
            parts += mixer.add(frame)
        parts += mixer.end() if mixer else []
        samples = np.concatenate(parts)
        return self._between(samples, SAMPLE_RATE, begin, start, end) / np.float32(1 << 15)

    def _on_grid(self, frame: av.AudioFrame, time: float) -> tuple[av.AudioFrame, float]:
        """A frame that begins where a sample at 16 kHz does when counted from the track's start.

        So a stretch holds the very samples that the whole track holds there.
        """
        place, grid = round(time * self.rate), self.rate // math.gcd(self.rate, SAMPLE_RATE)
        late = -place % grid
        if late >= frame.samples:
            return frame, time
        samples = frame.to_ndarray()
        samples = samples[:, late * (1 if frame.format.is_planar else len(frame.layout.channels)) :]
        cut = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), frame.format.name, frame.layout.name
        )
        cut.sample_rate = frame.sample_rate
        return cut, (place + late) / self.rate

    def first_channel(self, start: float, end: float) -> np.ndarray:
        """The first channel at the track's own rate, as `soundfile.read` gives it.

        Args:
          start, end: seconds from the start of the track.

        Returns:
          float64 [n] within [-1, 1]; shorter than asked where the track ends before.
        """
        parts, begin = [np.zeros(0)], None
        for frame in self._frames(start, end):
            begin = self._begin_of(frame) if begin is None else begin
            if frame.sample_rate != self.rate:
                time = begin + sum(map(len, parts)) / self.rate
                raise MediaError(
                    self.path, f"its sound changes its rate at {time:.1f} s", "convert it to FLAC"
                )
            parts.append(_first_of(frame))
        return self._between(np.concatenate(parts), self.rate, begin, start, end)

    def _between(self, samples, rate: int, begin: float | None, start: float, end: float):
        first = max(0, round((start - (begin or 0.0)) * rate))
        return samples[first : first + round((end - start) * rate)]

    def _begin_of(self, frame: av.AudioFrame) -> float:
        """Seconds from the start of the track at which a stretch's first frame begins.

        Later ones are counted on from it: containers round the times of packets.
        """
        return 0.0 if frame.pts is None else float(frame.pts * frame.time_base) - self._begin

    def _frames(self, start: float, end: float) -> Iterator[av.AudioFrame]:
        """Decoded frames that touch a stretch."""
        packets, self._kept = self._kept, None
        if packets is None:  # too many, or decoded before
            self._container.close()
            self._container = open_file(self.path, _NO_SOUND, for_sound=True)
            self._stream = self._pick_stream()
            packets = self._packets()
        base = self._stream.time_base
        # In the packets' own units, so that none of the many has to be turned into seconds.
        first = (start - _LEAD_SECONDS + self._begin) / base
        last = (end + _LEAD_SECONDS + self._begin) / base
        decode = self._stream.codec_context.decode
        for packet in packets:
            time = packet.pts
            if time is not None:
                if time + (packet.duration or 0) < first:
                    continue
                if time > last:
                    break
            try:
                frames = decode(packet)
            except av.FFmpegError as error:
                at = "" if time is None else f" at {float(time * base) - self._begin:.1f} s"
                cause = f"its sound cannot be decoded{at} ({error.strerror})"
                raise MediaError(self.path, cause, DAMAGED) from None
            yield from frames


class _Mixer:
    """FFmpeg's resampler to one channel at 16 kHz, given long blocks, since every call costs."""

    def __init__(self, form: tuple):
        """A mixer of frames of one `_form`; a track may change it, as broadcasts do."""
        self.form = form
        kind, layout, rate = form
        self._graph = Graph()
        self._graph.threads = 1  # it would start others, for which there is nothing to do
        self._source = self._graph.add(
            "abuffer",
            sample_fmt=kind,
            channel_layout=layout,
            sample_rate=str(rate),
            time_base=f"1/{rate}",
        )
        mixed = self._graph.add(
            "aformat", sample_fmts="s16", channel_layouts="mono", sample_rates=str(SAMPLE_RATE)
        )
        self._sink = self._graph.add("abuffersink")
        self._graph.link_nodes(self._source, mixed, self._sink).configure()
        self._waiting = av.AudioFifo()

    def add(self, frame: av.AudioFrame) -> list[np.ndarray]:
        """Take a frame, and give what is ready: int16 [n] each."""
        frame.pts = None  # gaps are closed, as the command does
        self._waiting.write(frame)
        if self._waiting.samples < _BLOCK:
            return []
        self._source.push(self._waiting.read())
        return self._next()

    def end(self) -> list[np.ndarray]:
        """The rest."""
        if self._waiting.samples:
            self._source.push(self._waiting.read())
        self._source.push(None)
        rest = []
        while made := self._next():
            rest += made
        return rest

    def _next(self) -> list[np.ndarray]:
        try:
            return [self._sink.pull().to_ndarray()[0]]
        except (BlockingIOError, EOFError):  # it waits for more, or has given all
            return []


def _form(frame: av.AudioFrame) -> tuple:
    """What a resampler expects of all its frames."""
    return frame.format.name, frame.layout.name, frame.sample_rate


_FULL_SCALE = {"u8": 1 << 7, "s16": 1 << 15, "s32": 1 << 31, "s64": 1 << 63, "flt": 1, "dbl": 1}


def _first_of(frame: av.AudioFrame) -> np.ndarray:
    """float64 [n] of a frame's first channel."""
    samples = frame.to_ndarray()
    samples = samples[0] if frame.format.is_planar else samples[0, :: len(frame.layout.channels)]
    kind = frame.format.name.removesuffix("p")
    offset = 1 << 7 if kind == "u8" else 0
    return (samples.astype(np.float64) - offset) / _FULL_SCALE[kind]
