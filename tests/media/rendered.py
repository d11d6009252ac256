"""Small videos for the tests, rendered on the spot, and their frames by a plain decode."""

import os
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def pictures(count, width=96, height=64, seed=0):
    """uint8 [count, height, width, 3]: moving squares on a texture, no two frames alike."""
    rng = np.random.default_rng(seed)
    still = rng.integers(60, 160, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    frames = np.repeat(still[None].astype(np.int64), count, 0)
    for number in range(count):
        left, top = (number * 3) % (width - 16), (number * 2) % (height - 16)
        frames[number, top : top + 16, left : left + 16] += 90 - number % 7 * 20
        frames[number, :4] = number % 256
    return frames.clip(0, 255).astype(np.uint8)


def write_video(
    path,
    frames,
    codec="libx264",
    rate=30,
    times=None,
    first=0,
    rotation=None,
    sound=False,
    container_options=None,
    **options,
):
    """Encode frames.

    `times` are milliseconds of each, for a variable rate; `first` is the first frame's number.
    """
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    container_options = dict(container_options or {})
    if first < 0:
        container_options["avoid_negative_ts"] = "disabled"
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        unit = Fraction(1, rate if times is None else 1000)
        stream.codec_context.time_base = unit
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + first if times is None else int(times[number])
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return path


def write_sound(path):
    """One second of silence, without a picture track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


def write_gif(path, frames, duration=100):
    """A GIF of these frames, `duration` milliseconds each."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return path


def plain_decode(path):
    """All frames from first to last: [uint8 [H, W, 3], ...]."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
