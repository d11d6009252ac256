"""From decoded frames to a clip: black fillers, the cut, and each distinct frame once."""

import dataclasses
import math

import numpy as np
from PIL import Image

from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.image import ImageSpec, prepare, to_rgb, working_size
from vllama2_jax.media.preset import MediaPreset

# Resizing so few towers' inputs is never too much, however low the limit on what is read.
_ALWAYS_ALLOWED = 16


@dataclasses.dataclass
class Reel:
    """Frames of a clip in the making.

    Attributes:
      spec, preset: how they are prepared.
      limits: bounds of what is made on the way.
      source: the file that errors name, or what stands for in-memory media.
      frames: uint8 [size, size, 3] each, distinct.
      times: seconds of each; nan when unknown.
      sizes: (width, height) of each before it was prepared.
      index: which frame each time step uses.
    """

    spec: ImageSpec
    preset: MediaPreset
    limits: Limits
    source: str
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    index: list[int] = dataclasses.field(default_factory=list)

    def add(self, image, seconds: float = float("nan"), source: str | None = None) -> int:
        """Prepare a frame and keep it.

        Args:
          image: PIL image or uint8 array.
          seconds: when it is shown; nan if unknown.
          source: its file, where that is not the reel's.

        Returns:
          its number here.

        Raises:
          MediaError: if preparing it would take a picture beyond the limits.
        """
        image = to_rgb(image)
        self._check_working_size(image.size, source or self.source)
        prepared = prepare(image, self.spec, self.preset.square_pad)
        return self.add_prepared(prepared, image.size, seconds)

    def add_prepared(self, frame: np.ndarray, size: tuple[int, int], seconds: float) -> int:
        """Keep a frame that is prepared already; returns its number here."""
        self.frames.append(frame)
        self.sizes.append(size)
        self.times.append(seconds)
        return len(self.frames) - 1

    def _check_working_size(self, size: tuple[int, int], source: str):
        wide, high = working_size(size, self.spec, self.preset.square_pad)
        allowed = max(self.limits.max_pixels, _ALWAYS_ALLOWED * self.spec.size**2)
        # What was within the limit when it was read stays so: only growth is judged here.
        if wide * high > max(allowed, math.prod(size)):
            raise MediaError(
                source,
                f"its {size[0]}x{size[1]} pixels become {wide}x{high} when resized for the tower, "
                f"beyond the limit of {self.limits.max_pixels}",
                "crop or scale it down, or raise Limits.max_pixels",
            )

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
