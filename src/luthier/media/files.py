"""Rows of images and sounds from what holds nothing else: a folder, a zip archive, an ``.npz`` file.

In a folder or an archive the name of the folder that a file lies in is its label, as torchvision's
``ImageFolder`` has it; files beside each other without folders have none. Folders of an archive that
hold all others are passed over. Hidden files and known clutter (:func:`is_clutter`) are ignored; any
other file that is neither image nor audio is refused. An ``.npz`` file holds ``images``
(``[N, H, W]`` or ``[N, H, W, 3]``) and ``labels`` ``[N]``. Rows are numbered from 1, in the order of
the names.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from luthier.data.disk_sequence import spool
from luthier.data.media import (
    MEDIA_ENDINGS,
    Media,
    MediaKind,
    conversion_fix,
    media_kind,
    scale_pixels,
    white_of,
)
from luthier.data.parsing import Record, quote
from luthier.errors import RowRefused
from luthier.escaping import list_some
from luthier.files import names_below

SPLIT_NAME = re.compile(
    r"(?:^|[^a-z])(train|valid|validation|val|dev|test|eval|held-?out)(?:[^a-z]|$)", re.I
)
"""Names of files and folders that say what their rows are for."""
_CLUTTER = re.compile(
    r"""(?:^|/)(?:
        \.(?!\.?/)                                # hidden, but not the parts "." and ".." of a path
      | (?:__MACOSX|__pycache__|_delta_log|_temporary)/
      | (?: thumbs\.db | desktop\.ini
          | _success | _(?:common_)?metadata | _(?:started|committed)_\d+             # Spark
          | dataset_infos?\.json | dataset_dict\.json | state\.json                  # Hugging Face
          | (?:readme|licen[cs]e|notice|changelog|citation)
            (?:\.[a-z]{2}|-[\w-]+)?(?:\.(?:md|txt|rst|html?|bib|cff))?
        )$
    )""",
    re.I | re.X,
)
_SHOWN = 8
"""Names of files in a message."""
_COLOURS = ((), (1,), (3,))

OBJECTS = "objects"
"""Folder beside rows with copies of what they name by ``s3://`` addresses."""
REFERENCES = ("image", "audio", "image-ref", "file_name", "path")
"""Keys under which rows name an image or a sound, in our own shapes and in forms of others."""


def object_name(address: str) -> str:
    """Path of the copy of an object, as seen from the folder of the rows that name it.

    Keys are no paths: it is called after the hash of the address, so that none leads elsewhere.
    """
    ending = PurePosixPath(address).suffix.lower()
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    return f"{OBJECTS}/{digest}{ending if ending in MEDIA_ENDINGS else ''}"


def media_references(record: Record, keys: Iterable[str] = REFERENCES) -> list[str]:
    """Paths and addresses of images and sounds that a record names; what it holds itself is none."""
    found = []
    for key in keys:
        value = record.get(key)
        if isinstance(value, dict):
            value = None if value.get("bytes") else value.get("path")
        if key == "path" and not is_media(str(value)):
            continue  # of a text, which is no more than said to come from there
        if isinstance(value, str) and value.strip() and not value.startswith("data:"):
            found.append(value)
    return found


def is_media(name: str) -> bool:
    """Whether a file is an image or a sound, by its ending."""
    return media_kind(name) is not None


def is_clutter(name: str) -> bool:
    """Return whether the file at a relative path is ignored: hidden, or written by a known program."""
    return _CLUTTER.search(name) is not None


def other_files_problem(count: int, others: Sequence[str]) -> tuple[str, str]:
    """Return message and fix for files that are neither image nor audio next to ``count`` that are."""
    kinds = Counter(PurePosixPath(name.lower()).suffix or "no ending" for name in others)
    counts = list_some((f"{times:,} {kind}" for kind, times in kinds.most_common()), _SHOWN)
    message = (
        f"Next to {count:,} images or sounds are other files ({counts}), which are not read: "
        f"{list_some(others, _SHOWN)}."
    )
    fix = "Move such files away, or give a table of rows that name the images or sounds."
    return message, f"{conversion_fix(others)} {fix}".strip()


def are_splits(folders: Collection[str]) -> bool:
    """Whether folders of images or sounds are splits, and not classes."""
    return bool(folders) and all(SPLIT_NAME.fullmatch(name) for name in folders)


def holds_media(folder: Path) -> bool:
    """Whether there is an image or a sound below ``folder``."""
    return any(map(is_media, names_below(folder)))


def media_below(folder: Path) -> Sequence[str]:
    """Return the names of all images and sounds below ``folder``, without clutter, in order."""
    return spool(name for name in names_below(folder) if is_media(name) and not is_clutter(name))


OnRecord = Callable[[int, int], None]
"""Given the number of each record before it comes, and how many there are."""


def read_folder(
    folder: Path, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """A record for each file of a folder of images or sounds."""
    names = media_below(folder)
    kind, labelled = _kind_of(names), _has_labels(names)
    for number, name in enumerate(names, 1):
        media = Media(kind, f"{folder.name}/{name}", f"{folder}/{name}")
        on_record(number, len(names))
        yield number, _record(media, name, labelled)


def read_zip(
    path: Path, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """A record for each file of an archive of images or sounds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, others = _members(archive.namelist())
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        message = f"The archive cannot be read: {str(error).rstrip('.')}."
        raise RowRefused("file.damaged", message, "Pack or fetch the file again.") from error
    if not names:
        only = f", only {list_some(others, _SHOWN)}" if others else ""
        fix = f"Put files into it that end with {', '.join(MEDIA_ENDINGS)}, or unpack it."
        fix = conversion_fix(others) or fix
        raise RowRefused("file.empty", f"The archive holds no images or sounds{only}.", fix)
    if others:
        raise RowRefused("file.directory", *other_files_problem(len(names), others))
    inside = _without_common_folders(names)
    kind, labelled = _kind_of(names), _has_labels(inside)
    classes = {PurePosixPath(name).parts[0] for name in inside}
    if labelled and are_splits(classes):
        message = f"Its folders are the splits {', '.join(sorted(classes))}, which do not mix."
        raise RowRefused("media.folder", message, "Pack each into an archive of its own.")
    archive_path = str(path)
    for number, (name, below) in enumerate(zip(names, inside, strict=True), 1):
        media = Media(kind, f"{path.name}/{name}", archive_path, name)
        on_record(number, len(names))
        yield number, _record(media, below, labelled)


def _members(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the images and sounds of an archive, and all other files without clutter, in order."""
    media, others = list[str](), list[str]()
    for name in sorted({*names}):
        if name.endswith("/") or is_clutter(name):
            continue
        is_inside = not name.startswith("/") and ".." not in PurePosixPath(name).parts
        (media if is_inside and is_media(name) else others).append(name)
    return media, others


def _without_common_folders(names: list[str]) -> list[str]:
    """The names without the folders that hold all others, as archives of one folder have them."""
    parts = [PurePosixPath(name).parts for name in names]
    while all(len(each) > 2 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    return ["/".join(each) for each in parts]


def _kind_of(names: Iterable[str]) -> MediaKind:
    endings = {os.path.splitext(name)[1].lower() for name in names}  # paths intern their parts
    kinds = set(map(media_kind, endings))
    if {"image", "audio"} <= kinds:
        message = f"It holds images and sounds: {', '.join(sorted(endings))}."
        raise RowRefused("media.mixed", message, "Put them into two folders.")
    return "image" if "image" in kinds else "audio"


def _has_labels(names: Iterable[str]) -> bool:
    """Whether the files lie in folders; all must, or none."""
    inside = {"/" in name: name for name in names}
    if len(inside) > 1:
        message = f"{quote(inside[False])} lies in no folder, and {quote(inside[True])} does."
        fix = "The folder of a file is its label: move it into one, or all files out of theirs."
        raise RowRefused("media.folder", message, fix)
    return True in inside


def _record(media: Media, name: str, labelled: bool) -> Record:
    record: Record = {media.kind: media}
    return record | ({"label": name.partition("/")[0]} if labelled else {})


def read_npz(
    stream: BinaryIO, file: str, on_record: OnRecord = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """A record for each image of an ``.npz`` file."""
    try:
        with np.load(stream, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if "images" not in names:
                message = (
                    f"The file has no array `images`, only {', '.join(sorted(names)) or 'none'}."
                )
                raise RowRefused("media.npz", message, "Save it with images=… and labels=….")
            # numpy gives a member that is no array as bytes.
            images = np.asarray(arrays["images"])
            labels = np.asarray(arrays["labels"]) if "labels" in names else None
    except (
        ValueError, OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
        lzma.LZMAError,
    ) as error:  # fmt: skip
        message = f"The file holds no plain arrays: {str(error).rstrip('.')}."
        raise RowRefused(
            "file.damaged", message, "Save it with numpy.savez, without objects."
        ) from None
    if (
        images.ndim not in (3, 4)
        or images.dtype.kind not in "buif"
        or images.shape[3:] not in _COLOURS
    ):
        message = f"`images` is {images.dtype} of shape {images.shape}."
        raise RowRefused("media.npz", message, "It must hold numbers, [N, H, W] or [N, H, W, 3].")
    if 0 in images.shape[1:]:
        message = f"`images` has the shape {images.shape}."
        raise RowRefused("media.npz", message, "Save images that have pixels.")
    if labels is not None and labels.shape != images.shape[:1]:
        message = f"`labels` has the shape {labels.shape} beside {len(images)} images."
        raise RowRefused("media.npz", message, "Give one label for each image.")
    if labels is not None and labels.dtype.kind not in "iuU":
        message = f"`labels` is {labels.dtype}."
        raise RowRefused("media.npz", message, "Give whole numbers or texts.")
    try:
        white = white_of(images)
    except RowRefused as bad:
        raise RowRefused(
            "media.npz", f"`images`: {bad.problem.message}", bad.problem.advice
        ) from None
    stem = Path(file).name
    for index, image in enumerate(images):
        if images.dtype != np.uint8:
            image = scale_pixels(image, white)
        record: Record = {"image": Media("image", f"{stem}[{index}]", array=image)}
        if labels is not None:
            record["label"] = str(labels[index])
        on_record(index + 1, len(images))
        yield index + 1, record
