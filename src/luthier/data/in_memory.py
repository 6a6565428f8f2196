"""Rows in memory as data files: lists of dictionaries, data frames, data sets and iterators.

Methods identify the kind of a frame, so pandas, polars, pyarrow and datasets are not imported. A
file is named after the hash of its content: the same rows are stored once, and a run can resume.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from luthier.data.inputs import is_media, media_kind
from luthier.errors import DataError, Location, Problem, RefusedInput, location_text
from luthier.files import disk_errors, luthier_home, new_file


class Frame(Protocol):
    """A pandas or polars frame."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""


Rows = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Any]] | Frame
"""Rows in memory, such rows by split, or columns by name."""

_TO_LIST = ("to_list", "tolist")
"""Methods of arrays and series."""
ROWS_FIX = 'Give a list of dictionaries, such as [{"text": "...", "label": "..."}], or a frame.'
"""Fix for other values than rows."""
MOST_ROWS = 10_000_000
"""Maximum number of rows, so that an endless iterator ends."""


def is_rows(value: object) -> bool:
    """Return whether ``value`` holds rows or columns; a list of strings holds file names.

    Other lists count as rows, so that :func:`store_rows` reports a value that is no row.
    """
    if isinstance(value, list | tuple):
        return not value or not isinstance(value[0], str | os.PathLike)
    # A recipe iterates over its fields.
    if isinstance(value, str | bytes | os.PathLike | Mapping | BaseModel):
        return is_columns(value)
    kinds = ("collect_schema", "to_pylist")  # a lazy frame of polars, a table of pyarrow
    return isinstance(value, Iterable) or any(hasattr(value, name) for name in kinds)


def is_splits(value: object) -> bool:
    """Return whether ``value`` maps names of splits to rows, as ``datasets.DatasetDict`` does."""
    if not isinstance(value, Mapping) or not value or is_columns(value):
        return False
    return all(map(is_rows, value.values()))


def is_columns(value: object) -> bool:
    """Return whether ``value`` maps names to columns: lists, arrays or series.

    Lists of rows alone are splits.
    """
    if not isinstance(value, Mapping) or not value or not all(map(_is_listed, value.values())):
        return False
    return not all(isinstance(next(iter(each), None), Mapping) for each in value.values())


def _is_listed(value: Any) -> bool:
    is_array = hasattr(value, "__len__") and any(hasattr(value, each) for each in _TO_LIST)
    return is_array or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def is_missing(value: object) -> bool:
    """Return whether a value is ``None``, NaN, or a missing value of pandas."""
    if isinstance(value, numbers.Real):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def wrong_value(value: object, noun: str, file: str, line: int) -> Problem:
    """Return the problem of a value that must be ``noun``, such as ``a text``."""
    name = type(value).__name__
    fix = "Give a list of texts." if noun == "a text" else ROWS_FIX
    rule, what = "field.type", f"of type {name}"
    if is_missing(value):
        rule, what = "field.missing", "missing (NaN)"
        fix = "Fill in the value, or remove the row: `dropna()`."
    elif isinstance(value, numbers.Number):
        what, fix = f"a number ({name})", "Convert the numbers to text: `astype(str)`."
    return Problem(rule, f"the value is {what}, not {noun}.", fix, Location(file, line))


def texts_of(values: Any, name: str) -> list[str]:
    """Return the texts of a list, an array or a series in the argument ``name``.

    Raises:
        DataError: with each value that is no text.
    """
    texts = list(values_of(values))
    problems = [
        wrong_value(each, "a text", f"{name}[]", line)
        for line, each in enumerate(texts, 1)
        if not isinstance(each, str)
    ]
    if problems:
        raise DataError(problems)
    return texts


def stored_rows() -> Path:
    """Return the folder of rows in memory that became files."""
    return (luthier_home() / "rows").resolve()


def store_rows(rows: Any, key: str = "text", name: str = "rows") -> Path:
    """Write rows as JSON Lines to LUTHIER_HOME, and return the file.

    A text instead of a row becomes a row with ``key``, or an image or audio row if it is the path of
    such a file. Missing values are omitted. Findings name
    rows as in ``rows[3]``, and ``documents`` by the value of ``source``.

    Raises:
        RefusedInput: for no rows, too many rows, or a value that JSON does not have.
    """
    folder = stored_rows()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            digest, count = hashlib.sha256(), 0
            for count, row in enumerate(islice(_records(rows), MOST_ROWS + 1), 1):
                line = _line(row, count, key)
                digest.update(line)
                file.write(line)
            if not count:
                raise RefusedInput("the data has no rows")
            if count > MOST_ROWS:
                raise RefusedInput(
                    f"the data has more than {MOST_ROWS:,} rows. Limit an iterator with "
                    "itertools.islice(rows, number), or write the rows to a file"
                )
            path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
            if not path.exists():
                file.seek(0)
                with new_file(path) as target:
                    shutil.copyfileobj(file, target)
    return path


def values_of(data: Any) -> Any:
    """Return a frame as a list of rows, and an array or series as a list; others unchanged."""
    if hasattr(data, "columns") or hasattr(data, "to_pylist"):
        return [_plain(row, "rows") for row in _records(data)]
    for method in _TO_LIST:
        if hasattr(data, method):
            return getattr(data, method)()
    return data


def _records(data: Any) -> Iterator[Any]:
    if hasattr(data, "collect_schema") and hasattr(data, "collect"):  # a lazy frame of polars
        data = data.collect()
    if hasattr(data, "iter_rows") and hasattr(data, "columns"):  # polars
        return iter(data.iter_rows(named=True))
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # pandas
        return iter(data.to_dict("records"))
    if hasattr(data, "to_pylist"):  # pyarrow
        return iter(data.to_pylist())
    if is_columns(data):
        return _rows_of_columns(data)
    features = getattr(data, "features", None)
    names = {
        name: kind.names
        for name, kind in (features.items() if isinstance(features, Mapping) else ())
        if hasattr(kind, "int2str")
    }
    return (_with_class_names(row, names) for row in data) if names else iter(data)


def _rows_of_columns(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len({*lengths.values()}) > 1:
        counts = ", ".join(f'"{name}" has {count:,}' for name, count in lengths.items())
        raise RefusedInput(f"the columns have different numbers of values: {counts}")
    values = (values_of(column) for column in columns.values())
    return (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def _with_class_names(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Replace the class numbers of a ``datasets.Dataset``; -1 is a missing class."""

    def name_of(key: str, value: Any) -> Any:
        if not isinstance(value, int) or key not in names:
            return value
        return names[key][value] if value >= 0 else None

    return {key: name_of(key, value) for key, value in row.items()}


def _line(row: Any, number: int, key: str) -> bytes:
    where = location_text("rows[]", number)
    if isinstance(row, str):
        row = {media_kind(row) if _is_media_path(row) else key: row}
    if not isinstance(row, Mapping):
        raise DataError([wrong_value(row, "a text or a dictionary", "rows[]", number)])
    plain = {str(name): _plain(value, where, str(name)) for name, value in row.items()}
    kept = {name: _media_path(value) for name, value in plain.items() if value is not None}
    return (json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _media_path(value: Any) -> Any:
    """Return the absolute path of an image or audio file: the rows are stored in another folder."""
    return str(Path(value).absolute()) if _is_media_path(value) else value


def _is_media_path(value: Any) -> bool:
    return isinstance(value, str) and is_media(value) and Path(value).is_file()


def _plain(value: Any, *place: str) -> Any:
    """Return a value for JSON; ``None`` for a missing value such as NaN."""
    if isinstance(value, str | bool | int):
        return value
    if is_missing(value):
        return None
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each, *place) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, *place) for each in value]
    for method in ("tolist", "to_list", "isoformat", "__fspath__"):
        if hasattr(value, method):
            return _plain(getattr(value, method)(), *place)
    if isinstance(value, numbers.Number):
        return float(value)  # type: ignore[arg-type]
    raise RefusedInput(
        f"{': '.join(place)}: a value of type {type(value).__name__} cannot be stored. Use text, "
        "numbers, lists, or the path of an image or audio file"
    )
