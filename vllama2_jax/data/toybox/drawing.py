"""How Toybox's scenes are drawn."""

import math

import numpy as np

from vllama2_jax.data.toybox.scenes import Moment, Scene


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw each moment of a scene that is seen: uint8 [MOMENTS, size, size, 3].

    Edges are smoothed over one pixel.
    """
    drawn: dict[Moment, np.ndarray] = {}
    for moment in scene.moments:
        if moment not in drawn:
            drawn[moment] = _draw(moment, size)
    return np.stack([drawn[moment] for moment in scene.moments])


def _draw(moment: Moment, size: int) -> np.ndarray:
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = moment.background
    for thing in moment.things:
        radius = thing.radius * size
        x, y = thing.x * size, thing.y * size
        reach = radius + 2
        left, top = max(int(x - reach), 0), max(int(y - reach), 0)
        right, bottom = min(int(x + reach) + 1, size), min(int(y + reach) + 1, size)
        # Pixel centres relative to the thing's centre.
        dx = np.arange(left, right, dtype=np.float32) + 0.5 - x
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
        cover = np.clip(0.5 - _distance(thing.shape, dx, dy, radius), 0, 1)[..., None]
        region = picture[top:bottom, left:right]
        region += cover * (np.asarray(thing.rgb, np.float32) - region)
    return np.rint(picture).astype(np.uint8)


def _distance(shape: str, x, y, radius: float) -> np.ndarray:
    """Signed distance in pixels to a shape's edge, negative inside (exact near the edge)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        arm = 0.34 * radius
        upright = np.maximum(x - arm, y - radius)
        return np.minimum(upright, np.maximum(x - radius, y - arm))
    if shape == "triangle":
        corners = _corners(3, radius * 1.12, radius * 1.12) + (0, 0.15 * radius)
    else:
        corners = _corners(5, radius * 1.1, radius * 0.45)
    return _polygon(corners, x, y)


def _corners(points: int, outer: float, inner: float) -> np.ndarray:
    """Corners [2 * points, 2] of a regular polygon, or a star if `inner` differs; one on top."""
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    # A polygon's edge midpoints lie at cos(pi / n) of its corners.
    inner = inner * math.cos(math.pi / points) if inner == outer else inner
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _polygon(corners: np.ndarray, x, y) -> np.ndarray:
    """Signed distance to a closed polygon: nearest edge, and the even-odd rule for the sign."""
    nearest, inside = np.inf, np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)
