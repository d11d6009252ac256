"""From decoded frames to a clip: black fillers, the cut, and each distinct frame once."""

import dataclasses

import numpy as np
from PIL import Image

from vllama2_jax.media.image import ImageSpec, prepare, to_rgb
from vllama2_jax.media.preset import MediaPreset


@dataclasses.dataclass
class Reel:
    """Frames of a clip in the making.

    Attributes:
      spec, preset: how they are prepared.
      frames: uint8 [size, size, 3] each, distinct.
      times: seconds of each; nan when unknown.
      sizes: (width, height) of each before it was prepared.
      index: which frame each time step uses.
    """

    spec: ImageSpec
    preset: MediaPreset
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    index: list[int] = dataclasses.field(default_factory=list)

    def add(self, image, seconds: float = float("nan")) -> int:
        """Prepare a frame (PIL image or uint8 array) and keep it; returns its number here."""
        image = to_rgb(image)
        prepared = prepare(image, self.spec, self.preset.square_pad)
        return self.add_prepared(prepared, image.size, seconds)

    def add_prepared(self, frame: np.ndarray, size: tuple[int, int], seconds: float) -> int:
        """Keep a frame that is prepared already; returns its number here."""
        self.frames.append(frame)
        self.sizes.append(size)
        self.times.append(seconds)
        return len(self.frames) - 1

    def finish(self, num_frames: int | None):
        """Fill up with black frames to `num_frames` steps, and cut as the preset says."""
        if self.preset.max_frames:
            # Cut before filling: fillers behind the cut would be prepared for nothing.
            num_frames = min(num_frames or len(self.index), self.preset.max_frames)
            del self.index[self.preset.max_frames :]
        black: dict[tuple[int, int], int] = {}
        size = self.sizes[self.index[-1]]
        while num_frames is not None and len(self.index) < num_frames:
            if self.preset.black_frames_transposed:
                size = size[::-1]
            # Without a border in the mean colour, black of any size is the same frame.
            key = size if self.preset.square_pad else (1, 1)
            if key not in black:
                black[key] = self.add(Image.new("RGB", key))
            self.index.append(black[key])
        self._drop_unused()

    def _drop_unused(self):
        used = sorted(set(self.index))
        place = {number: i for i, number in enumerate(used)}
        self.index = [place[number] for number in self.index]
        for values in (self.frames, self.times, self.sizes):
            values[:] = [values[number] for number in used]
