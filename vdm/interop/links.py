"""One tensor of ours, and the tensors of another layout that hold the same numbers: renamed, reshaped or packed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.weights import Weights, spec


@dataclass(frozen=True)
class Link:
    """Our tensor is the concatenation of theirs along the first axis.

    `tail` are axes of size 1 that theirs has besides: a linear layer that they keep as a 1x1 convolution.
    """

    ours: str
    theirs: tuple[str, ...]
    tail: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What became of the tensors of one part, counted as the other layout counts them.

    matched: same name and shape; renamed: another name; reshaped: another shape, or a piece of a packed tensor.
    missing, unexpected: names that a flag allowed. left_out: known to be of no use here. fresh: our tensors that the
    other layout cannot have, as a video model's temporal layers are to an image model.
    """

    part: str
    matched: int = 0
    renamed: int = 0
    reshaped: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Tensors of theirs that are used."""
        return self.matched + self.renamed + self.reshaped

    def lines(self) -> list[str]:
        """The report as text: one line of counts, then one for each kind of tensor that has no counterpart."""
        counts = f"{self.matched} matched, {self.renamed} renamed, {self.reshaped} reshaped"
        rest = f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        named = {"missing": self.missing, "unexpected": self.unexpected, "left out": self.left_out, "new": self.fresh}
        some = [f"  {what}: {_some(names)}" for what, names in named.items() if names]
        return [f"{self.part}: {self.total} tensors: {counts}; {rest}", *some]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


@dataclass(frozen=True)
class Allowed:
    """Name patterns (such as "*.temp_convs.*") of tensors that may be missing, or be there unexpectedly."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


NOTHING = Allowed()


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name fits one of the patterns, whose * stands for anything."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def their_shape(link: Link, ours: Tensor) -> tuple[int, ...]:
    """The shape of each of their tensors."""
    first, *rest = ours.shape or (1,)
    return (first // len(link.theirs), *rest, *link.tail) if ours.dim() else ()


def to_ours(
    part: str,
    links: Sequence[Link],
    theirs: Weights,
    ours: Mapping[str, Tensor],
    *,
    source: str,
    allowed: Allowed = NOTHING,
    left_out: Callable[[str], bool] = lambda name: False,
) -> tuple[Weights, Report]:
    """Their tensors under our names, in our shapes, read as they are asked for; `ours` says which there must be.

    Our tensors that no link names are new. Pieces of one packed tensor are missing together or not at all. Raises
    UserError, naming file and tensor, for one that is missing or unexpected and not allowed, or has another shape.
    """
    absent = [_check(link, theirs, ours[link.ours], source, allowed) for link in links]
    complete = {link.ours: link for link, names in zip(links, absent, strict=True) if not names}
    useless = {name for link, names in zip(links, absent, strict=True) if names for name in link.theirs}
    known, linked = {name for link in links for name in link.theirs}, {link.ours for link in links}
    others = [name for name in theirs if name not in known]
    unexpected = [name for name in others if not left_out(name)]
    for name in unexpected:
        if not matches(name, allowed.unexpected):
            raise UserError(
                f"{source} has {name} {tuple(theirs.specs[name].shape)}, which this model has no place for; "
                f"give another file, or --allow_unexpected '{name}' to leave it out"
            )
    used = [(link, name) for link in complete.values() for name in link.theirs]
    report = Report(
        part,
        *_count((link, name, theirs.specs[name], ours[link.ours]) for link, name in used),
        missing=tuple(name for names in absent for name in names),
        unexpected=tuple(unexpected),
        left_out=tuple(name for name in theirs if name in useless or (name not in known and left_out(name))),
        fresh=tuple(name for name in ours if name not in linked),
    )

    dtypes = {
        name: functools.reduce(torch.promote_types, (theirs.specs[one].dtype for one in link.theirs))
        for name, link in complete.items()
    }

    def read(name: str) -> Tensor:
        pieces = [theirs[one].to(dtypes[name]) for one in complete[name].theirs]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.reshape(ours[name].shape)

    return Weights({name: spec(ours[name].shape, dtype) for name, dtype in dtypes.items()}, read), report


def _check(link: Link, theirs: Weights, ours: Tensor, source: str, allowed: Allowed) -> list[str]:
    """Which of a link's tensors are missing, as they may. Raises `UserError`."""
    shape = their_shape(link, ours)
    absent = [name for name in link.theirs if name not in theirs]
    # We keep the pieces of a packed tensor as one, and so they are new together.
    pieces = link.theirs if absent else ()
    for name in pieces:
        if not matches(name, allowed.missing):
            lacking = f"{source} has no {absent[0]}, which should be {shape}"
            together = f" (kept in one with {', '.join(link.theirs)})" if len(link.theirs) > 1 else ""
            raise UserError(f"{lacking}{together}; give another file, or --allow_missing '{name}' to have it new")
    for name in set(link.theirs).difference(absent):
        their = theirs.specs[name]
        if _squeezed(their.shape) != _squeezed(shape):
            raise UserError(
                f"{source}: {name} is {tuple(their.shape)}, where this model has {shape}; give matching files"
            )
        if their.is_floating_point() != ours.is_floating_point():
            raise UserError(f"{source}: {name} is of {their.dtype}, not floating-point; give another file")
    return absent


def _count(used: Iterable[tuple[Link, str, Tensor, Tensor]]) -> tuple[int, int, int]:
    """How many of (link, a tensor's name in it, that tensor, ours) are matched, renamed and reshaped."""
    counts = [0, 0, 0]
    for link, name, their, our in used:
        counts[2 if their.shape != our.shape else int(name != link.ours)] += 1
    return counts[0], counts[1], counts[2]


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without axes of size 1 after the second, in which layouts differ: linear layers and 1x1 convolutions."""
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def to_theirs(part: str, links: Sequence[Link], ours: Weights) -> tuple[Weights, Report]:
    """The inverse of `to_ours`."""
    places = {name: (link, index) for link in links for index, name in enumerate(link.theirs)}
    whole = {name: ours.specs[link.ours] for name, (link, _) in places.items()}
    specs = {name: spec(their_shape(link, whole[name]), whole[name].dtype) for name, (link, _) in places.items()}
    counts = _count((link, name, specs[name], whole[name]) for name, (link, _) in places.items())

    def read(name: str) -> Tensor:
        link, index = places[name]
        piece = ours[link.ours].chunk(len(link.theirs))[index]
        return piece.reshape(specs[name].shape).contiguous()

    return Weights(specs, read), Report(part, *counts)
