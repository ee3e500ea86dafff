"""Something-Something V2 as it lies on disk: annotation files and a folder of clips, matched by id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vdm.data.captions import caption, filled
from vdm.data.packed import Packed
from vdm.errors import UserError
from vdm.files import at_home, is_file, names_in

Split = Literal["train", "validation", "test"]

CLIP_FOLDERS = (".", "videos", "20bn-something-something-v2")
ANNOTATION_FOLDERS = (".", "labels")
PREFIXES = ("", "something-something-v2-")  # the file names of the later and of the first release
VIDEO_EXTENSIONS = frozenset(
    (".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".ts", ".gif")
)


@dataclass(frozen=True)
class ClipFile:
    """One annotated clip. `problem` says why it cannot be used ("no file"); empty means that nothing is known.

    `template` and `placeholders` are SSv2's, and empty where a caption comes without.
    """

    id: str
    path: Path | Packed
    caption: str
    problem: str = ""
    template: str = ""
    placeholders: tuple[str, ...] = ()


class NoSuchSplit(UserError):
    """A data set has no clips for a split."""


class NoFiles(UserError):
    """Of all clips of a split there is no file."""


def find_ssv2(root: str | Path, split: Split) -> list[ClipFile]:
    """The clips of one split as the annotations order them; `problem` marks those without a file or a caption.

    Clips lie in `root`, `videos/` or `20bn-something-something-v2/`, with any extension. Annotations are
    `[labels/][something-something-v2-]{train,validation,test}.json` or `[labels/]annotations.json`. Without a
    validation file the split is that of `validation_ids`. Test clips have no captions. Raises UserError for a folder,
    an annotation file or a split that cannot be used.
    """
    folder = existing_folder(root)
    source, entries = _entries(folder, split)
    files = _files_by_stem(folder)
    clips = [_clip(entry, files, folder, captioned=split != "test") for entry in entries]
    if not clips:
        raise NoSuchSplit(f"the {split} split of {source} is empty; it needs at least one clip")
    if not any(clip.id in files for clip in clips):
        places = ", ".join(str(folder / name) for name in CLIP_FOLDERS)
        raise NoFiles(
            f"none of the {len(clips)} {split} clips that {source} lists (such as {clips[0].id}) "
            f"has a file in {places}; put the videos into one of them, named ID.webm or with another extension"
        )
    return clips


def has_annotations(root: str | Path) -> bool:
    """Whether a folder holds annotation files of SSv2, of any split."""
    folder = existing_folder(root)
    return any(_find(folder, name) for name in ("annotations", "train", "validation", "test"))


def validation_ids(ids: Iterable[str]) -> frozenset[str]:
    """The tenth of the ids with the smallest hash, at least one: the same on every machine, and whatever the order."""
    ordered = sorted(
        set(ids), key=lambda name: (hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest(), name)
    )
    return frozenset(ordered[: max(1, len(ordered) // 10)])


def existing_folder(root: str | Path) -> Path:
    """`root` as a Path; UserError when it is not a folder."""
    folder = at_home(root)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {root} {problem}; set data.root to the folder that holds the clips")
    return folder


def _entries(folder: Path, split: Split) -> tuple[Path, list[dict[str, object]]]:
    """The annotation file that decides, and its entries that belong to the split."""
    own = _find(folder, split)
    if own is not None and split != "train":
        return own, _read(own)
    whole = _find(folder, "train") or _find(folder, "annotations")
    if whole is None or split == "test":
        raise _no_annotations(folder, split)
    entries = _read(whole)
    held_out = _find(folder, "validation")
    taken = _ids(_read(held_out)) if held_out else validation_ids(_ids(entries))
    return whole, [entry for entry in entries if (entry["id"] in taken) == (split == "validation")]


def _ids(entries: Iterable[dict[str, object]]) -> frozenset[str]:
    return frozenset(str(entry["id"]) for entry in entries)


def _find(folder: Path, name: str) -> Path | None:
    """The first file of that name in the places and spellings that the two releases use."""
    prefixes = ("",) if name == "annotations" else PREFIXES
    candidates = (folder / place / f"{prefix}{name}.json" for place in ANNOTATION_FOLDERS for prefix in prefixes)
    return next((path for path in candidates if is_file(path)), None)


def _no_annotations(folder: Path, split: Split) -> UserError:
    whole = "" if split == "test" else "annotations.json, "
    return NoSuchSplit(
        f"data folder {folder} has no annotations for the {split} split: looked for {whole}{split}.json and "
        f"something-something-v2-{split}.json there and in labels/; set data.root to the folder that holds them, "
        "or data.format=folder for videos with a .txt beside each"
    )


def _read(path: Path) -> list[dict[str, object]]:
    """The entries of one annotation file, each with its id as text."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"annotation file {path} cannot be read: {error}; it must be a JSON list") from error
    if not isinstance(content, list):
        raise UserError(f"annotation file {path} holds no JSON list; Something-Something lists its clips in one")
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int) or entry["id"] == "":
            raise UserError(f"entry {number} of annotation file {path} has no id; each needs one, like '78687'")
    return [{**entry, "id": str(entry["id"])} for entry in content]


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Every visible file of the clip folders by its stem; where several share one, a video goes before other files."""
    found: dict[str, Path] = {}
    for place in CLIP_FOLDERS:
        if not (folder / place).is_dir():
            continue
        files = (path for path in names_in(folder / place) if is_file(path) and not path.name.startswith("."))
        for path in sorted(files, key=lambda path: (path.suffix.lower() not in VIDEO_EXTENSIONS, path.name)):
            found.setdefault(path.stem, path)
    return found


def _clip(entry: dict[str, object], files: dict[str, Path], folder: Path, *, captioned: bool) -> ClipFile:
    name = str(entry["id"])
    text, problem = _caption(entry) if captioned else ("", "")
    template, placeholders = filled(entry) if captioned else ("", ())
    if name not in files:
        return ClipFile(name, folder / name, text, "no file", template, placeholders)
    return ClipFile(name, files[name], text, problem, template, placeholders)


def _caption(entry: dict[str, object]) -> tuple[str, str]:
    """The caption of an entry and what is wrong with it: its label, else what template and placeholders make."""
    label, template, placeholders = (entry.get(key) for key in ("label", "template", "placeholders"))
    if isinstance(label, str) and label.strip():
        return label.strip(), ""
    if not isinstance(template, str) or not isinstance(placeholders, list):
        return "", "its annotation has neither a label nor a template with placeholders"
    try:
        return caption(template, [str(placeholder) for placeholder in placeholders]), ""
    except UserError as error:
        return "", str(error)
