"""Does the model do what the prompt says? Direction and colour, judged by pixels alone: `python benchmarks/demo.py`.

Prompts are mini-something's own captions with colours and shapes drawn anew, the same number for each action. A clip is
judged by where its pixels of the prompted colour are: the largest patch of them in every frame, compared between the
first and the last third of the frames (medians). RULES is all there is to it, fixed on rendered clips before any model
was judged. What the hand does is not looked at: pushing and pulling, or moving down and putting, count alike.
`--real` judges rendered clips instead, which is the ceiling; "chance" is what the same clips score when the labels are
shuffled. `--gauge` takes seconds: how much worse the opposite caption explains a clip at high noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import environment, pick_device, sha256, write_json
from vdm.checkpoint import CONFIG, MANIFEST, verify
from vdm.cli import Parser, run
from vdm.config import load
from vdm.data.captions import caption
from vdm.data.casting import compose
from vdm.data.loader import VALIDATION_OFFSET, DataConfig
from vdm.data.mini_something import Rendered, render_clip
from vdm.data.video import to_float
from vdm.errors import UserError
from vdm.pipeline import SHIPPED, TextToVideo
from vdm.vocabulary import ACTIONS, BACKGROUND_MAX_SATURATION, COLOURS, COVER, SHAPES, SHAPES_WITH_A_TOP

BATCH = 8
TEMPLATES = {action.name: action.template for action in ACTIONS}
REVERSED = {  # by a caption that says exactly the opposite
    "push_left_to_right": "push_right_to_left",
    "pull_left_to_right": "pull_right_to_left",
    "move_towards_camera": "move_away_from_camera",
    "move_closer": "move_apart",
}
REVERSED |= {second: first for first, second in REVERSED.items()}
OPPOSITE = REVERSED | {"pick_up": "move_down", "move_down": "pick_up", "put_on_surface": "pick_up"}
GAUGED_AT = (0.8, 0.97, 1.0)  # of the noise schedule

# A pixel counts down to less saturation than a rendered object has: autoencoders blur, and models are pale at first.
MIN_SATURATION, MIN_VALUE, HUE_MARGIN = 110, 60, 2
MIN_AREA = 0.003  # of the frame; a smaller patch is no object
STEP = 0.12  # of the frame's width or height: the least that counts as a motion


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and what to look for."""

    text: str
    action: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Track:
    """The largest patch of one colour in every frame."""

    at: np.ndarray  # (T,2) x and y of its median pixel in fractions of the frame, NaN where there is none
    area: np.ndarray  # (T,) of it, in fractions of the frame
    total: np.ndarray  # (T,) of all pixels of the colour
    masks: np.ndarray  # (T,H,W) bool


@dataclass(frozen=True)
class Motion:
    """What became of the prompted object, from the first to the last third; NaN where that cannot be said."""

    right: float  # in widths
    up: float  # in heights
    growth: float  # of its area, as a factor
    peak: float  # how far above its start it ever was
    wander: float  # the farthest it ever was from its middle place
    gone: bool  # not there any more at the very end; then it has no `right`, `up` and `growth`
    travel: float  # sideways, while it was seen
    sunk: float  # below its start when it was last seen
    whitened: float  # share of the place where it was that is white at the end
    closing: float  # by how much the two objects came closer
    turned: float  # how much more its end looks like its start turned by 180 degrees than like its start


def _sideways(m: Motion, sign: int) -> bool:
    return sign * m.right >= STEP and abs(m.right) > abs(m.up)


def _upwards(m: Motion, sign: int) -> bool:
    return sign * m.up >= STEP and abs(m.up) > abs(m.right) and 0.42 < m.growth < 2.4


RULES: dict[str, Callable[[Motion], bool]] = {
    "push_left_to_right": lambda m: _sideways(m, 1),
    "push_right_to_left": lambda m: _sideways(m, -1),
    "pull_left_to_right": lambda m: _sideways(m, 1),
    "pull_right_to_left": lambda m: _sideways(m, -1),
    "pick_up": lambda m: _upwards(m, 1),
    "move_down": lambda m: _upwards(m, -1),
    "put_on_surface": lambda m: _upwards(m, -1),
    "move_towards_camera": lambda m: m.growth >= 1.6,
    "move_away_from_camera": lambda m: m.growth <= 1 / 1.6,
    "turn_upside_down": lambda m: m.turned >= 0.1 and max(abs(m.right), abs(m.up)) < STEP,
    "push_off_table": lambda m: m.gone and m.travel >= 0.15 and m.sunk >= 0.1,
    "cover": lambda m: m.gone and m.travel < 0.15 and m.whitened >= 0.6,
    "move_closer": lambda m: m.closing >= STEP,
    "move_apart": lambda m: m.closing <= -STEP,
    "throw_and_catch": lambda m: m.peak >= 0.15 and abs(m.up) <= 0.4 * m.peak and abs(m.right) < STEP,
    "hold": lambda m: m.wander < 0.06 and 1 / 1.4 < m.growth < 1.4,
}

# --- seeing ---


def to_hsv(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV) for frame in frames])


def follow(hsv: np.ndarray, colour: str) -> Track:
    """Find one colour of the vocabulary in a clip, uint8 (T,H,W,3) in OpenCV's HSV."""
    hue, vivid = hsv[..., 0].astype(int), (hsv[..., 1] >= MIN_SATURATION) & (hsv[..., 2] >= MIN_VALUE)
    near = [(hue >= low - HUE_MARGIN) & (hue <= high + HUE_MARGIN) for low, high in COLOURS[colour].hues]
    masks = np.any(near, axis=0) & vivid
    total = masks.mean(axis=(1, 2))
    at = np.full((len(hsv), 2), np.nan)
    for t, mask in enumerate(masks):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        masks[t] = labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]) if count > 1 else False
        if masks[t].mean() >= MIN_AREA:
            rows, columns = np.nonzero(masks[t])
            at[t] = (np.median(columns) + 0.5) / mask.shape[1], (np.median(rows) + 0.5) / mask.shape[0]
    return Track(at, masks.mean(axis=(1, 2)), total, masks)


def _median(values: np.ndarray) -> np.ndarray:
    """Over the frames in which something is seen; NaN if there is none."""
    seen = values[~np.isnan(values).reshape(len(values), -1).any(axis=1)]
    return np.median(seen, axis=0) if len(seen) else np.full(values.shape[1:], np.nan)


def measure(hsv: np.ndarray, tracks: dict[str, Track], colours: Sequence[str]) -> Motion | None:
    """The motion of the object of the first colour; None where the clip does not start with such an object."""
    track, length = tracks[colours[0]], len(hsv)
    third, eighth = max(1, round(length / 3)), max(1, length // 8)
    seen = np.flatnonzero(track.area >= MIN_AREA)
    if np.mean(track.area[:third] >= MIN_AREA) < 0.5:
        return None
    start, size = _median(track.at[:third]), np.median(track.area[:third])
    gone = bool(np.median(track.area[-eighth:]) < 0.15 * size)
    end = np.full(2, np.nan) if gone else _median(track.at[-third:])
    lifts = start[1] - np.array([_median(track.at[max(0, t - 1) : t + 2, 1]) for t in range(length)])
    place, final = track.masks[:third].mean(axis=0) > 0.5, hsv[-eighth:]
    white = (final[..., 1] <= BACKGROUND_MAX_SATURATION) & (final[..., 2] >= 190)
    gaps = np.linalg.norm(track.at - tracks[colours[-1]].at, axis=1)
    return Motion(
        right=float(end[0] - start[0]),
        up=float(start[1] - end[1]),
        growth=float("nan") if gone else float(np.median(track.area[-third:]) / size),
        peak=float(np.nanmax(lifts)),
        wander=float(np.nanmax(np.abs(track.at - _median(track.at)))),
        gone=gone,
        travel=float(np.ptp(track.at[seen, 0])),
        sunk=float(track.at[seen[-1], 1] - start[1]),
        whitened=float(white[:, place].mean()) if place.any() else 0.0,
        closing=float(_median(gaps[:third]) - _median(gaps[-third:])) if len(colours) > 1 else float("nan"),
        turned=_turned(hsv[..., 2], track, eighth),
    )


def _turned(value: np.ndarray, track: Track, count: int) -> float:
    """Correlate the object, cut out and scaled to one size, of the first `count` frames with that of the last."""

    def look(frames: range) -> np.ndarray | None:
        cuts = []
        for t in frames:
            if track.area[t] >= MIN_AREA:
                x, y, width, height = cv2.boundingRect(track.masks[t].astype(np.uint8))
                cut = np.where(track.masks[t], value[t], 0)[y : y + height, x : x + width].astype(np.float32)
                cuts.append(cv2.resize(cut, (24, 24), interpolation=cv2.INTER_AREA))
        return np.mean(cuts, axis=0) if cuts else None

    first, last = look(range(count)), look(range(len(value) - count, len(value)))
    if first is None or last is None:
        return float("nan")
    upright, turned = (np.corrcoef(one.ravel(), last.ravel())[0, 1] for one in (first, first[::-1, ::-1]))
    return float(turned - upright)


def dominant(tracks: dict[str, Track], colours: Sequence[str], *, part: float = 1.0) -> bool:
    """Whether each of `colours` covers more than any other and is an object, in half of the first `part` of the frames."""
    frames = slice(max(1, round(len(next(iter(tracks.values())).total) * part)))
    least = np.min([tracks[colour].total[frames] for colour in colours], axis=0)
    others = np.max([track.total[frames] for colour, track in tracks.items() if colour not in colours], axis=0)
    return bool(np.mean((least > others) & (least >= MIN_AREA)) >= 0.5)


# --- judging ---


@dataclass(frozen=True)
class Verdict:
    """What one clip shows: every action whose rule holds, and every colour that dominates alone."""

    prompt: Prompt
    shown: tuple[str, ...]
    colour: bool
    dominant: tuple[str, ...]
    motion: Motion | None

    @property
    def right(self) -> bool:
        return self.prompt.action in self.shown

    @property
    def opposite(self) -> bool:
        return not self.right and OPPOSITE.get(self.prompt.action) in self.shown


def judge(frames: np.ndarray, prompt: Prompt) -> Verdict:
    """Judge one clip, uint8 (T,H,W,3) RGB."""
    hsv = to_hsv(frames)
    tracks = {colour: follow(hsv, colour) for colour in COLOURS}
    motion = measure(hsv, tracks, prompt.colours)
    shown = tuple(name for name, rule in RULES.items() if motion is not None and rule(motion))
    part = 1 / 3 if prompt.action == "cover" else 1.0  # then it is hidden
    alone = tuple(colour for colour in COLOURS if dominant(tracks, [colour], part=part))
    return Verdict(prompt, shown, dominant(tracks, prompt.colours, part=part), alone, motion)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z2 = 1.96**2
    middle = (right + z2 / 2) / (count + z2)
    half = 1.96 * (right * (count - right) / count + z2 / 4) ** 0.5 / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _score(hits: Sequence[bool], chances: Sequence[float]) -> dict[str, object]:
    right, count = sum(hits), len(hits)
    return {
        "value": right / count, "ci95": wilson(right, count), "right": right, "clips": count,
        "chance": float(np.mean(chances)),
    }  # fmt: skip


def summarise(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """Scores with intervals and chance, and what was shown for each prompted action.

    Chance is exact: the mean over all labels that a clip could be given, of the actions or colours that are scored.
    """
    directional = [verdict for verdict in verdicts if verdict.prompt.action in OPPOSITE]
    by_action = {name: [v for v in verdicts if v.prompt.action == name] for name in RULES}
    return {
        "direction": _score([v.right for v in directional], [_share(v.shown, OPPOSITE) for v in directional]),
        "action": _score([v.right for v in verdicts], [_share(v.shown, RULES) for v in verdicts]),
        "colour": _score([v.colour for v in verdicts], [len(v.dominant) / len(COLOURS) for v in verdicts]),
        "actions": {
            name: {
                "clips": len(some),
                "right": sum(v.right for v in some),
                "opposite": sum(v.opposite for v in some),
                "still": sum("hold" in v.shown for v in some),
                "lost": sum(v.motion is None for v in some),
                "colour": sum(v.colour for v in some),
                "shown": {shown: sum(shown in v.shown for v in some) for shown in RULES},
            }
            for name, some in by_action.items()
        },
    }


def _share(shown: Sequence[str], actions: Sequence[str] | dict[str, object]) -> float:
    return sum(name in shown for name in actions) / len(actions)
