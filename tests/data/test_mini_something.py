"""mini-something keeps its promises: measured on the ground truth, and by a colour tracker on the pixels alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from vdm.data.captions import caption
from vdm.data.casting import compose
from vdm.data.mini_something import Rendered, render_clip, write_ssv2
from vdm.errors import UserError
from vdm.vocabulary import ACTIONS, COLOURS, HAND_HUES, HAND_SATURATIONS, OBJECT_MIN_SATURATION, OBJECT_MIN_VALUE

SEED = 11
PER_ACTION = 20


def render(index: int, **changes: int | float) -> Rendered:
    wanted = {"seed": SEED, "height": 64, "width": 64, "num_frames": 8, "fps": 4.0, **changes}
    return render_clip(index, **wanted)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def indices() -> dict[str, list[int]]:
    """Twenty clips of each action."""
    found: dict[str, list[int]] = defaultdict(list)
    for index in range(600):
        found[compose(index, seed=SEED).action.name].append(index)
    return {name: some[:PER_ACTION] for name, some in found.items()}


@pytest.fixture(scope="module")
def clips(indices: dict[str, list[int]]) -> dict[str, list[Rendered]]:
    return {name: [render(index, masks=True) for index in some] for name, some in indices.items()}


def all_of(clips: dict[str, list[Rendered]]) -> list[Rendered]:
    return [clip for some in clips.values() for clip in some]


def of_colour(hsv: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels of an HSV image (...,3) have the colour, (...) bool."""
    hue = hsv[..., 0]
    right_hue = np.any([(hue >= low) & (hue <= high) for low, high in COLOURS[colour].hues], axis=0)
    return right_hue & (hsv[..., 1] >= OBJECT_MIN_SATURATION) & (hsv[..., 2] >= OBJECT_MIN_VALUE)


def to_hsv(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV) for frame in frames])


def track_colour(clip: Rendered, which: int = 0) -> np.ndarray:
    """x, y and width of what has the object's colour, in fractions, (T,3); nan where there is too little of it."""
    seen = of_colour(to_hsv(clip.frames), clip.colours[which])
    found = np.full((len(seen), 3), np.nan)
    for i, mask in enumerate(seen):
        ys, xs = np.nonzero(mask)
        if len(xs) >= 6:
            found[i] = (xs.mean() + 0.5) / mask.shape[1], (ys.mean() + 0.5) / mask.shape[0], np.ptp(xs) + 1
    return found


def core(mask: np.ndarray) -> np.ndarray:
    """The pixels that lie wholly inside, with a one-pixel margin, of masks (T,H,W)."""
    return np.stack([cv2.erode((one == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for one in mask])


# ---- what a clip is a function of ----


def test_same_seed_and_index_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib, vdm.data.mini_something as m;"
        f"r = m.render_clip(5, seed={SEED}, height=64, width=64, num_frames=8, fps=4.0);"
        "print(hashlib.sha256(r.frames.tobytes()).hexdigest(), r.label)"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = render(5)
    assert elsewhere.strip() == f"{hashlib.sha256(here.frames.tobytes()).hexdigest()} {here.label}"
    assert not np.array_equal(here.frames, render(5, seed=SEED + 1).frames)
    assert not np.array_equal(here.frames, render(6).frames)


def test_another_frame_rate_shows_the_same_scene_at_other_times() -> None:
    for index in range(12):
        slow, fast = render(index), render(index, num_frames=16, fps=8.0)
        assert slow.label == fast.label
        assert np.array_equal(slow.frames, fast.frames[::2])


def test_masks_do_not_change_the_picture(indices: dict[str, list[int]]) -> None:
    for some in indices.values():
        plain, masked = render(some[0]), render(some[0], masks=True)
        assert np.array_equal(plain.frames, masked.frames) and not plain.truth.masks


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (256, 256), (48, 96), (96, 48), (33, 65)])
def test_any_size_shows_the_same_event(height: int, width: int) -> None:
    for index in range(3):
        clip, square = render(index, height=height, width=width), render(index)
        assert clip.frames.shape == (8, height, width, 3) and clip.frames.dtype == np.uint8
        assert clip.label == square.label
        if height == width:
            small = np.stack([cv2.resize(f, (32, 32), interpolation=cv2.INTER_AREA) for f in clip.frames]).astype(int)
            other = np.stack([cv2.resize(f, (32, 32), interpolation=cv2.INTER_AREA) for f in square.frames])
            assert np.abs(small - other).mean() < 4


@pytest.mark.parametrize("changes", [{"height": 8}, {"num_frames": 0}, {"fps": 0.0}])
def test_impossible_clips_are_refused(changes: dict[str, int | float]) -> None:
    with pytest.raises(UserError, match="cannot render"):
        render(0, **changes)


# ---- words ----


def test_annotations(clips: dict[str, list[Rendered]]) -> None:
    templates = {action.name: action.template for action in ACTIONS}
    assert set(clips) == set(templates) and all(len(some) == PER_ACTION for some in clips.values())
    for clip in all_of(clips):
        assert clip.template == templates[clip.action]
        assert clip.label == caption(clip.template, clip.placeholders)
        assert len(set(clip.colours)) == len(clip.colours) == len(clip.shapes) == len(clip.truth.objects)
        named = [f"a {colour} {shape}" for colour, shape in zip(clip.colours, clip.shapes, strict=True)]
        assert list(clip.placeholders) == named + ["a white cloth"] * (clip.action == "cover")
    assert {clip.shapes[0] for clip in clips["turn_upside_down"]} == {"cup", "bottle"}


def test_everything_is_drawn_uniformly() -> None:
    scenes = [compose(index, seed=SEED) for index in range(1600)]
    actions = Counter(scene.action.name for scene in scenes)
    colours = Counter(scene.play.bodies[0].colour for scene in scenes)
    shapes = Counter(scene.play.bodies[0].shape for scene in scenes if scene.action.name != "turn_upside_down")
    for counts, kinds in ((actions, 16), (colours, 6), (shapes, 5)):
        expected = sum(counts.values()) / kinds
        assert len(counts) == kinds
        assert max(abs(count - expected) for count in counts.values()) < 4 * expected**0.5
    with_bystander = [scene for scene in scenes if scene.bystanders]
    assert 0.1 < len(with_bystander) / len(scenes) < 0.2
    assert all(len(scene.play.bodies) - (scene.action.name == "cover") == 1 for scene in with_bystander)
    assert all(scene.bystanders[0].colour != scene.play.bodies[0].colour for scene in with_bystander)


# ---- colours ----


def test_every_object_pixel_has_its_colour(clips: dict[str, list[Rendered]]) -> None:
    for clip in all_of(clips):
        for name, colour in zip(("object", "second_object"), clip.colours, strict=False):
            pixels = to_hsv(clip.frames)[core(clip.truth.masks[name])]
            assert len(pixels) and of_colour(pixels, colour).all(), (clip.id, clip.label)


def test_hand_cloth_and_background_keep_their_saturations(clips: dict[str, list[Rendered]]) -> None:
    for clip in all_of(clips):
        hsv, masks = to_hsv(clip.frames), clip.truth.masks
        skin = hsv[core(masks["hand"])]
        assert (skin[:, 0] >= HAND_HUES[0]).all() and (skin[:, 0] <= HAND_HUES[1]).all()
        assert (skin[:, 1] >= HAND_SATURATIONS[0]).all() and (skin[:, 1] <= HAND_SATURATIONS[1]).all()
        assert (hsv[core(masks["cloth"])][:, 1] <= 30).all()
        things = np.max(list(masks.values()), axis=0)
        empty = np.stack([cv2.dilate(one, np.ones((5, 5), np.uint8)) == 0 for one in things])
        assert (hsv[empty][:, 1] <= 60).all(), (clip.id, clip.label)  # pages and sleeves as well


def test_a_bystander_is_never_touched() -> None:
    seen = 0
    for index in range(300):
        if compose(index, seed=SEED).bystanders:
            masks = render(index, masks=True).truth.masks
            others = np.max([masks[name] for name in ("object", "hand", "cloth")], axis=0)
            around = np.stack([cv2.dilate(mask, np.ones((3, 3), np.uint8)) for mask in masks["distractor"]])
            assert masks["distractor"].any(axis=(1, 2)).all() and not (around & others).any(), index
            seen += 1
    assert seen > 20


# ---- motions, from the truth and from the pixels ----

Measure = Callable[[np.ndarray, np.ndarray], bool]  # of centre (T,2) and width (T,), in fractions


def _moves(axis: int, sign: int, least: float) -> Measure:
    return lambda centre, _: sign * (centre[-1, axis] - centre[0, axis]) >= least


MINIMA: dict[str, Measure] = {
    "push_left_to_right": _moves(0, 1, 0.25),
    "push_right_to_left": _moves(0, -1, 0.25),
    "pull_left_to_right": _moves(0, 1, 0.25),
    "pull_right_to_left": _moves(0, -1, 0.25),
    "pick_up": _moves(1, -1, 0.2),
    "move_down": _moves(1, 1, 0.2),
    "put_on_surface": _moves(1, 1, 0.2),
    "move_towards_camera": lambda _, width: width[-1] >= 1.5 * width[0],
    "move_away_from_camera": lambda _, width: width[0] >= 1.5 * width[-1],
    "throw_and_catch": lambda centre, _: (
        centre[0, 1] - centre[:, 1].min() >= 0.25 and abs(centre[-1, 1] - centre[0, 1]) < 0.08
    ),
    "hold": lambda centre, _: bool(np.ptp(centre, axis=0).max() < 0.06),
    "turn_upside_down": lambda centre, _: bool(np.abs(centre[-1] - centre[0]).max() < 0.08),
}


@pytest.mark.parametrize("num_frames", [8, 24])
@pytest.mark.parametrize("action", sorted(MINIMA))
def test_motion_by_the_truth(action: str, num_frames: int, indices: dict[str, list[int]]) -> None:
    for index in indices[action]:
        (body,) = render(index, height=16, width=16, num_frames=num_frames).truth.objects
        assert MINIMA[action](body.centre, body.size[:, 0]) and body.visible.all(), index


@pytest.mark.parametrize("action", sorted(MINIMA))
def test_motion_by_the_pixels(action: str, clips: dict[str, list[Rendered]]) -> None:
    for clip in clips[action]:
        found = track_colour(clip)
        assert not np.isnan(found).any(), clip.id
        # Fingers hide a part of the object, and a part of its width.
        width = found[:, 2] if action.endswith("camera") else np.ones(8)
        assert MINIMA[action](found[:, :2], width), (clip.id, clip.label)


def test_tracker_and_truth_agree(clips: dict[str, list[Rendered]]) -> None:
    for action in MINIMA:
        for clip in clips[action]:
            assert np.abs(track_colour(clip)[:, :2] - clip.truth.objects[0].centre).max() < 0.08, clip.id


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("towards", [1, -1])
def test_the_hand_is_behind_when_pushing_and_ahead_when_pulling(
    pull: bool, towards: int, clips: dict[str, list[Rendered]]
) -> None:
    ways = {1: "left_to_right", -1: "right_to_left"}
    for clip in clips[f"{'pull' if pull else 'push'}_{ways[towards]}"]:
        (hand,), (body,) = clip.truth.hands, clip.truth.objects
        ahead = (hand.centre - body.centre)[:, 0] * towards
        assert (ahead > 0.03).all() if pull else (ahead < -0.03).all()
        assert (np.abs(ahead[2:6]) < body.size[2:6, 0] / 2 + 0.03).all()  # in contact while it moves
        xs = [np.nonzero(mask)[1].mean() / 64 for mask in clip.truth.masks["hand"][2:]]
        assert ((xs - body.centre[2:, 0]) * (towards if pull else -towards) > 0.03).all()


def test_held_or_let_go(clips: dict[str, list[Rendered]]) -> None:
    for clip in clips["put_on_surface"]:
        assert np.abs(clip.truth.hands[0].centre - clip.truth.objects[0].centre)[-1].max() > 0.3
    for action in ("pick_up", "move_down", "throw_and_catch", "hold"):
        for clip in clips[action]:
            (hand,), (body,) = clip.truth.hands, clip.truth.objects
            assert (np.abs(hand.centre - body.centre)[-1] < body.size[-1] / 2 + 0.02).all()
    for clip in clips["throw_and_catch"]:
        (hand,), (body,) = clip.truth.hands, clip.truth.objects
        apart = (hand.centre - body.centre)[:, 1]
        assert apart.max() - apart[0] > 0.25 and np.ptp(hand.centre[:, 1]) < 0.06


def test_turning_ends_upside_down(clips: dict[str, list[Rendered]]) -> None:
    def patch(image: np.ndarray, at: np.ndarray) -> np.ndarray:
        x, y = np.rint(at * 64 * 4).astype(int)
        return cv2.resize(image, (256, 256))[y - 44 : y + 44, x - 44 : x + 44].astype(float)

    for clip in clips["turn_upside_down"]:
        (body,) = clip.truth.objects
        assert body.degrees[0] == 0 and abs(body.degrees[-1]) == 180
        first, last = (patch(clip.frames[i].max(axis=-1), body.centre[i]) for i in (0, -1))
        mask_first, mask_last = (patch(clip.truth.masks["object"][i], body.centre[i]) > 250 for i in (0, -1))
        likeness = []
        for before, seen in ((first, mask_first), (first[::-1, ::-1], mask_first[::-1, ::-1])):
            both = seen & mask_last  # what no finger hides
            likeness.append(np.corrcoef(before[both], last[both])[0, 1])
        assert likeness[1] > max(0.7, likeness[0] + 0.2), clip.id


def test_falling_ends_out_of_sight(clips: dict[str, list[Rendered]]) -> None:
    for clip in clips["push_off_table"]:
        (body,) = clip.truth.objects
        assert body.visible[0] and not body.visible[-1]
        assert clip.truth.masks["object"][0].any() and not clip.truth.masks["object"][-1].any()
        assert np.isnan(track_colour(clip)[-1]).all()
        assert body.centre[-1, 1] > 1 and abs(body.centre[4, 0] - body.centre[0, 0]) > 0.15


def test_covering_hides_the_object(clips: dict[str, list[Rendered]]) -> None:
    for clip in clips["cover"]:
        (body,) = clip.truth.objects
        assert body.visible[:3].all() and not body.visible[-2:].any()
        assert not clip.truth.masks["object"][-1].any() and clip.truth.masks["cloth"][-1].any()
        assert not np.isnan(track_colour(clip)[0]).any() and np.isnan(track_colour(clip)[-1]).all()
        assert not clip.truth.hands[0].visible[-1] or clip.truth.hands[0].centre[-1, 1] < body.centre[-1, 1] - 0.2


@pytest.mark.parametrize("action, sign", [("move_closer", -1), ("move_apart", 1)])
def test_two_objects_change_their_distance(action: str, sign: int, clips: dict[str, list[Rendered]]) -> None:
    for clip in clips[action]:
        first, second = clip.truth.objects
        assert len(clip.truth.hands) == 2
        true_gap = second.centre[:, 0] - first.centre[:, 0]
        seen_gap = track_colour(clip, 1)[:, 0] - track_colour(clip, 0)[:, 0]
        for gap in (true_gap, seen_gap):
            assert (gap > 0).all() and sign * (gap[-1] - gap[0]) > 0.2, clip.id
        assert (true_gap > (first.size + second.size)[:, 0] / 2).all()  # they never collide


# ---- on disk ----


def test_ssv2_layout(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    write_ssv2(out, num_clips=11, size=32, num_frames=8, fps=8.0, seed=SEED)
    parts = {name: json.loads((out / f"{name}.json").read_text()) for name in ("train", "validation", "labels")}
    ids = [[entry["id"] for entry in parts[split]] for split in ("train", "validation")]
    assert ids == [[str(i) for i in range(10)], ["10"]]
    assert parts["labels"] == {name: str(i) for i, name in enumerate(sorted(a.class_name for a in ACTIONS))}
    for entry in parts["train"] + parts["validation"]:
        clip = render(int(entry["id"]))
        assert (entry["id"], entry["label"], entry["template"]) == (clip.id, clip.label, clip.template)
        assert len(entry) == 4 and entry["placeholders"] == list(clip.placeholders)
        assert (out / "20bn-something-something-v2" / f"{entry['id']}.mp4").stat().st_size > 500
    captions = [entry["label"] for entry in parts["train"] + parts["validation"]]
    assert (out / "captions.txt").read_text().splitlines() == captions
    assert len(list(out.rglob("*"))) == 4 + 1 + 11
    with pytest.raises(UserError, match="already holds"):
        write_ssv2(out, num_clips=2, size=32, num_frames=8, fps=8.0, seed=SEED)


def test_ssv2_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        write_ssv2(tmp_path / "one", num_clips=1, size=32, num_frames=8, fps=8.0, seed=0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_ssv2(tmp_path / "file" / "toy", num_clips=2, size=32, num_frames=8, fps=8.0, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_annotations_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vdm.data.mini_something.write_video", full)
    with pytest.raises(UserError, match="No space left"):
        write_ssv2(tmp_path / "toy", num_clips=2, size=32, num_frames=8, fps=8.0, seed=0)
    assert not list((tmp_path / "toy").glob("*.json"))
