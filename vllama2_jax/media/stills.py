"""Image files, GIFs and folders of images (Pillow). Runs inside the decoder subprocess."""

import os
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vllama2_jax.media.container import count_gif_frames, cut_short
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.image import to_rgb

IMAGE_SUFFIXES = (
    ".jpg .jpeg .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .tga"
).split()
_AGAIN = "make the file again or copy it once more"
# What Pillow's readers raise on damaged data; caught around calls into Pillow only, so that the
# same classes out of our own code are not blamed on a file.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)
# `Limits.max_pixels` decides, before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def open_image(path: str, limits: Limits) -> Image.Image:
    """Open an image file and check its size; its pixels are not decoded yet."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        cause = cut_short(path)
        if cause:
            raise MediaError(path, cause, _AGAIN) from None
        raise MediaError(
            path, "not an image that can be read", "give a JPEG, PNG, WebP or GIF file"
        ) from None
    except _DAMAGE as error:
        cause = cut_short(path) or f"cannot be read ({error})"
        raise MediaError(path, cause, _AGAIN) from None
    try:
        _check_size(path, image.size, limits)
    except MediaError:
        image.close()
        raise
    return image


def _check_size(path: str, size: tuple[int, int], limits: Limits):
    if size[0] * size[1] > limits.max_pixels:
        raise MediaError(
            path,
            f"its {size[0]}x{size[1]} pixels are beyond the limit of {limits.max_pixels}",
            "scale it down, or raise Limits.max_pixels",
        )


def read_image(path: str, limits: Limits, exif_rotation: bool) -> Image.Image:
    """The image as RGB.

    Args:
      path: the file.
      limits: bounds.
      exif_rotation: turn it as its EXIF orientation says.
    """
    with open_image(path, limits) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image.load()
            if exif_rotation:
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
        except _DAMAGE as error:
            raise MediaError(path, f"cannot be decoded ({error})", _AGAIN) from None


def list_folder(path: str) -> list[str]:
    """The image files of a folder in plain order of their names.

    Raises:
      MediaError: if there are none.
    """
    names = sorted(os.listdir(path))
    files = [os.path.join(path, n) for n in names if n.lower().endswith(tuple(IMAGE_SUFFIXES))]
    if not files:
        raise MediaError(
            path,
            "the folder is empty" if not names else "the folder holds no image files",
            "give a folder with one image file per frame",
        )
    return files


def check_gif(path: str):
    """Raise a `MediaError` for a GIF that is cut short or has no frames: Pillow tells neither."""
    count = count_gif_frames(path)
    if count is None:
        raise MediaError(path, "is cut short: the end mark of a GIF is missing", _AGAIN)
    if count == 0:
        raise MediaError(path, "holds no frames", _AGAIN)


class Gif:
    """An open GIF.

    Attributes:
      num_frames: frames in the file.
      seconds: float64 [num_frames], when each is shown.
      fps: its average rate (25 where the file gives no durations).
    """

    def __init__(self, path: str, limits: Limits):
        """Open the file and walk through its frames' headers."""
        self.path = path
        check_gif(path)
        self._image = open_image(path, limits)
        durations = []
        try:
            self.num_frames = self._image.n_frames
            for number in range(self.num_frames):
                self._image.seek(number)
                _check_size(path, self._image.size, limits)  # a frame may enlarge the picture
                durations.append(self._image.info.get("duration", 0) / 1000)
        except MediaError:
            raise
        except _DAMAGE as error:
            raise MediaError(path, f"cannot be decoded ({error})", _AGAIN) from None
        self.seconds = np.concatenate([[0.0], np.cumsum(durations)[:-1]])
        total = sum(durations)
        self.fps = self.num_frames / total if total > 0 else 25.0
        self.size = self._image.size

    def close(self):
        """Close the file."""
        self._image.close()

    def read(self, wanted: np.ndarray, take: Callable):
        """Decode frames; `take(number, RGB image, seconds)` is called for each distinct one."""
        for number in np.unique(wanted).tolist():
            try:
                self._image.seek(number)
                # Through RGBA: frames of a palette may refer to a transparent colour.
                image = self._image.convert("RGBA").convert("RGB")
            except _DAMAGE as error:
                raise MediaError(
                    self.path, f"cannot be decoded at frame {number} ({error})", _AGAIN
                ) from None
            take(number, image, float(self.seconds[number]))
