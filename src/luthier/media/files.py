"""Readers of images and audio from a folder, a zip archive or an ``.npz`` file.

The folder of a file is the label, as in torchvision's ``ImageFolder``; files without subfolders
have no labels. Common parent folders in an archive are ignored, and so are hidden files and known
clutter (:func:`is_clutter`). Any other file that is neither image nor audio is an error. An
``.npz`` file has the arrays ``images`` (``[N, H, W]`` or ``[N, H, W, 3]``) and ``labels`` ``[N]``.
Rows are numbered from 1, in the order of names.
"""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from luthier.data.files.parsing import Record, quote
from luthier.data.files.sources import are_splits, is_clutter, media_below, other_files_problem
from luthier.data.inputs import (
    MEDIA_ENDINGS,
    Media,
    MediaKind,
    conversion_fix,
    is_media,
    media_kind,
)
from luthier.errors import RowNumber, RowRefused
from luthier.formatting import list_some
from luthier.media.decoding import scale_pixels, white_of

_SHOWN = 8
"""Maximum number of file names in a message."""
_COLOURS = ((), (1,), (3,))

OnRecord = Callable[[int, int], None]
"""Receives the number of each record before the record is read, and the number of all records."""


def read_folder(
    folder: Path, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """Yield a record for each file of a folder."""
    names = media_below(folder)
    kind, labelled = _kind_of(names), _has_labels(names)
    for number, name in enumerate(names, 1):
        media = Media(kind, f"{folder.name}/{name}", f"{folder}/{name}")
        on_record(number, len(names))
        yield RowNumber(number), _record(media, name, labelled)


def read_zip(
    path: Path, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """Yield a record for each file of an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, others = _members(archive.namelist())
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        message = f"The archive cannot be read: {str(error).rstrip('.')}."
        raise RowRefused(
            "file.damaged", message, "Create or download the archive again."
        ) from error
    if not names:
        only = f": {list_some(others, _SHOWN)}" if others else ""
        fix = f"Supported file types: {', '.join(MEDIA_ENDINGS)}."
        fix = conversion_fix(others) or fix
        raise RowRefused("file.empty", f"The archive has no images or audio{only}.", fix)
    if others:
        raise RowRefused("file.directory", *other_files_problem(len(names), others))
    inside = _without_common_folders(names)
    kind, labelled = _kind_of(names), _has_labels(inside)
    classes = {PurePosixPath(name).parts[0] for name in inside}
    if labelled and are_splits(classes):
        message = f"The folders are splits: {', '.join(sorted(classes))}."
        raise RowRefused("media.folder", message, "Create one archive per split.")
    archive_path = str(path)
    for number, (name, below) in enumerate(zip(names, inside, strict=True), 1):
        media = Media(kind, f"{path.name}/{name}", archive_path, name)
        on_record(number, len(names))
        yield RowNumber(number), _record(media, below, labelled)


def _members(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the media files of an archive, and all other files without clutter, sorted."""
    media, others = list[str](), list[str]()
    for name in sorted({*names}):
        if name.endswith("/") or is_clutter(name):
            continue
        is_inside = not name.startswith("/") and ".." not in PurePosixPath(name).parts
        (media if is_inside and is_media(name) else others).append(name)
    return media, others


def _without_common_folders(names: list[str]) -> list[str]:
    """Return the names without common parent folders."""
    parts = [PurePosixPath(name).parts for name in names]
    while all(len(each) > 2 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    return ["/".join(each) for each in parts]


def _kind_of(names: Iterable[str]) -> MediaKind:
    endings = {os.path.splitext(name)[1].lower() for name in names}  # paths intern their parts
    kinds = set(map(media_kind, endings))
    if {"image", "audio"} <= kinds:
        message = f"Images and audio are mixed: {', '.join(sorted(endings))}."
        raise RowRefused("media.mixed", message, "Use one folder for images and one for audio.")
    return "image" if "image" in kinds else "audio"


def _has_labels(names: Iterable[str]) -> bool:
    """Return whether the files are in folders. All files must be in folders, or none."""
    inside = {"/" in name: name for name in names}
    if len(inside) > 1:
        message = f"{quote(inside[False])} has no folder, and {quote(inside[True])} has one."
        fix = "Folders are labels: move all files into folders, or none."
        raise RowRefused("media.folder", message, fix)
    return True in inside


def _record(media: Media, name: str, labelled: bool) -> Record:
    record: Record = {media.kind: media}
    return record | ({"label": name.partition("/")[0]} if labelled else {})


def read_npz(
    path: Path, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """Yield a record for each image of an ``.npz`` file."""
    try:
        # numpy leaves a file that it opened itself open if the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if "images" not in names:
                message = (
                    f"The array `images` is missing. Arrays: {', '.join(sorted(names)) or 'none'}."
                )
                raise RowRefused("media.npz", message, "Save the file with images=… and labels=….")
            # numpy returns a member without an array as bytes.
            images = np.asarray(arrays["images"])
            labels = np.asarray(arrays["labels"]) if "labels" in names else None
    except (
        ValueError, OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
        lzma.LZMAError,
    ) as error:  # fmt: skip
        message = f"The file has no plain arrays: {str(error).rstrip('.')}."
        raise RowRefused(
            "file.damaged", message, "Save the file with numpy.savez, without objects."
        ) from None
    if (
        images.ndim not in (3, 4)
        or images.dtype.kind not in "buif"
        or images.shape[3:] not in _COLOURS
    ):
        message = f"`images` is {images.dtype} of shape {images.shape}."
        raise RowRefused("media.npz", message, "Use numbers of shape [N, H, W] or [N, H, W, 3].")
    if 0 in images.shape[1:]:
        message = f"`images` has the shape {images.shape}."
        raise RowRefused("media.npz", message, "Remove empty images.")
    if labels is not None and labels.shape != images.shape[:1]:
        message = f"`labels` has the shape {labels.shape} for {len(images)} images."
        raise RowRefused("media.npz", message, "Use one label per image.")
    if labels is not None and labels.dtype.kind not in "iuU":
        message = f"`labels` is {labels.dtype}."
        raise RowRefused("media.npz", message, "Use integers or text.")
    try:
        white = white_of(images)
    except RowRefused as bad:
        raise RowRefused(
            "media.npz", f"`images`: {bad.problem.message}", bad.problem.advice
        ) from None
    for index, image in enumerate(images):
        if images.dtype != np.uint8:
            image = scale_pixels(image, white)
        record: Record = {"image": Media("image", f"{path.name}[{index}]", array=image)}
        if labels is not None:
            record["label"] = str(labels[index])
        on_record(index + 1, len(images))
        yield RowNumber(index + 1), record
