"""Templates of Something-Something that are alike in their words and differ in what happens."""

from __future__ import annotations

# What a clip becomes in a mirror.
MIRRORED = (
    ("Pushing [something] from left to right", "Pushing [something] from right to left"),
    ("Pulling [something] from left to right", "Pulling [something] from right to left"),
    ("Turning the camera left while filming [something]", "Turning the camera right while filming [something]"),
)
# What a clip becomes when it runs backwards.
REVERSED = (
    ("Pushing [something] from left to right", "Pulling [something] from right to left"),
    ("Pushing [something] from right to left", "Pulling [something] from left to right"),
    ("Picking [something] up", "Putting [something] on a surface"),
    ("Moving [something] up", "Moving [something] down"),
    ("Moving [something] towards the camera", "Moving [something] away from the camera"),
    ("Moving [something] closer to [something]", "Moving [something] away from [something]"),
    (
        "Moving [something] and [something] closer to each other",
        "Moving [something] and [something] away from each other",
    ),
    ("Approaching [something] with your camera", "Moving away from [something] with your camera"),
    ("Turning the camera upwards while filming [something]", "Turning the camera downwards while filming [something]"),
    ("Opening [something]", "Closing [something]"),
    ("Folding [something]", "Unfolding [something]"),
    ("Putting [something] into [something]", "Taking [something] out of [something]"),
    ("Burying [something] in [something]", "Digging [something] out of [something]"),
)
# What is done, and what is only pretended or fails: from the groups that the data set's authors call contrastive.
PRETENDED = (
    ("Wiping [something] off of [something]", "Pretending or failing to wipe [something] off of [something]"),
    ("Closing [something]", "Pretending to close [something] without actually closing it"),
    ("Opening [something]", "Pretending to open [something] without actually opening it"),
    ("Picking [something] up", "Pretending to pick [something] up"),
    ("Turning [something] upside down", "Pretending to turn [something] upside down"),
    ("Putting [something] into [something]", "Pretending to put [something] into [something]"),
    ("Putting [something] behind [something]", "Pretending to put [something] behind [something]"),
    ("Putting [something] next to [something]", "Pretending to put [something] next to [something]"),
    ("Putting [something] on a surface", "Pretending to put [something] on a surface"),
    ("Putting [something] onto [something]", "Pretending to put [something] onto [something]"),
    ("Putting [something] underneath [something]", "Pretending to put [something] underneath [something]"),
    ("Scooping [something] up with [something]", "Pretending to scoop [something] up with [something]"),
    ("Throwing [something]", "Pretending to throw [something]"),
    ("Taking [something] out of [something]", "Pretending to take [something] out of [something]"),
    ("Taking [something] from [somewhere]", "Pretending to take [something] from [somewhere]"),
    (
        "Throwing [something] in the air and catching it",
        "Throwing [something] in the air and letting it fall",
    ),
    (
        "Lifting [something] up completely without letting it drop down",
        "Lifting [something] up completely, then letting it drop down",
    ),
    (
        "Poking [something] so it slightly moves",
        "Poking [something] so lightly that it doesn't or almost doesn't move",
    ),
    (
        "Pushing [something] so that it falls off the table",
        "Pushing [something] so that it almost falls off but doesn't",
    ),
)
PAIRS = (*MIRRORED, *REVERSED, *PRETENDED)
