"""Which pixels of a clip are a coloured thing, a hand or white cloth, by the hues of `vdm.vocabulary` alone.

The ranges are a little wider than what mini-something's renderer keeps to: autoencoders blur, and blur mixes a colour
with what is beside it. Hues of the hand stay with the hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from vdm.vocabulary import COLOURS, HAND_HUES, HAND_SATURATIONS

NAMES: tuple[str, ...] = tuple(COLOURS)
HAND = len(NAMES) + 1
WHITE = HAND + 1

HUE_MARGIN = 3
OBJECT_SATURATION, OBJECT_VALUE = 112, 45
HAND_SATURATION, HAND_VALUE = (HAND_SATURATIONS[0] + 8, HAND_SATURATIONS[1] + 8), 60  # warm tables come up to its 50
WHITE_SATURATION, WHITE_VALUE = 45, 180
BLUR = 0.9 / 64  # of the shorter side, against noise
LARGEST = 128  # pixels of the shorter side: more show nothing more, and take longer


@dataclass(frozen=True)
class Segments:
    """A clip taken apart."""

    labels: np.ndarray  # uint8 (T,H,W): 0 nothing, 1 + i the i-th of NAMES, HAND, WHITE
    saturation: np.ndarray  # uint8 (T,H,W), as value: HSV's
    value: np.ndarray


def _table(ranges: Iterable[tuple[int, int, int]], *, margin: int) -> np.ndarray:
    """(label, low, high) to the label of every hue, uint8 (256,) as cv2.LUT takes it."""
    table = np.zeros(256, np.uint8)
    for label, low, high in ranges:
        table[max(0, low - margin) : min(179, high + margin) + 1] = label
    return table


THINGS = _table(((i, *hues) for i, name in enumerate(NAMES, 1) for hues in COLOURS[name].hues), margin=HUE_MARGIN)
SKIN = _table([(HAND, *HAND_HUES)], margin=2)


def segment(clip: np.ndarray) -> Segments:
    """Label every pixel of a clip, uint8 RGB (T,H,W,3), or of a smaller copy of one that is larger than need be."""
    shrink = LARGEST / min(clip.shape[1:3])
    if shrink < 1:
        size = round(clip.shape[2] * shrink), round(clip.shape[1] * shrink)
        clip = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in clip])
    frames, height, width, _ = clip.shape
    sigma = BLUR * min(height, width)
    window = (2 * math.ceil(sigma) + 1,) * 2
    smooth = np.concatenate([cv2.GaussianBlur(frame, window, sigma) for frame in clip])
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV))
    skin = (saturation >= HAND_SATURATION[0]) & (saturation <= HAND_SATURATION[1]) & (value >= HAND_VALUE)
    labels = cv2.LUT(hue, SKIN) * skin
    labels[(saturation <= WHITE_SATURATION) & (value >= WHITE_VALUE)] = WHITE
    things = cv2.LUT(hue, THINGS) * ((saturation >= OBJECT_SATURATION) & (value >= OBJECT_VALUE))
    labels = np.where(things > 0, things, labels)
    return Segments(*(plane.reshape(frames, height, width) for plane in (labels, saturation, value)))
