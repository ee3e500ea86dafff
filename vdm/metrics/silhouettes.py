"""What shape a patch of one colour has, and which way up it is: compared with the outlines and shading of the five.

The outlines are those a viewer sees: a ball is round, a box shows three sides, a cup has a handle and a dark mouth, a
bottle a neck, a label and a dark cap, a book its cover, spine and back (the pages are white, so no part of the patch).
"""

from __future__ import annotations

import cv2
import numpy as np

from vdm.vocabulary import SHAPES

GRID = 16
ASPECTS = {"ball": 1.0, "box": 1.16, "cup": 1.05, "bottle": 0.48, "book": 2.05}  # width over height
ASPECT_WEIGHT, SHADE_WEIGHT = 0.6, 8.0  # against the share of cells that one of the two outlines lacks
CORE = 0.5  # of a patch's strongest colour; what has less is an edge that blur has widened
SOFTNESS = 1.3  # cells: outlines are blurred a little, as pictures are

Outline = list[tuple[float, float]]


def _arc(x: float, y: float, rx: float, ry: float, *, start: float = 0, stop: float = 360) -> Outline:
    angles = np.radians(np.linspace(start, stop, 25))
    return [(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in angles]


def _rectangle(left: float, top: float, right: float, bottom: float) -> Outline:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Each fills [-0.5, 0.5] x [-0.5, 0.5], y down, lit from the left: (outline, brightness), back to front.
_HANDLE = _arc(0.24, 0, 0.26, 0.27, start=-90, stop=90) + _arc(0.24, 0, 0.13, 0.15, start=90, stop=-90)
_SHOULDERS = [(-0.22, -0.4), (-0.22, -0.27), (-0.4, -0.16), (-0.5, -0.03), (-0.5, 0.5)]
_DARK_SIDE = [(0.1, 0.5), (0.5, 0.5), (0.5, -0.03), (0.4, -0.16), (0.22, -0.27), (0.22, -0.4), (0.1, -0.4)]
PARTS: dict[str, list[tuple[Outline, float]]] = {
    "ball": [
        (_arc(-0.13 * s, -0.15 * s, 0.5 - 0.36 * s, 0.5 - 0.36 * s), 0.6 + 0.4 * s) for s in (0.0, 0.33, 0.67, 1.0)
    ],
    "box": [
        (_rectangle(-0.5, -0.24, 0.27, 0.5), 0.82),
        ([(-0.5, -0.24), (-0.27, -0.5), (0.5, -0.5), (0.27, -0.24)], 1.0),
        ([(0.27, -0.24), (0.5, -0.5), (0.5, 0.24), (0.27, 0.5)], 0.56),
    ],
    "cup": [
        (_HANDLE, 0.62),
        ([(-0.5, -0.4), (-0.4, 0.42), (-0.12, 0.5), (0.15, 0.42), (0.26, -0.4)], 0.85),
        ([(0.0, -0.4), (0.0, 0.49), (0.15, 0.42), (0.26, -0.4)], 0.66),
        (_arc(-0.12, -0.4, 0.38, 0.1), 1.0),
        (_arc(-0.12, -0.385, 0.31, 0.07), 0.45),
    ],
    "bottle": [
        (_SHOULDERS + _DARK_SIDE, 0.85),
        (_DARK_SIDE, 0.66),
        (_rectangle(-0.5, 0.12, 0.5, 0.32), 0.55),
        (_rectangle(-0.29, -0.5, 0.29, -0.37), 0.48),
    ],
    "book": [
        (_rectangle(-0.5, -0.06, -0.38, 0.5), 0.66),
        (_rectangle(-0.5, 0.36, 0.34, 0.5), 0.6),
        (_rectangle(-0.5, -0.08, 0.34, 0.06), 0.72),
        ([(-0.5, -0.08), (-0.32, -0.5), (0.5, -0.5), (0.34, -0.08)], 0.95),
    ],
}


def _draw(parts: list[tuple[Outline, float]], *, fine: int = 8) -> np.ndarray:
    """Cover and brightness of every cell, both 0-1, float32 (2,GRID,GRID)."""
    planes = np.zeros((2, GRID * fine, GRID * fine), np.uint8)
    for outline, brightness in parts:
        points = [np.rint((np.array(outline) + 0.5) * GRID * fine - 0.5).astype(np.int32)]
        cv2.fillPoly(planes[0], points, 255)
        cv2.fillPoly(planes[1], points, round(255 * brightness))
    small = [cv2.resize(plane, (GRID, GRID), interpolation=cv2.INTER_AREA) for plane in planes]
    soft = [cv2.GaussianBlur(plane, (0, 0), SOFTNESS, borderType=cv2.BORDER_CONSTANT) for plane in small]
    return np.stack(soft).astype(np.float32) / 255


def _views(parts: list[tuple[Outline, float]]) -> np.ndarray:
    """Upright and upside down, each lit from either side: (2 ways up, 2 sides, 2 planes, GRID, GRID)."""
    upright = _draw(parts)
    sides = np.stack([upright, upright[..., ::-1]])
    return np.stack([sides, sides[..., ::-1, :]])


COVERS, LIGHTS = np.moveaxis(np.stack([_views(PARTS[shape]) for shape in SHAPES]), 3, 0)  # (5, 2, 2, GRID, GRID)
LOG_ASPECTS = np.log([ASPECTS[shape] for shape in SHAPES])


def resemblance(mask: np.ndarray, *, saturation: np.ndarray, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """How much a patch looks like each of SHAPES, upright and upside down: float (5,2), at most 0, higher is liker.

    mask (H,W) bool; HSV's saturation and value, uint8 (H,W); `hidden` (H,W) bool are pixels of a hand, behind which
    anything may be. Shading is compared in its pattern, for blur takes away contrast.
    """
    mask = _core(mask, saturation.astype(np.float32) * value)
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    part = np.s_[y : y + height, x : x + width]
    own = mask[part].astype(np.float32)
    planes = np.stack([own, own * value[part], 1 - hidden[part].astype(np.float32)], axis=-1)
    cover, light, bare = np.moveaxis(cv2.resize(planes, (GRID, GRID), interpolation=cv2.INTER_AREA), -1, 0)

    def mean(cells: np.ndarray) -> np.ndarray:
        average: np.ndarray = (cells * bare).sum(axis=(-2, -1), keepdims=True) / (bare.sum() + 1e-6)
        return average

    shade = light * mean(cover) / (mean(light) + 1e-6) - cover
    shades = LIGHTS * mean(COVERS) / (mean(LIGHTS) + 1e-6) - COVERS
    contrast = np.clip(mean(shade * shades) / (mean(shades**2) + 1e-6), 0, 1)
    unlike = mean(np.abs(cover - COVERS)) + SHADE_WEIGHT * mean(np.abs(shade - contrast * shades))
    aspect = np.abs(np.log(width / height) - LOG_ASPECTS)
    likeness: np.ndarray = -unlike[..., 0, 0].min(axis=-1) - ASPECT_WEIGHT * aspect[:, None]
    return likeness


def _core(mask: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    core: np.ndarray = mask & (chroma >= CORE * np.percentile(chroma[mask], 90))
    return core
