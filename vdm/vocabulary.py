"""The words of mini-something: six colours, five shapes and sixteen actions, shared by the renderer and the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A colour that a pixel can be tested for; hues are inclusive ranges in OpenCV's units (0-179)."""

    name: str
    hues: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Action:
    """One of the sixteen things that happen; `template` is SSv2's own wording, with a slot for each object, and
    `others` say the same of any clip in other words."""

    name: str
    template: str
    others: tuple[str, ...] = ()

    @property
    def num_slots(self) -> int:
        return self.template.count("[")

    @property
    def class_name(self) -> str:
        """The key of SSv2's labels.json: the template without its brackets."""
        return self.template.replace("[", "").replace("]", "")


# In OpenCV's HSV an object has at least this saturation, and this value on its lit side.
OBJECT_MIN_SATURATION = 150
OBJECT_MIN_VALUE = 70
# Table, wall and shadows stay below; skin lies in between, in a hue range that no object colour touches.
BACKGROUND_MAX_SATURATION = 60
HAND_HUES = (8, 18)
HAND_SATURATIONS = (50, 130)

COLOURS: dict[str, Colour] = {
    colour.name: colour
    for colour in (
        Colour("red", ((0, 4), (175, 179))),
        Colour("yellow", ((25, 33),)),
        Colour("green", ((50, 70),)),
        Colour("cyan", ((85, 97),)),
        Colour("blue", ((106, 120),)),
        Colour("purple", ((135, 155),)),
    )
}

SHAPES: tuple[str, ...] = ("ball", "box", "cup", "bottle", "book")
SHAPES_WITH_A_TOP: tuple[str, ...] = ("cup", "bottle")  # what can be turned upside down to the eye

COVER = "a white cloth"

ACTIONS: tuple[Action, ...] = (
    Action("push_left_to_right", "Pushing [something] from left to right", ("Pushing [something] to the right",)),
    Action("push_right_to_left", "Pushing [something] from right to left", ("Pushing [something] to the left",)),
    Action(
        "pull_left_to_right",
        "Pulling [something] from left to right",
        (
            "Pulling [something] to the right",
            "Dragging [something] to the right",
            "Dragging [something] from left to right",
        ),
    ),
    Action(
        "pull_right_to_left",
        "Pulling [something] from right to left",
        (
            "Pulling [something] to the left",
            "Dragging [something] to the left",
            "Dragging [something] from right to left",
        ),
    ),
    Action(
        "pick_up",
        "Picking [something] up",
        (
            "Picking up [something]",
            "Lifting [something] up",
            "Lifting [something]",
            "Raising [something]",
        ),
    ),
    Action(
        "move_down",
        "Moving [something] down",
        (
            "Lowering [something]",
            "Moving [something] downwards",
        ),
    ),
    Action(
        "put_on_surface",
        "Putting [something] on a surface",
        (
            "Putting [something] down",
            "Placing [something] on a surface",
        ),
    ),
    Action(
        "move_towards_camera",
        "Moving [something] towards the camera",
        (
            "Moving [something] towards me",
            "Bringing [something] towards the camera",
            "Bringing [something] closer to the camera",
        ),
    ),
    Action(
        "move_away_from_camera",
        "Moving [something] away from the camera",
        (
            "Moving [something] away from me",
            "Taking [something] away from the camera",
            "Moving [something] farther from the camera",
        ),
    ),
    Action(
        "turn_upside_down",
        "Turning [something] upside down",
        (
            "Turning [something] over",
            "Flipping [something] upside down",
            "Flipping [something] over",
        ),
    ),
    Action(
        "push_off_table",
        "Pushing [something] so that it falls off the table",
        (
            "Pushing [something] off the table",
            "Knocking [something] off the table",
        ),
    ),
    Action(
        "cover",
        "Covering [something] with [something]",
        (
            "Hiding [something] under [something]",
            "Covering up [something] with [something]",
        ),
    ),
    Action(
        "move_closer",
        "Moving [something] and [something] closer to each other",
        (
            "Moving [something] and [something] together",
            "Bringing [something] and [something] together",
        ),
    ),
    Action(
        "move_apart",
        "Moving [something] and [something] away from each other",
        (
            "Moving [something] and [something] apart",
            "Separating [something] and [something]",
        ),
    ),
    Action(
        "throw_and_catch",
        "Throwing [something] in the air and catching it",
        (
            "Throwing [something] up and catching it",
            "Tossing [something] in the air and catching it",
        ),
    ),
    Action(
        "hold",
        "Holding [something]",
        ("Holding [something] in the hand",),
    ),
)

# What a clip of an action shows when left and right are exchanged; of all others, the same action.
MIRRORED: dict[str, str] = {
    "push_left_to_right": "push_right_to_left",
    "push_right_to_left": "push_left_to_right",
    "pull_left_to_right": "pull_right_to_left",
    "pull_right_to_left": "pull_left_to_right",
}
# Rewound, what is picked up is put down and what is put down picked up; a fall, a cover and a turn become no action.
REWOUND: dict[str, str] = {
    "push_left_to_right": "pull_right_to_left",
    "push_right_to_left": "pull_left_to_right",
    "pull_left_to_right": "push_right_to_left",
    "pull_right_to_left": "push_left_to_right",
    "pick_up": "put_on_surface",
    "put_on_surface": "pick_up",
    "move_down": "pick_up",
    "move_towards_camera": "move_away_from_camera",
    "move_away_from_camera": "move_towards_camera",
    "move_closer": "move_apart",
    "move_apart": "move_closer",
    "throw_and_catch": "throw_and_catch",
    "hold": "hold",
}
