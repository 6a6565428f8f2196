"""Resolution of a source (file, folder, pattern, address) to local files.

A folder stands for the data files inside at any depth, ordered by name. Hidden files and known
clutter are ignored (:func:`is_clutter`). A folder with additional files is rejected: rows next to
plain text, or training next to test files. A pattern selects files in such a folder. Media files
and archives next to rows are inputs of the rows. A folder of media files alone is one source
(:mod:`luthier.media.files`), and so is a folder with e-mail (:mod:`luthier.data.files.mail`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

from luthier.data.disk_sequence import spool
from luthier.data.files.containers import (
    DATA_ENDINGS,
    JSON_LINES,
    PACKED,
    PLAIN_TEXT,
    TABLES,
    unpacked_name,
)
from luthier.data.files.mail import has_mail
from luthier.data.inputs import conversion_fix, is_media
from luthier.errors import DataError, Location, Problem
from luthier.files import names_below, sha256_of
from luthier.formatting import list_some

Source = str | Path
Entry = TypeVar("Entry")

_SHOWN = 8
ARCHIVES = (".zip", ".npz")
"""File endings of media next to rows; the rows name the media."""
TABLE_ENDINGS = (*JSON_LINES, *TABLES, ".parquet")
SPLIT_NAME = re.compile(
    r"(?:^|[^a-z])(train|valid|validation|val|dev|test|eval|held-?out)"
    r"(?:ing(?=[./]|$)|[^a-z]|$)",  # "training" is a split, "training_notes" is a topic
    re.I,
)
"""Split names in file and folder names."""
_CLUTTER = re.compile(
    r"""(?:^|/)(?:
        \.(?!\.?/)                                # hidden, but not the parts "." and ".." of a path
      | (?:__MACOSX|__pycache__|_delta_log|_temporary)/
      | (?: thumbs\.db | desktop\.ini
          | _success | _(?:common_)?metadata | _(?:started|committed)_\d+             # Spark
          | dataset_infos?\.json | dataset_dict\.json | state\.json                  # Hugging Face
          | [^/]*\.changes\.jsonl                                                   # luthier clean
          | (?:readme|licen[cs]e|notice|changelog|citation)
            (?:\.[a-z]{2}|-[\w-]+)?(?:\.(?:md|txt|rst|html?|bib|cff))?
        )$
    )""",
    re.I | re.X,
)


def files_of(source: Source) -> list[Path]:
    """Return the files of ``source`` in order; ``s3://`` objects are downloaded once.

    Raises:
        DataError: if no file or not only data files match. The path of a single file is never
            rejected.
    """
    text = str(source)
    # Path() turns s3:// into s3:/ .
    if re.match(r"s3:/+", text):
        from luthier.data.files.s3 import fetch

        return fetch(re.sub(r"^s3:/+", "s3://", text))
    if re.match(r"file:/", text):
        text = _local(text)
    path = Path(text)
    if "\0" in text:
        return [path]  # the reader reports the error
    if path.is_dir():
        return _folder(path)
    if path.exists() or path.is_symlink() or not has_magic(text):
        return [path]
    matches = sorted(Path(each) for each in glob(text, recursive=True))
    files = [each for each in matches if each.is_file()]
    if not files:
        what = "only folders" if matches else "nothing"
        fix = "Check the pattern, and quote it in a shell."
        raise source_error(text, "file.no_match", f"The pattern matches {what}.", fix)
    return files


def hash_of(source: Source) -> str:
    """Return the SHA-256 of one file, or of the hashes of several files in order."""
    hashes = [sha256_of(path) for path in files_of(source)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def stem_of(source: Source) -> str:
    """Return a name for a source, without endings; for a pattern, the last part without wildcards."""
    parts = [part for part in re.split(r"[/\\]+", str(source)) if part not in ("", ".", "..")]
    for part in reversed(parts):
        name = part if has_magic(part) else _without_endings(part)
        if not has_magic(name) and name:
            return name
    return "data"


def absolute(source: str) -> str:
    """Return the source as an absolute path; addresses stay unchanged."""
    return source if is_address(source) else str(Path(source).absolute())


def is_address(source: str) -> bool:
    """Return whether a source is an address instead of a path."""
    # Path() turns s3:// into s3:/ .
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", source) is not None


def is_data(name: str) -> bool:
    """Return whether a file is data, by its ending."""
    return name.lower().endswith(_ENDINGS)


_ENDINGS = tuple(f"{ending}{packed}" for ending in DATA_ENDINGS for packed in ("", *PACKED))
_ENDINGS_LONGEST = tuple(sorted(_ENDINGS, key=len, reverse=True))


def _without_endings(name: str) -> str:
    for ending in _ENDINGS_LONGEST:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _local(address: str) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        message = "A file:// address must be an absolute path on this machine."
        raise source_error(
            address, "file.remote", message, "Write file:///folder/rows.jsonl, or the path."
        )
    return unquote(parts.path)


def _folder(folder: Path) -> list[Path]:
    if has_mail(folder):
        return [folder]
    media, classes = 0, set[str]()
    others: list[tuple[str, Path]] = []
    for name in names_below(folder):
        if is_clutter(name):
            continue
        if is_media(name):
            media += 1
            classes.update(name.split("/")[:-1][:1])
        else:
            others.append((name, folder / name))
    rows = any(is_data(name) and not _is_text(name) for name, _ in others)
    if not media or rows:
        return [path for _, path in choose_data_files(others, str(folder))]
    if others:
        message, fix = other_files_problem(media, [name for name, _ in others])
        raise source_error(str(folder), "file.directory", message, fix)
    if are_splits(classes):
        message = (
            f"The folder has the splits {', '.join(sorted(classes))}, which must not be mixed."
        )
        fix = f"Name one split, as {folder / min(classes)}, and the other as validation data."
        raise source_error(str(folder), "file.directory", message, fix)
    return [folder]


def choose_data_files(
    candidates: Iterable[tuple[str, Entry]], where: str
) -> list[tuple[str, Entry]]:
    """Return the data files of a folder or prefix, without clutter: relative names and entries.

    Raises:
        DataError: if no data file exists, or files of several kinds.
    """
    files = [(name, path) for name, path in candidates if not is_clutter(name)]
    if any(unpacked_name(name).endswith(TABLE_ENDINGS) for name, _ in files):
        files = [(name, path) for name, path in files if not name.lower().endswith(ARCHIVES)]
    data = [(name, path) for name, path in files if is_data(name)]
    if not data:
        others = list_some((name for name, _ in files), _SHOWN)
        message = f"The folder has no data file{f', only {others}' if files else ''}."
        fix = conversion_fix(name for name, _ in files) or (
            "Name a file, or a folder with images, audio or files that end with "
            f"{', '.join(DATA_ENDINGS)}."
        )
        raise source_error(where, "file.directory", message, fix)
    if len(data) < len(files):
        others = list_some((name for name, _ in files if not is_data(name)), _SHOWN)
        message = f"The folder has {len(data)} data files and {others}."
        raise source_error(where, "file.directory", message, _pattern(where, data[0][0]))
    texts = [name for name, _ in data if _is_text(name)]
    if 0 < len(texts) < len(data):
        message = f"The folder has rows and plain text ({list_some(texts, _SHOWN)})."
        rows = next(name for name, _ in data if not _is_text(name))
        raise source_error(where, "file.directory", message, _pattern(where, rows))
    splits = {split_of(name) for name, _ in data}
    if len(splits) > 1:
        names = list_some((name for name, _ in data), _SHOWN)
        message = f"The folder has the splits {' and '.join(sorted(splits))} ({names})."
        fix = (
            "Name one split to train on, and the other as validation data, "
            "or rename files that are no splits."
        )
        raise source_error(where, "file.directory", message, fix)
    return data


def split_of(name: str) -> Literal["train", "validation", "test"]:
    """Return the split in a name: train (also without a split word), validation or test."""
    match = SPLIT_NAME.search(name)
    word = match[1].lower() if match else "train"
    return "train" if word == "train" else "test" if word == "test" else "validation"


def _is_text(name: str) -> bool:
    return unpacked_name(name).endswith(PLAIN_TEXT)


def _pattern(where: str, example: str) -> str:
    ending = next(each for each in _ENDINGS_LONGEST if example.lower().endswith(each))
    pattern = f"{where.rstrip('/')}/*{ending}"
    return f"Select files with a pattern, as '{pattern}', or move the other files."


def source_error(source: str, rule: str, message: str, fix: str) -> DataError:
    """The refusal of a source as a whole."""
    return DataError([Problem(rule, message, fix, Location(source))])


def is_clutter(name: str) -> bool:
    """Return whether the file at a relative path is ignored: hidden, or written by a known program."""
    return _CLUTTER.search(name) is not None


def other_files_problem(count: int, others: Sequence[str]) -> tuple[str, str]:
    """Return message and fix for non-media files next to ``count`` media files."""
    kinds = Counter(PurePosixPath(name.lower()).suffix or "no ending" for name in others)
    counts = list_some((f"{times:,} {kind}" for kind, times in kinds.most_common()), _SHOWN)
    message = (
        f"Next to {count:,} images or audio files are other files ({counts}): "
        f"{list_some(others, _SHOWN)}."
    )
    fix = (
        "Move the other files away, or name a table of rows with the paths of the images or audio."
    )
    return message, f"{conversion_fix(others)} {fix}".strip()


def are_splits(folders: Collection[str]) -> bool:
    """Return whether folders of media files are splits instead of classes."""
    return bool(folders) and all(SPLIT_NAME.fullmatch(name) for name in folders)


def media_below(folder: Path) -> Sequence[str]:
    """Return the names of all media files below ``folder`` in order, without clutter."""
    return spool(name for name in names_below(folder) if is_media(name) and not is_clutter(name))
