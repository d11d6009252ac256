"""Small sound files for the tests, rendered on the spot."""

import wave

import av
import numpy as np


def tone(frequency, seconds, rate, level=0.3):
    """float64 [n] sine."""
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def noise(seconds, rate, channels=1, seed=0):
    """int16 [channels, n], no two alike."""
    size = (channels, round(seconds * rate))
    return np.random.default_rng(seed).integers(-20000, 20000, size, dtype=np.int16)


def write_wav(path, samples, rate):
    """A WAV file of int16 [channels, n], by Python's own library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
    return path


def write_coded(path, samples, rate, codec, layout="mono"):
    """A file of int16 [channels, n] in another codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(stream.format, layout, rate, stream.frame_size or 1024)
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


def write_film(path, pictures, samples, rate=16000, fps=25):
    """A film of uint8 [T, H, W, 3] with a track of int16 [channels, n], kept as it is."""
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)
        resampler = av.AudioResampler("s16", layout, rate, 4096)
        frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(audio.encode(part))
        container.mux(audio.encode())
    return path
