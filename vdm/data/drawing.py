"""How mini-something looks: objects, hands and cloth as shaded polygons, a soft shadow, and the room behind them.

Everything that moves is an `Art`: polygons in its own coordinates (x right, y down), each with a shade that scales
the paint. Scaling RGB keeps hue and saturation, so that shading never leaves the HSV ranges of `vdm.vocabulary`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SHIFT = 4  # fractional bits of the coordinates that cv2 draws with
RGB = tuple[float, float, float]
Part = tuple[np.ndarray, float, int]  # polygon (N,2), shade in (0,1], paint: 0 = own colour, 1 = second colour


def hsv(hue: float, saturation: float, value: float) -> RGB:
    """RGB in 0-255 from OpenCV's HSV units (hue 0-179, the others 0-255)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 180 / 180, saturation / 255, value / 255)
    return red * 255, green * 255, blue * 255


# ---- polygons ----


def polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> np.ndarray:
    angle = np.radians(np.linspace(start, stop, 25))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def capsule(x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
    """A thick line with round ends."""
    turn = np.degrees(np.arctan2(y1 - y0, x1 - x0))
    front = ellipse(x1, y1, radius, radius, turn - 90, turn + 90)
    back = ellipse(x0, y0, radius, radius, turn + 90, turn + 270)
    return np.concatenate([front[::3], back[::3]])


def strips(outline: np.ndarray, cuts: Sequence[float], shades: Sequence[float]) -> list[Part]:
    """The outline of a round body, painted once for each shade with its left side moved in to `cut` (0-1)."""
    parts: list[Part] = []
    for cut, shade in zip(cuts, shades, strict=True):
        squeezed = outline.copy()
        right = outline[:, 0].max()
        squeezed[:, 0] = right - (right - outline[:, 0]) * (1 - cut)
        parts.append((squeezed, shade, 0))
    return parts


@dataclass(frozen=True)
class Art:
    """Polygons packed into one array, so that a frame transforms them all at once."""

    points: np.ndarray  # (sum of N, 2)
    ends: tuple[int, ...]
    shades: tuple[float, ...]
    paints: tuple[int, ...]

    @staticmethod
    def of(*parts: Part) -> Art:
        points, shades, paints = zip(*parts, strict=True)
        ends = tuple(int(end) for end in np.cumsum([len(p) for p in points]))
        return Art(np.concatenate(points), ends, tuple(shades), tuple(paints))


# ---- objects: each fills the box [-0.5, 0.5] x [-0.5, 0.5], lit from the left ----


def _ball() -> Art:
    steps = np.linspace(0, 1, 7)
    return Art.of(*((ellipse(-0.13 * s, -0.15 * s, 0.5 - 0.36 * s, 0.5 - 0.36 * s), 0.6 + 0.4 * s, 0) for s in steps))


def _box() -> Art:
    return Art.of(
        (rectangle(-0.5, -0.24, 0.27, 0.5), 0.82, 0),
        (rectangle(-0.2, -0.24, -0.02, 0.5), 0.7, 0),
        (polygon((-0.5, -0.24), (-0.27, -0.5), (0.5, -0.5), (0.27, -0.24)), 1.0, 0),
        (polygon((-0.2, -0.24), (0.03, -0.5), (0.21, -0.5), (-0.02, -0.24)), 0.86, 0),
        (polygon((0.27, -0.24), (0.5, -0.5), (0.5, 0.24), (0.27, 0.5)), 0.56, 0),
    )


def _cup() -> Art:
    handle = np.concatenate([ellipse(0.24, 0.0, 0.26, 0.27, -90, 90), ellipse(0.24, 0.0, 0.13, 0.15, 90, -90)])
    side = np.concatenate([polygon((-0.5, -0.4)), ellipse(-0.12, 0.4, 0.27, 0.1, 180, 0), polygon((0.26, -0.4))])
    return Art.of(
        (handle, 0.62, 0),
        *strips(side, (0, 0.1, 0.28, 0.6), (0.8, 1.0, 0.84, 0.66)),
        (ellipse(-0.12, -0.4, 0.38, 0.1), 1.0, 0),
        (ellipse(-0.12, -0.385, 0.31, 0.07), 0.45, 0),
    )


def _bottle() -> Art:
    side = np.concatenate(
        [
            polygon((-0.22, -0.42), (-0.22, -0.27)),
            ellipse(-0.25, -0.03, 0.25, 0.14, 250, 180),
            ellipse(0, 0.45, 0.5, 0.05, 180, 0),
            ellipse(0.25, -0.03, 0.25, 0.14, 0, -70),
            polygon((0.22, -0.27), (0.22, -0.42)),
        ]
    )
    return Art.of(
        *strips(side, (0, 0.14, 0.32, 0.62), (0.78, 1.0, 0.82, 0.64)),
        (rectangle(-0.5, 0.12, 0.5, 0.32), 0.55, 0),
        (rectangle(-0.29, -0.5, 0.29, -0.37), 0.48, 0),
    )


def _book() -> Art:
    return Art.of(
        (polygon((0.34, 0.02), (0.5, -0.4), (0.5, 0.02), (0.34, 0.44)), 0.8, 1),
        (rectangle(-0.5, 0.0, 0.34, 0.44), 1.0, 1),
        (rectangle(-0.46, 0.2, 0.34, 0.25), 0.82, 1),
        (rectangle(-0.5, 0.36, 0.34, 0.5), 0.6, 0),
        (rectangle(-0.5, -0.06, -0.38, 0.5), 0.66, 0),
        (rectangle(-0.5, -0.08, 0.34, 0.06), 0.72, 0),
        (polygon((-0.5, -0.08), (-0.32, -0.5), (0.5, -0.5), (0.34, -0.08)), 1.0, 0),
        (polygon((-0.2, -0.22), (-0.12, -0.38), (0.26, -0.38), (0.2, -0.22)), 0.78, 0),
    )


def _cloth() -> Art:
    wave = np.linspace(0.5, -0.5, 25)
    hem = np.stack([wave, 0.48 + 0.02 * np.cos(wave * 44)], axis=1)
    left, right = polygon((-0.47, 0.2), (-0.43, -0.15)), polygon((0.43, -0.15), (0.47, 0.2))
    outline = np.concatenate([left, ellipse(0, -0.3, 0.4, 0.2, 190, 350), right, hem])
    folds = [polygon((0.55 * x, -0.2), (x + 0.035, 0.46), (x - 0.035, 0.46)) for x in (-0.36, -0.14, 0.09, 0.3)]
    return Art.of(
        (outline, 0.78, 0),
        (outline * (0.95, 0.97), 1.0, 0),
        *((fold, 0.84, 0) for fold in folds),
        (polygon((0.38, -0.3), (0.47, 0.46), (0.38, 0.46)), 0.88, 0),
    )


SHAPE_ART = {"ball": _ball(), "box": _box(), "cup": _cup(), "bottle": _bottle(), "book": _book(), "cloth": _cloth()}


# ---- hands: +x points at the object, contact at the origin, the thumb on the -y side, one unit = one hand ----


def _fingers(*segments: tuple[float, float, float, float]) -> list[Part]:
    parts: list[Part] = []
    for x0, y0, x1, y1 in segments:
        parts += [(capsule(x0, y0, x1, y1, 0.1), 0.7, 0), (capsule(x0, y0, x1, y1, 0.078), 1.0, 0)]
    return parts


FOREARM: tuple[Part, ...] = (
    (polygon((-9, -0.36), (-0.55, -0.22), (-0.55, 0.22), (-9, 0.36)), 0.9, 0),
    (polygon((-9, 0.12), (-0.55, 0.08), (-0.55, 0.22), (-9, 0.36)), 0.76, 0),
    (polygon((-9, -0.46), (-1.3, -0.33), (-1.3, 0.33), (-9, 0.46)), 1.0, 1),
    (polygon((-9, 0.16), (-1.3, 0.12), (-1.3, 0.33), (-9, 0.46)), 0.8, 1),
)
PALM: tuple[Part, ...] = (
    (capsule(-0.48, 0, -0.24, 0, 0.3), 0.74, 0),
    (capsule(-0.48, -0.01, -0.25, -0.01, 0.27), 0.94, 0),
)
EMPTY = Art(np.zeros((0, 2)), (), (), ())

# pose -> (drawn behind the object, drawn over it)
HAND_ART: dict[str, tuple[Art, Art]] = {
    "push": (
        EMPTY,
        Art.of(
            *FOREARM,
            *PALM,
            *_fingers((-0.3, 0.2, -0.13, 0.19), (-0.3, 0.07, -0.08, 0.07)),
            *_fingers((-0.3, -0.06, -0.06, -0.06), (-0.3, -0.19, -0.1, -0.19)),
            *_fingers((-0.5, -0.22, -0.24, -0.37)),
        ),
    ),
    "grip": (
        Art.of(*FOREARM, *PALM, *_fingers((-0.4, -0.2, 0.1, -0.36))),
        Art.of(
            *_fingers((-0.28, 0.21, 0.09, 0.23), (-0.28, 0.07, 0.16, 0.08)),
            *_fingers((-0.28, -0.07, 0.18, -0.06), (-0.28, -0.2, 0.12, -0.2)),
        ),
    ),
    # The palm lies under the object, so the forearm leaves to the side; the thumb is on the arm's side.
    "carry": (
        Art.of(
            (polygon((-0.06, -0.42), (-0.34, -0.36), (-2.9, -9), (-2.2, -9)), 0.9, 0),
            (polygon((-0.26, -0.38), (-0.34, -0.36), (-2.9, -9), (-2.7, -9)), 0.76, 0),
            (polygon((-0.16, -1.3), (-0.66, -1.3), (-3.2, -9), (-2.0, -9)), 1.0, 1),
            (capsule(-0.16, -0.34, -0.16, 0.3, 0.2), 0.74, 0),
            (capsule(-0.14, -0.34, -0.14, 0.3, 0.17), 0.94, 0),
        ),
        Art.of(*_fingers((-0.14, 0.32, 0.12, 0.5), (-0.16, 0.2, 0.02, 0.34), (-0.14, -0.34, 0.1, -0.52))),
    ),
}


# ---- painting ----


@dataclass(frozen=True)
class Canvas:
    """A frame under the brush, and beside it the label of what each pixel belongs to (None when nobody asks)."""

    pixels: np.ndarray  # uint8 (H,W,3)
    labels: np.ndarray | None  # uint8 (H,W)

    def paint(
        self, art: Art, *, at: np.ndarray, size: np.ndarray, degrees: float, paints: Sequence[RGB], label: int
    ) -> None:
        """Draw `art` scaled to `size` pixels (negative: mirrored), turned clockwise, with its origin on pixel `at`.

        Second-colour parts (pages, sleeves) get the label 255, so that a mask holds the thing's own colour only.
        """
        if not art.ends:
            return
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        points = (art.points * size) @ np.array([[cos, sin], [-sin, cos]]) + at - 0.5
        fixed = np.rint(points * (1 << SHIFT)).astype(np.int32)
        start = 0
        for end, shade, paint in zip(art.ends, art.shades, art.paints, strict=True):
            outline, rgb = [fixed[start:end]], paints[paint]
            colour = (rgb[0] * shade, rgb[1] * shade, rgb[2] * shade)
            cv2.fillPoly(self.pixels, outline, colour, cv2.LINE_AA, SHIFT)
            if self.labels is not None:
                cv2.fillPoly(self.labels, outline, 255 if paint else label, cv2.LINE_8, SHIFT)
            start = end

    def shade(self, *, at: np.ndarray, size: np.ndarray, strength: float) -> None:
        """Darken a soft ellipse (a Gaussian of `size` pixels, cut off at 2.5 of them)."""
        height, width = self.pixels.shape[:2]
        left, right = np.clip((at[0] - 2.5 * size[0], at[0] + 2.5 * size[0] + 1), 0, width).astype(int)
        top, bottom = np.clip((at[1] - 2.5 * size[1], at[1] + 2.5 * size[1] + 1), 0, height).astype(int)
        if left >= right or top >= bottom:
            return
        gauss_x = np.exp(-0.5 * ((np.arange(left, right) - at[0]) / size[0]) ** 2)
        gauss_y = np.exp(-0.5 * ((np.arange(top, bottom) - at[1]) / size[1]) ** 2)
        light = 1 - strength * np.outer(gauss_y, gauss_x)
        patch = self.pixels[top:bottom, left:right]
        patch[:] = patch * light[..., None]


@dataclass(frozen=True)
class Stage:
    """The room: a wall, a table whose far edge is the horizon, and the light. Lengths in fractions of the frame."""

    wall: RGB
    table: RGB
    floor: RGB
    horizon: float
    front: float  # where the table top ends at the bottom; beyond 1 it fills the frame
    end: float | None  # x where the table stops (the floor is seen beyond), or None
    end_side: int  # +1: it stops at its right, -1: at its left
    light: float  # brightness of everything
    lamp: tuple[float, float]  # the brightest point
    falloff: float
    stripes: int  # vertical stripes on the wall, 0 for plain
    skirting: bool
    grain_seed: int


def _fill(pixels: np.ndarray, points: np.ndarray, rgb: RGB, shade: float = 1.0) -> None:
    height, width = pixels.shape[:2]
    fixed = np.rint((points * (width, height) - 0.5) * (1 << SHIFT)).astype(np.int32)
    cv2.fillPoly(pixels, [fixed], tuple(c * shade for c in rgb), cv2.LINE_AA, SHIFT)


def draw_stage(stage: Stage, *, height: int, width: int) -> np.ndarray:
    """The empty room, uint8 (height, width, 3)."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = stage.wall
    horizon, front = stage.horizon, stage.front
    for stripe in range(stage.stripes):
        left = (stripe + 0.25) / stage.stripes
        _fill(pixels, rectangle(left, 0, left + 0.5 / stage.stripes, horizon), stage.wall, 0.93)
    if stage.end is not None:
        _fill(pixels, rectangle(-0.1, horizon + 0.07, 1.1, horizon + 0.1), stage.floor, 0.7)
        _fill(pixels, rectangle(-0.1, horizon + 0.1, 1.1, 1.2), stage.floor)
    left = stage.end if stage.end is not None and stage.end_side < 0 else -0.1
    right = stage.end if stage.end is not None and stage.end_side > 0 else 1.1
    far_left, far_right = left + 0.06 * (left > 0), right - 0.06 * (right < 1)  # perspective
    if stage.skirting and stage.end is None:
        _fill(pixels, rectangle(-0.1, horizon - 0.045, 1.1, horizon), stage.wall, 0.8)
    _fill(pixels, polygon((far_left, horizon), (far_right, horizon), (right, front), (left, front)), stage.table)
    _fill(pixels, rectangle(far_left, horizon, far_right, horizon + 0.012), stage.table, 1.12)
    _fill(pixels, rectangle(left, front, right, front + 0.05), stage.table, 0.72)
    _fill(pixels, rectangle(left + 0.03, front + 0.05, right - 0.03, 1.2), stage.table, 0.45)
    return np.clip(pixels * _light(stage, height=height, width=width)[..., None], 0, 255).astype(np.uint8)


def _light(stage: Stage, *, height: int, width: int) -> np.ndarray:
    """Brightness of the room (H,W): a lamp's falloff, and grain along the table."""
    rng = np.random.default_rng(stage.grain_seed)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    distance = np.hypot(x - stage.lamp[0], y - stage.lamp[1])
    grain = cv2.resize(rng.normal(size=(40, 5)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    mottle = cv2.resize(rng.normal(size=(6, 6)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    on_table = y > stage.horizon
    return stage.light * (1.04 - stage.falloff * distance**2) * (1 + np.where(on_table, 0.03 * grain, 0.02 * mottle))
