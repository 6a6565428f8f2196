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
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from luthier.data.inputs import is_media
from luthier.errors import RefusedInput, location_text
from luthier.files import disk_errors, luthier_home, new_file


class Frame(Protocol):
    """A pandas or polars frame."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""


Rows = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]] | Frame
"""Rows in memory, or such rows by split."""

MOST_ROWS = 10_000_000
"""Maximum number of rows, so that an endless iterator ends."""


def is_rows(value: object) -> bool:
    """Return whether ``value`` holds rows; a list of strings holds file names."""
    if isinstance(value, list | tuple):
        return not value or isinstance(value[0], Mapping)
    # A recipe iterates over its fields.
    if isinstance(value, str | bytes | os.PathLike | Mapping | BaseModel):
        return False
    kinds = ("collect_schema", "to_pylist")  # a lazy frame of polars, a table of pyarrow
    return isinstance(value, Iterable) or any(hasattr(value, name) for name in kinds)


def is_splits(value: object) -> bool:
    """Return whether ``value`` maps names of splits to rows, as ``datasets.DatasetDict`` does."""
    return isinstance(value, Mapping) and bool(value) and all(map(is_rows, value.values()))


def store_rows(rows: Any, key: str = "text", name: Literal["rows", "documents"] = "rows") -> Path:
    """Write rows as JSON Lines to LUTHIER_HOME, and return the file.

    A text instead of a row becomes a row with ``key``. Missing values are omitted. Findings name
    rows of ``documents`` by the value of ``source``.

    Raises:
        RefusedInput: for no rows, too many rows, or a value that JSON does not have.
    """
    folder = luthier_home() / "rows"
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
    for method in ("to_list", "tolist"):
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
    features = getattr(data, "features", None)
    names = {
        name: kind.names
        for name, kind in (features.items() if isinstance(features, Mapping) else ())
        if hasattr(kind, "int2str")
    }
    return (_with_class_names(row, names) for row in data) if names else iter(data)


def _with_class_names(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Replace the class numbers of a ``datasets.Dataset``; -1 is a missing class."""

    def name_of(key: str, value: Any) -> Any:
        if not isinstance(value, int) or key not in names:
            return value
        return names[key][value] if value >= 0 else None

    return {key: name_of(key, value) for key, value in row.items()}


def _line(row: Any, number: int, key: str) -> bytes:
    where = location_text("rows-0000000000000000.jsonl", number)
    if isinstance(row, str):
        row = {key: row}
    if not isinstance(row, Mapping):
        raise RefusedInput(
            f"{where}: a row is a dictionary such as {{'text': …, 'label': …}}, not "
            f"{type(row).__name__}"
        )
    plain = {str(name): _plain(value, where, str(name)) for name, value in row.items()}
    kept = {name: _media_path(value) for name, value in plain.items() if value is not None}
    return (json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _media_path(value: Any) -> Any:
    """Return the absolute path of an image or audio file: the rows are stored in another folder."""
    is_path = isinstance(value, str) and is_media(value) and Path(value).is_file()
    return str(Path(value).absolute()) if is_path else value


def _plain(value: Any, *place: str) -> Any:
    """Return a value for JSON; ``None`` for a missing value such as NaN."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if value == value else None
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas
        return None
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
