"""Frames as the tower expects them: size, crop, and the NumPy reference of the normalisation."""

import dataclasses
import math

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """A tower's input; plain JSON types, stored in a model card.

    Attributes:
      size: pixels of a side.
      geometry: "shortest_edge_crop" (CLIP: the short side becomes `size`, the middle is cut out) or
        "stretch" (SigLIP: both sides become `size`, the aspect is not kept).
      mean, std: of each channel, on the scale 0 to 1.
    """

    size: int
    geometry: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if self.geometry not in ("shortest_edge_crop", "stretch"):
            raise ValueError(
                f"unknown geometry {self.geometry!r}; known: shortest_edge_crop, stretch"
            )


CLIP_336 = ImageSpec(
    336,
    "shortest_edge_crop",
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
SIGLIP_384 = ImageSpec(384, "stretch", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def to_rgb(image) -> Image.Image:
    """A PIL image of mode RGB from one of any mode, or from uint8 [H, W], [H, W, 3] or [H, W, 4].

    Raises:
      ValueError: for arrays of another type or shape, or an image without pixels.
    """
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in _CHANNELS:
            raise ValueError(
                f"an image is uint8 [H, W, 3], this is {array.dtype} {list(array.shape)}"
            )
        if array.size == 0:
            raise ValueError(f"the image has no pixels: {list(array.shape)}")
        image = Image.fromarray(np.ascontiguousarray(array))
    if min(image.size) < 1:
        raise ValueError("the image has no pixels")
    return image if image.mode == "RGB" else image.convert("RGB")


_CHANNELS = ((), (3,), (4,))


def pad_to_square(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    """The image in the middle of a square of the mean colour, int(255 * mean) per channel."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def working_size(size: tuple[int, int], spec: ImageSpec, square_pad: bool) -> tuple[int, int]:
    """(width, height) of the largest picture made on the way from one of `size` to the tower's.

    A narrow strip grows: CLIP's geometry makes 336x20160000 pixels of 1x60000 before it crops,
    and `square_pad` 60000x60000.
    """
    if square_pad:
        size = (max(size), max(size))
    enlarged = size if spec.geometry == "stretch" else _resized(size, spec)
    return max(size, enlarged, key=math.prod)


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(width, height) whose short side is the tower's, before the crop."""
    width, height = size
    long = int(spec.size * max(size) / min(size))
    return (spec.size, long) if width <= height else (long, spec.size)


def prepare(image, spec: ImageSpec, square_pad: bool) -> np.ndarray:
    """Resize and crop one frame, equal to transformers' PIL image processors bit for bit.

    Args:
      image: PIL image, or uint8 [H, W, 3].
      spec: the tower's input.
      square_pad: pad to a square first.

    Returns:
      uint8 [size, size, 3].
    """
    image, size = to_rgb(image), spec.size
    if square_pad:
        image = pad_to_square(image, spec.mean)
    if spec.geometry == "stretch":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    shape = _resized(image.size, spec)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    pixels = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def normalise(frames: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Scale to 0..1 in float64, then (x - mean) / std in float32, as the PIL processors do.

    Args:
      frames: uint8 [..., 3].
      spec: mean and std.

    Returns:
      float32 [..., 3].
    """
    scaled = (frames.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
