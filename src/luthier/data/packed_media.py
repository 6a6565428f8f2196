"""Images and audio that rows name, inside a zip archive or an ``.npz`` file.

Archives are the rows' own archive, and all archives in the folder of the rows, the one with the
name of the rows' file first.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

from luthier.data.inputs import Media, MediaKind, open_archive
from luthier.plugins import extensions, load_extension


def packed_media(kind: MediaKind, rows: Path, value: str | int) -> Media | None:
    """Return the media that a row of the file ``rows`` names; ``None`` if no archive has it.

    Args:
        kind: kind of the media.
        rows: file of the rows.
        value: name inside a zip archive, or index of an image of the ``.npz`` file.
    """
    if isinstance(value, int):
        arrays = [path for path in _archives(rows) if path.endswith(".npz")]
        if kind != "image" or not arrays or (len(arrays) > 1 and not _has_name(arrays[0], rows)):
            return None
        images = _images(*_version(arrays[0]))
        return images[value] if 0 <= value < len(images) else None
    for path in _archives(rows):
        if path.endswith(".npz"):
            continue
        name = value.removeprefix(f"{Path(path).name}/")  # as `luthier convert` writes members
        if member := _members(*_version(path)).get(name):
            return Media(kind, f"{Path(path).name}/{member}", path, member)
    return None


def _archives(rows: Path) -> Sequence[str]:
    folder = str(rows.parent.resolve())
    found = sorted(
        _archives_in(folder, os.stat(folder).st_mtime_ns),
        key=lambda path: not _has_name(path, rows),
    )
    return [str(rows), *found] if zipfile.is_zipfile(rows) else found


def _has_name(path: str, rows: Path) -> bool:
    """Return whether an archive has the name of the rows' file."""
    return Path(path).stem == rows.stem


def _version(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _archives_in(folder: str, modified: int) -> Sequence[str]:
    names = sorted(os.listdir(folder))
    return [f"{folder}/{name}" for name in names if name.lower().endswith((".zip", ".npz"))]


@lru_cache(maxsize=16)
def _members(path: str, modified: int, size: int) -> Mapping[str, str]:
    """Return the members of an archive by their names, also without a top folder."""
    try:
        names = open_archive(path, modified, size).namelist()
    except (OSError, zipfile.BadZipFile):
        return {}
    return {name.partition("/")[2]: name for name in names} | {name: name for name in names}


@lru_cache(maxsize=1)
def _images(path: str, modified: int, size: int) -> Sequence[Media]:
    """Return all images of an ``.npz`` file.

    Raises:
        RowRefused: for arrays that are no images.
    """
    records = load_extension(extensions("readers")["npz"])(Path(path))
    return [cast(Media, record["image"]) for _, record in records]
