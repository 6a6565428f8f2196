"""Rows of data, to browse and search."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import Query
from pydantic import Field

from luthier.data.files.read import find_container, read_records
from luthier.data.rows import Checker
from luthier.errors import Problem
from luthier.gate.checks.balance import labels_of
from luthier.server.http.messages import Fault
from luthier.server.native.operations import (
    Input,
    NativeCall,
    View,
    limit_concurrency,
    native_router,
)

router = native_router()
MOST_BYTES = 32 << 20
"""Maximum size of the part of a file that is read, in bytes."""
MOST_ROWS = 50_000
"""Maximum number of rows that are read."""
MOST_LABELS = 500
"""Maximum number of listed labels."""
MOST_VALUES, LONGEST_VALUE, ROWS_PER_VALUE = 20, 100, 3
"""Maximum number and length of the values of a field that divides the rows, and minimum mean number
of rows with a value."""
AT_ONCE = 2
"""Maximum number of concurrent readings of data."""
_free = threading.BoundedSemaphore(AT_ONCE)


class RowsPage(Input):
    """Data, filter and page."""

    address: str = Field(max_length=2048)
    """Address of a file. An address that ends with ``/`` names its first file."""
    search: str = Field(default="", max_length=1000)
    """Text within the row, in any letter case."""
    label: str | None = Field(default=None, max_length=1000)
    slice: str = Field(default="", max_length=2000)
    """``FIELD=VALUE`` of ``slices``."""
    lines: str = Field(default="", pattern=r"^(\d+(,\d+)*)?$", max_length=10_000)
    """Only these line or row numbers, separated by commas."""
    limit: int = Field(default=20, ge=1, le=1000)
    position: int = Field(default=0, ge=0, le=2**62)
    """``next`` of the previous page."""


class RowView(View):
    """A row as written in the file."""

    line: int
    """Line, or row number in a file whose rows are no lines."""
    record: dict[str, Any]
    labels: list[str]
    """Labels or names of tags."""


class LabelCount(View):
    """A label and its number of rows."""

    label: str
    rows: int


class RowsView(View):
    """Rows in the order of the file."""

    rows: list[RowView]
    found: int
    """Number of rows that match the filter."""
    total: int
    """Number of rows that were read."""
    is_complete: bool
    """False if the file has more rows than are read."""
    form: str | None = None
    """Form of the rows; missing if unknown."""
    labels: list[LabelCount]
    """Most frequent labels of all rows."""
    slices: list[str]
    """``FIELD=VALUE`` of fields with few values, other than the label."""
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


@router.get("/rows")
def list_rows(call: NativeCall, page: Annotated[RowsPage, Query()]) -> RowsView:
    """Return rows of a file that match a text, a label or line numbers."""
    busy = f"The server already reads {AT_ONCE} files. Try again in a few seconds."
    wanted = page.search.casefold()
    lines = {int(each) for each in page.lines.split(",") if each}
    with limit_concurrency(_free, busy, 2), TemporaryDirectory(prefix="luthier-rows-") as folder:
        _, path = call.context.locations.peek(
            call.account, page.address, Path(folder), MOST_BYTES + 1
        )
        reading = _Reading(path)
        counts: Counter[str] = Counter()
        values: defaultdict[str, set[str]] = defaultdict(set)
        shown: list[RowView] = []
        found = 0
        for line, record, labels in reading:
            counts.update({*labels})
            parts = {name: str(value) for name, value in record.items() if _is_short(value)}
            for name, value in parts.items():
                if len(values[name]) <= MOST_VALUES:
                    values[name].add(value)
            if lines and line not in lines:
                continue
            if page.label is not None and page.label not in labels:
                continue
            if page.slice and page.slice not in (f"{name}={parts[name]}" for name in parts):
                continue
            if wanted and wanted not in _text(record).casefold():
                continue
            found += 1
            if page.position < found <= page.position + page.limit:
                shown.append(RowView(line=line, record=_as_json(record), labels=labels))
    end = page.position + page.limit
    return RowsView(
        rows=shown,
        found=found,
        total=reading.count,
        is_complete=reading.is_complete,
        form=reading.form,
        labels=[LabelCount(label=name, rows=n) for name, n in counts.most_common(MOST_LABELS)],
        slices=[
            f"{name}={value}"
            for name, known in values.items()
            if 1 < len(known) <= min(MOST_VALUES, reading.count // ROWS_PER_VALUE)
            and known.isdisjoint(counts)
            for value in sorted(known)
        ],
        next=end if end < found else None,
    )


@dataclass
class _Reading:
    """Iterator over the first rows of a file: line, record and labels."""

    path: Path
    count: int = 0
    is_complete: bool = True
    form: str | None = None

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
        is_cut = self.path.stat().st_size > MOST_BYTES
        problems: list[Problem] = []
        container = find_container(self.path, problems)
        if container is None:
            raise Fault("Validation", problems[0].text)
        if is_cut and (container.packing or container.kind != "jsonl"):
            raise Fault("Validation", "Only rows of files up to 32 MB or JSON Lines are shown.")
        checker = Checker(str(self.path), [])
        for line, record in read_records(self.path, [], whole=False):
            if self.count == MOST_ROWS:
                is_cut = True
                break
            self.count += 1
            row = checker.row(line, record)
            checker.problems.clear()
            yield line, record, [] if row is None else [str(each) for each in labels_of(row)]
        self.is_complete = not is_cut
        self.form = checker.form_name


def _is_short(value: Any) -> bool:
    """Return True for a value that may divide the rows, such as a language."""
    return isinstance(value, str | bool | int) and len(str(value)) <= LONGEST_VALUE


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)


def _as_json(record: dict[str, Any]) -> Any:
    """Return a record with texts for values that JSON does not have, such as dates and NaN."""
    return json.loads(_text(record), parse_constant=str)
