"""Other words for a caption: "pushing red ball from left to right" -> "a person pushes a red ball from left to right".

Something-Something's captions are templates with their slots filled as the workers typed. A model that shall follow
free prompts must meet articles and other forms of the verb. Everything here is a function of its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vdm.data.captions import SLOT, caption
from vdm.vocabulary import ACTIONS

NUM_FORMS = 4  # of one wording
_OTHERS = {action.template: action.others for action in ACTIONS}

# The verbs that templates begin with, and those that they join by "and", "but", "or", "then" or in parentheses.
_GERUNDS = """
    approaching:approach attaching:attach bending:bend bringing:bring burying:bury catching:catch closing:close
    covering:cover digging:dig dragging:drag dropping:drop failing:fail flipping:flip folding:fold hiding:hide
    hitting:hit holding:hold knocking:knock laying:lay letting:let lifting:lift lowering:lower missing:miss moving:move
    opening:open picking:pick piling:pile placing:place plugging:plug poking:poke pouring:pour pretending:pretend
    pulling:pull pushing:push putting:put raising:raise removing:remove rolling:roll scooping:scoop separating:separate
    showing:show spilling:spill spinning:spin spreading:spread sprinkling:sprinkle squeezing:squeeze stacking:stack
    stuffing:stuff taking:take tearing:tear throwing:throw tilting:tilt tipping:tip tossing:toss touching:touch
    trying:try turning:turn twisting:twist uncovering:uncover unfolding:unfold wiping:wipe wringing:wring
"""
_BASES: dict[str, str] = dict(pair.split(":") for pair in _GERUNDS.split())
_VERB = re.compile(r"(^|\b(?:and|but|or|then) |\()(?!nothing\b)([a-z]+ing)\b")

# Before these a noun has no further article.
_DETERMINED = re.compile(
    r"^(an?|the|this|that|these|those|my|your|his|her|its|our|their|some|any|no|another|each|every|both|all|several|"
    r"many|few|more|one|two|three|four|five|six|seven|eight|nine|ten|\d+|something|someone|somewhere|nothing)\b"
)
_SUBSTANCES = """
    air bread butter cardboard cereal cheese chocolate clay cloth coffee cream dirt dough fabric flour foam food fruit
    glue grass hair ice ink jewelry juice ketchup leather liquid lotion makeup meat milk money mud music mustard oil
    paint paper pasta pepper plastic powder rice rope salt sand sauce shampoo soap soda soil soup sugar tape tea thread
    tissue toothpaste trash water wax wine wire wood wool yarn
"""
_UNCOUNTED = frozenset(_SUBSTANCES.split())


def num_forms(template: str) -> int:
    """How many ways there are to say it: NUM_FORMS of the template, then as many of each other wording."""
    return NUM_FORMS * (1 + len(_OTHERS.get(template, ())))


def rephrased(template: str, placeholders: Sequence[str], *, form: int) -> str:
    """The caption in natural words, lower case. `form` in [0, num_forms(template)): "a person pushes ...", "push ...",
    "someone is pushing ...", "pushing ...", each with articles; then the same of other wordings.

    Raises UserError where placeholders and slots do not match.
    """
    caption(template, placeholders)  # the same check
    wording, form = divmod(form, NUM_FORMS)
    template = (template, *_OTHERS.get(template, ()))[wording]
    bare = SLOT.sub(lambda slot: slot[0].lower(), template[0].lower() + template[1:])
    sentence = _with_its_subject(bare, form) if bare.startswith("[") else _with_a_person(bare, form)
    fillers = iter(placeholders)
    kinds = iter(SLOT.findall(template))
    counted = False

    def fill(_: re.Match[str]) -> str:
        nonlocal counted
        words, kind, after_number = next(fillers), next(kinds), counted
        counted = kind == "[number of]"
        if counted or after_number or kind == "[some substance]":
            return words.lower()
        return f"the {words}".lower() if kind == "[part]" else with_article(words.lower())

    return SLOT.sub(fill, sentence)


def with_article(words: str) -> str:
    """A noun phrase with "a" or "an", unless it has a word in that place, or is plural or uncounted."""
    last = words.split()[-1] if words.split() else ""
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if not last or _DETERMINED.match(words) or plural or last in _UNCOUNTED:
        return words
    vowel = re.match(r"[aeio]|u(?!ni|se|s[bu])|hour|honest", words)
    return f"{'an' if vowel else 'a'} {words}"


def _with_a_person(bare: str, form: int) -> str:
    if form == 0:
        return "a person " + _of_others(_VERB.sub(lambda m: m[1] + _third_person(_BASES.get(m[2], m[2])), bare))
    if form == 1:
        return _VERB.sub(lambda m: m[1] + _BASES.get(m[2], m[2]), bare)
    return "someone is " + _of_others(bare) if form == 2 else bare


def _of_others(words: str) -> str:
    """What is said to the one who acts, as said of them."""
    return re.sub(r"\byou\b", "they", words).replace("your", "their")


def _with_its_subject(bare: str, form: int) -> str:
    """Of "[something] falling like a rock" the subject is there; it has no imperative."""
    slot, _, rest = bare.partition("] ")
    return f"{slot}] is {rest}" if form in (0, 1, 2) else bare


def _third_person(base: str) -> str:
    if base.endswith("y") and base[-2] not in "aeou":
        return f"{base[:-1]}ies"
    return f"{base}es" if base.endswith(("s", "sh", "ch", "x", "o")) else f"{base}s"
