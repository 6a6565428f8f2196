"""JSON objects with many rows: SQuAD's own file, splits in one file, and data frames.

:data:`NESTED` is the table of forms. To add a form, write a function that returns the rows of an
object, or ``None`` for any other object, and add the function to the table. The rows have a
:class:`~luthier.errors.RowNumber`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.data.files.parsing import Record
from luthier.data.formats import KEYS
from luthier.errors import Location, Problem, RowRefused
from luthier.formatting import list_some

Nested = dict[str, Any]
"""An object of JSON."""

_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
_LISTS = ("data", "rows", "examples", "records", "instances")
"""Keys of an object around an array of rows."""
_TEXTS = frozenset(("text", "prompt", "question", "instruction", "input", "query", "sentence1"))
"""Keys of columns if the values are arrays of texts, because a row has a single text under the key."""


def unfold(record: Record, file: str, warnings: list[Problem] | None) -> Sequence[Record] | None:
    """Return the rows of the only object of a file; ``None`` for an object that is a row.

    Raises:
        RowRefused: for splits without training rows.
    """
    rows = rows_inside(record)
    others = [name for name in _SPLITS[1:] if name in record] if rows and "train" in record else []
    if others and warnings is not None:
        message = f"The file has the splits {list_some(others, 5)}, which are not read."
        fix = f"Write each split to a file: jq -c '.{others[0]}[]' OLD > NEW.jsonl."
        warnings.append(Problem("file.splits", message, fix, Location(file)))
    return rows


def rows_inside(record: Nested) -> Sequence[Record] | None:
    """Return the rows inside of an object; ``None`` for an object that is a row."""
    return next((rows for form in NESTED if (rows := form(record)) is not None), None)


def _are_objects(value: object, at_least: int = 1) -> bool:
    if not isinstance(value, list) or len(value) < at_least:
        return False
    return all(isinstance(each, dict) for each in value)


def _squad(record: Nested) -> Sequence[Record] | None:
    """Return one row per question of SQuAD's articles."""
    articles: Any = record.get("data")
    if not _are_objects(articles):
        return None
    if not all(_are_objects(each.get("paragraphs"), at_least=0) for each in articles):
        return None
    rows: list[Record] = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            common = {
                key: each[key]
                for key, each in (("title", article), ("context", paragraph))
                if key in each
            }
            questions = paragraph.get("qas")
            if not _are_objects(questions, at_least=0):
                return None
            rows += [{"answers": [], **common, **asked} for asked in questions]
    for row in rows:
        row.pop("plausible_answers", None)  # wrong answers of SQuAD 2
    return rows


def _splits(record: Nested) -> Sequence[Record] | None:
    """Return the training rows of several splits, or the rows of a single split."""
    if not record or not record.keys() <= {*_SPLITS} or not all(map(_are_objects, record.values())):
        return None
    name = "train" if "train" in record or len(record) > 1 else next(iter(record))
    if name not in record:
        raise RowRefused(
            "file.directory",
            f"The file has the splits {' and '.join(record)}, and no training rows.",
            f"Write each split to a file: jq -c '.{next(iter(record))}[]' OLD > NEW.jsonl.",
            Location(line=1),
        )
    return [*record[name]]


def _list_of_rows(record: Nested) -> Sequence[Record] | None:
    """Return the rows of an array inside an object, such as pandas' ``orient="table"``."""
    found = [key for key in _LISTS if _are_objects(record.get(key))]
    if len(found) != 1 or not (record.keys() - {*found}).isdisjoint(KEYS):
        return None
    return [*record[found[0]]]


def _frame_by_column(record: Nested) -> Sequence[Record] | None:
    """Return the rows of ``{"text": {"0": …}, "label": {"0": …}}``, pandas' default."""
    first, *others = [*record.values()] or [None]
    if not _has_index(first) or not all(_has_index(each, first) for each in others):
        return None
    return [{name: values[at] for name, values in record.items()} for at in first]


def _frame_by_row(record: Nested) -> Sequence[Record] | None:
    """Return the rows of ``{"0": {"text": …, "label": …}}``, pandas' ``orient="index"``."""
    if not _has_index(record) or not all(isinstance(each, dict) for each in record.values()):
        return None
    return [*record.values()]


def _has_index(value: Any, like: Any = None) -> bool:
    """Return whether an object has row numbers as keys, equal to the keys of ``like``."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(map(str.isdecimal, value))
        and (like is None or value.keys() == like.keys())
    )


def _frame_with_names(record: Nested) -> Sequence[Record] | None:
    """Return the rows of ``{"columns": […], "data": [[…], …]}``, pandas' ``orient="split"``."""
    names, rows = record.get("columns"), record.get("data")
    if not isinstance(names, list) or not isinstance(rows, list):
        return None
    if not all(isinstance(each, list) and len(each) == len(names) for each in rows):
        return None
    return [dict(zip(map(str, names), each, strict=True)) for each in rows]


def _arrays(record: Nested) -> Sequence[Record] | None:
    """Return the rows of ``{"text": […], "label": […]}``, a dictionary of columns."""
    values = [*record.values()]
    texts = [each for key, each in record.items() if key in _TEXTS]
    if not texts or not all(isinstance(each, list) for each in values):
        return None
    lengths = {len(each) for each in values}
    if len(values) < 2 or len(lengths) != 1 or min(lengths) < 2:
        return None
    if not all(isinstance(text, str) for each in texts for text in each):
        return None
    return [dict(zip(record, each, strict=True)) for each in zip(*values, strict=True)]


NESTED: tuple[Callable[[Nested], Sequence[Record] | None], ...] = (
    _squad,
    _splits,
    _list_of_rows,
    _frame_with_names,
    _frame_by_row,
    _frame_by_column,
    _arrays,
)
"""Forms of nested rows."""
