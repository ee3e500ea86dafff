"""mini-something: a procedural miniature of Something-Something V2, rendered on the fly from (seed, index).

A clip is a scene (who, where, which of the sixteen actions) drawn at `num_frames` instants. The scene depends on
(seed, index) alone, so any size and frame rate shows the same event, and the ground truth comes for free.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from vdm.data.captions import caption
from vdm.data.casting import Frame, Scene, compose, shake_at
from vdm.data.drawing import HAND_ART, RGB, SHAPE_ART, Art, Canvas, draw_stage
from vdm.data.scenes import Body, Hand
from vdm.data.video import write_video
from vdm.errors import UserError
from vdm.vocabulary import ACTIONS, COVER

SUPERSAMPLING = 2
PAPER: RGB = (238.0, 234.0, 220.0)  # of a book
LABELS = {"object": 1, "second_object": 2, "hand": 3, "cloth": 4, "distractor": 5}


@dataclass(frozen=True)
class Trajectory:
    """Where one thing is in each frame, in fractions of the frame (x right, y down)."""

    centre: np.ndarray  # (T,2) of its bounding box; of a hand: the point that touches the object
    size: np.ndarray  # (T,2) width and height of its bounding box
    degrees: np.ndarray  # (T,) turned clockwise; of a hand: where it is seen from its object (0 right, 90 below)
    visible: np.ndarray  # (T,) bool: at least its centre is in the frame, and no cloth hides it


@dataclass(frozen=True)
class Truth:
    """What the renderer knows; `masks` holds uint8 (T,H,W) coverage (0-255) per name in LABELS, if asked for."""

    objects: tuple[Trajectory, ...]
    hands: tuple[Trajectory, ...]
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Rendered:
    """A clip with its Something-Something annotation."""

    frames: np.ndarray  # uint8 (T,H,W,3) RGB
    id: str
    label: str
    template: str
    placeholders: tuple[str, ...]
    action: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    truth: Truth


# ---- drawing ----


@dataclass(frozen=True)
class Sprite:
    """One art at every instant: where, how large and how far turned; in pixels and degrees."""

    art: Art
    at: np.ndarray  # (T,2)
    size: np.ndarray  # (T,2), negative where mirrored
    degrees: np.ndarray  # (T,)
    paints: tuple[RGB, RGB]
    label: int


@dataclass(frozen=True)
class Shadow:
    """A soft ellipse on the table at every instant."""

    at: np.ndarray  # (T,2)
    size: np.ndarray  # (T,2)
    strength: np.ndarray  # (T,)


def _body_sprite(body: Body, frame: Frame, u: np.ndarray, *, flip: int, label: str) -> Sprite:
    centre, _, degrees = frame.place(body, u)
    size = body.scale.at(u)[:, None] * frame.unit * (flip * body.width, body.height)
    return Sprite(SHAPE_ART[body.shape], centre, size, degrees, (body.rgb, PAPER), LABELS[label])


def _hand_sprite(hand: Hand, frame: Frame, u: np.ndarray, scene: Scene, *, layer: int) -> Sprite:
    contact, degrees = frame.touch(hand, u)
    flip = -1 if np.cos(np.radians(hand.direction.keys[0][1])) > 0 else 1  # keeps the thumb on top
    size = hand.follows.scale.at(u)[:, None] * frame.unit * scene.hand_size * (1, flip)
    art = HAND_ART[hand.pose][layer]
    return Sprite(art, contact, size, degrees + 180, (scene.skin, scene.sleeve), LABELS["hand"])


def _shadow(body: Body, frame: Frame, u: np.ndarray) -> Shadow:
    """Wider and fainter with height; none for what falls beside the table."""
    lift = body.lift.at(u)
    at = (np.stack([body.x.at(u), body.ground.at(u)], axis=1) + frame.shake) * frame.size
    spread = body.width * body.scale.at(u) * frame.unit * (0.42 + 0.5 * np.maximum(lift, 0))
    strength = np.where(lift < -0.01, 0, np.maximum(0.15, 0.55 - 1.3 * lift))
    return Shadow(at, spread[:, None] * (1, 0.22), strength)


def _sprites(scene: Scene, frame: Frame, u: np.ndarray) -> list[Sprite]:
    """What is drawn, back to front: palms behind the things they hold, fingers before them."""
    play, flip = scene.play, scene.flip
    sprites = [_body_sprite(body, frame, u, flip=flip, label="distractor") for body in scene.bystanders]
    sprites += [_hand_sprite(hand, frame, u, scene, layer=0) for hand in play.hands]
    for body, label in zip(play.bodies, ("object", "second_object"), strict=False):
        label = "cloth" if body.shape == "cloth" else label
        sprites.append(_body_sprite(body, frame, u, flip=flip, label=label))
    sprites += [_hand_sprite(hand, frame, u, scene, layer=1) for hand in play.hands]
    return sprites


def _draw(scene: Scene, frame: Frame, u: np.ndarray, *, masks: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All frames, uint8 (T,H,W,3), and the masks if wanted; drawn larger and shrunk."""
    small, large = (frame.width, frame.height), (frame.width * SUPERSAMPLING, frame.height * SUPERSAMPLING)
    lens = replace(frame, width=large[0], height=large[1])
    room = draw_stage(scene.stage, height=lens.height, width=lens.width)
    shadows = [_shadow(body, lens, u) for body in (*scene.bystanders, *scene.play.bodies)]
    sprites = _sprites(scene, lens, u)
    frames = np.empty((len(u), frame.height, frame.width, 3), dtype=np.uint8)
    covered = {name: np.zeros(frames.shape[:3], np.uint8) for name in LABELS if masks}
    for i, (dx, dy) in enumerate(frame.shake * lens.size):
        pixels = cv2.warpAffine(room, np.array([[1, 0, dx], [0, 1, dy]]), large, borderMode=cv2.BORDER_REPLICATE)
        labels = np.zeros(pixels.shape[:2], np.uint8)
        canvas = Canvas(pixels, labels if masks else None)
        for shadow in shadows:
            canvas.shade(at=shadow.at[i], size=shadow.size[i], strength=shadow.strength[i])
        for s in sprites:
            canvas.paint(s.art, at=s.at[i], size=s.size[i], degrees=s.degrees[i], paints=s.paints, label=s.label)
        cv2.resize(pixels, small, dst=frames[i], interpolation=cv2.INTER_AREA)
        for name, mask in covered.items():
            mine = np.where(labels == LABELS[name], np.uint8(255), np.uint8(0))
            cv2.resize(mine, small, dst=mask[i], interpolation=cv2.INTER_AREA)
    return frames, covered


def _truth(scene: Scene, u: np.ndarray, frame: Frame, masks: dict[str, np.ndarray]) -> Truth:
    objects, hands = [], []
    hidden_from = 2.0 if scene.play.hidden_from is None else scene.play.hidden_from
    for body in scene.play.bodies:
        if body.shape == "cloth":
            continue
        centre, box, degrees = frame.place(body, u)
        centre, box = centre / frame.size, box / frame.size
        inside = ((centre > 0) & (centre < 1)).all(axis=1)
        objects.append(Trajectory(centre, box, degrees, inside & (u < hidden_from)))
    for hand in scene.play.hands:
        contact, degrees = frame.touch(hand, u)
        contact = contact / frame.size
        size = scene.hand_size * frame.unit * hand.follows.scale.at(u)[:, None] / frame.size
        hands.append(Trajectory(contact, size, degrees, ((contact > 0) & (contact < 1)).all(axis=1)))
    return Truth(tuple(objects), tuple(hands), masks)


def render_clip(
    index: int, *, seed: int, height: int, width: int, num_frames: int, fps: float, masks: bool = False
) -> Rendered:
    """Clip number `index` of the set that `seed` makes.

    Frame i shows the scene at i / num_frames of the whole action; `fps` sets the pace of the camera shake alone, so
    that 8 frames at 4 fps are every second one of 16 at 8 fps. Motions keep DESIGN's minima from 8 frames on.
    """
    if min(height, width) < 16 or num_frames < 1 or not 0 < fps < math.inf:
        raise UserError(
            f"cannot render {num_frames} frames of {width}x{height} at {fps} fps: "
            "mini-something needs at least 1 frame, 16 pixels a side and a positive frame rate"
        )
    scene = compose(index, seed=seed)
    u = np.arange(num_frames) / num_frames
    frame = Frame(height, width, shake_at(scene, np.arange(num_frames) / fps))
    frames, covered = _draw(scene, frame, u, masks=masks)
    named = [body for body in scene.play.bodies if body.shape != "cloth"]
    placeholders = [f"a {body.colour} {body.shape}" for body in named]
    if scene.action.name == "cover":
        placeholders.append(COVER)
    return Rendered(
        frames=frames,
        id=str(index),
        label=caption(scene.action.template, placeholders),
        template=scene.action.template,
        placeholders=tuple(placeholders),
        action=scene.action.name,
        colours=tuple(body.colour for body in named),
        shapes=tuple(body.shape for body in named),
        truth=_truth(scene, u, frame, covered),
    )


# ---- writing ----


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_ssv2(out: str | Path, *, num_clips: int, size: int, num_frames: int, fps: float, seed: int) -> None:
    """Write clips 0 .. num_clips-1 as a folder in Something-Something V2's layout; annotations come last.

    Beside them `captions.txt` has the caption of each clip, in order: prompts for `sample.py --prompt_file`.

    Raises UserError for fewer than two clips, for what `render_clip` refuses, and for a folder that holds clips already
    or cannot be written.
    """
    if num_clips < 2:
        raise UserError(f"num_clips is {num_clips}: at least 2 are needed, one to train on and one to validate with")
    if seed < 0:
        raise UserError(f"seed is {seed}: it must be 0 or more")
    drawn = partial(render_clip, seed=seed, height=size, width=size, num_frames=num_frames, fps=fps)
    drawn(0)  # whose refusal of a size is to come before anything is made
    videos = Path(out) / "20bn-something-something-v2"
    try:
        if Path(out).exists() and any(Path(out).iterdir()):
            raise UserError(f"{out} already holds files: choose a new folder, or delete this one first")
        videos.mkdir(parents=True)
        entries = []
        for index in range(num_clips):
            clip = drawn(index)
            write_video(videos / f"{clip.id}.mp4", clip.frames, fps=fps)
            entries.append({key: getattr(clip, key) for key in ("id", "label", "template", "placeholders")})
        held_out = max(1, num_clips // 10)
        class_names = sorted(action.class_name for action in ACTIONS)
        _write_json(Path(out) / "labels.json", {name: str(rank) for rank, name in enumerate(class_names)})
        captions = "".join(f"{entry['label']}\n" for entry in entries)
        (Path(out) / "captions.txt").write_text(captions, encoding="utf-8")
        _write_json(Path(out) / "validation.json", entries[-held_out:])
        _write_json(Path(out) / "train.json", entries[:-held_out])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to {out} ({reason}): choose a folder you can write to") from error
