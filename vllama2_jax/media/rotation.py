"""Phones store pictures as the sensor sees them, with a matrix that says how to show them."""

import numpy as np


def display_matrix(frame) -> np.ndarray | None:
    """The display matrix of a PyAV frame, int32 [3, 3], or None."""
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(item), "=i4", 9).reshape(3, 3)
    return None


def turn(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Pixels as the display matrix shows them, to the nearest quarter turn, mirrored or not.

    The matrix maps the stored point (x, y) to (a x + c y, b x + d y), with a, b, c, d its upper
    left corner row by row in 16.16 fixed point and y pointing down.

    Args:
      pixels: uint8 [H, W, 3].
      matrix: int32 [3, 3], or None for no change.

    Returns:
      uint8 [H, W, 3] or [W, H, 3].
    """
    if matrix is None:
        return pixels
    a, b, c, d = matrix[:2, :2].astype(np.float64).ravel()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
