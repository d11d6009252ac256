"""Show people what was looked at and heard: contact sheet, sketch in the terminal, spectrum."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from vllama2_jax.media.clip import Clip

_GAP, _CAPTION = 4, 14
_QUIET, _MIDDLE, _LOUD = "black", "#b4326a", "#ffe8a0"


def contact_sheet(clip: Clip, side: int = 192, columns: int = 4) -> Image.Image:
    """One picture of a clip's distinct frames in order, each with its time in seconds.

    Args:
      clip: what `load_clip` returned.
      side: pixels of one frame's side.
      columns: frames in a row at most.
    """
    count = len(clip.frames)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = columns * (side + _GAP) + _GAP
    height = rows * (side + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for number, frame in enumerate(clip.frames):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (side + _GAP), _GAP + row * (side + _CAPTION + _GAP)
        sheet.paste(
            Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS), (left, top)
        )
        draw.text((left + 2, top + side + 1), _caption(clip, number), fill=(220, 220, 220))
    return sheet


def sketch(clip: Clip, width: int = 80, most: int = 8) -> str:
    """The frames side by side in 24-bit terminal colours, two pixels to a character cell.

    Args:
      clip: what `load_clip` returned.
      width: character cells of a line.
      most: frames to show at most, evenly picked.
    """
    count = min(len(clip.frames), most)
    chosen = np.unique(np.linspace(0, len(clip.frames) - 1, count).round().astype(int))
    cells = max(6, min(20, (width + 1) // len(chosen) - 1))
    side = cells - cells % 2
    small = [
        np.asarray(Image.fromarray(clip.frames[i]).resize((side, side), Image.Resampling.BOX))
        for i in chosen
    ]
    lines = []
    for y in range(0, side, 2):
        cells_of = (
            "".join(
                "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*frame[y, x], *frame[y + 1, x])
                for x in range(side)
            )
            for frame in small
        )
        lines.append("\x1b[0m ".join(cells_of) + "\x1b[0m")
    lines.append(" ".join(_caption(clip, i).ljust(side)[:side] for i in chosen))
    return "\n".join(lines)


def spectrum(bank: np.ndarray, width: int = 784, height: int = 256) -> Image.Image:
    """A filter bank as a picture: time to the right, pitch upwards, the louder the brighter.

    Args:
      bank: float32 [frames, 128], see `fbank.filter_bank`.
      width, height: of the picture, in pixels.
    """
    quiet, loud = float(bank.min()), float(bank.max())
    levels = (bank.T[::-1] - quiet) * (255 / max(loud - quiet, 1e-6))
    picture = Image.fromarray(levels.astype(np.uint8)).resize((width, height))
    return ImageOps.colorize(picture, _QUIET, _LOUD, mid=_MIDDLE)


def _caption(clip: Clip, number: int) -> str:
    seconds = clip.times[number]
    return f"frame {number + 1}" if math.isnan(seconds) else f"{seconds:.2f} s"
