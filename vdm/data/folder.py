"""One's own clips: a folder of videos, each with its caption in a text file of the same name."""

from __future__ import annotations

from pathlib import Path

from vdm.data.ssv2 import VIDEO_EXTENSIONS, ClipFile, NoSuchSplit, Split, existing_folder, validation_ids
from vdm.errors import UserError
from vdm.files import is_file, names_in


def find_folder(root: str | Path, split: Split) -> list[ClipFile]:
    """The videos of one split, by name; `problem` marks those without a caption. Subfolders are not searched.

    Validation is the tenth of the ids (file stems) with the smallest hash, at least one. Raises UserError for a folder
    that does not exist or holds no video, and for an empty split.
    """
    folder = existing_folder(root)
    videos = sorted(
        path
        for path in names_in(folder)
        if path.suffix.lower() in VIDEO_EXTENSIONS and not path.name.startswith(".") and not path.is_dir()
    )
    if not videos:
        raise UserError(f"data folder {folder} holds no video; data.format=folder wants videos with a .txt beside each")
    held_out = validation_ids(path.stem for path in videos)
    clips = [_clip(path) for path in videos if (path.stem in held_out) == (split == "validation")]
    if split == "test" or not clips:
        raise NoSuchSplit(
            f"the {split} split of data folder {folder} is empty: of {len(videos)} videos none is left for it"
        )
    return clips


def _clip(video: Path) -> ClipFile:
    text_file = video.with_suffix(".txt")
    if not is_file(video):
        return ClipFile(video.stem, video, "", "it is no plain file, or nobody may read it")
    try:
        if text_file.exists() and not text_file.is_file():
            return ClipFile(video.stem, video, "", f"its caption file {text_file.name} is no plain file")
        text = text_file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ClipFile(video.stem, video, "", f"no caption file {text_file.name}")
    except (OSError, UnicodeDecodeError) as error:
        return ClipFile(video.stem, video, "", f"its caption file {text_file.name} cannot be read: {error}")
    return ClipFile(video.stem, video, text, "" if text else f"its caption file {text_file.name} is empty")
