"""Reader of time series: a table of times and values becomes windows of the latest values.

A table is a time series if the header has a time and a value
(:func:`~luthier.data.containers.is_series_header`) and the first value is a number. Each line is a
row: the value of that time and the values before. A network reads the latest of these values.
:mod:`luthier.media.series_times` parses the times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from luthier.data.containers import TIME_COLUMNS, is_series_header
from luthier.data.field_checks import DECIMAL_COMMA
from luthier.data.formats import KEYS
from luthier.data.inputs import LARGEST_VALUE, LONGEST_WINDOW, Media
from luthier.data.parsing import Record, quote
from luthier.errors import Location, Problem, RowRefused
from luthier.formatting import list_some
from luthier.media.series_times import parse_number, parse_times

FIRST_LINES = 1_000
"""Lines that are searched for the first value, because a sensor may start late."""
MISSING = ("", "nan", "na", "n/a", "null", "none", "-")
"""Spellings of a missing value in tables."""


def read_series(
    records: Iterator[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    """Return the records of a table. Records of a time series have the latest values under
    ``window``."""
    first = next(records, None)
    if first is None:
        return iter(())
    names = [*first[1]]
    is_series = is_series_header(names)
    if not is_series and not _is_wide(names):
        return chain([first], records)
    lines = [first, *islice(records, FIRST_LINES - 1)]
    numbers = [name for name in names[1:] if _has_numbers(lines, name)]
    if is_series and numbers:
        return _read_windows(chain(lines, records), file, problems)
    if len(numbers) > 1:
        problems.append(_several_columns(names, numbers).at(file, 0))
        return iter(())
    return chain(lines, records)


def _is_wide(names: Sequence[str]) -> bool:
    """Return whether a table has a time and several columns that no other shape reads."""
    known = {name.strip().lower() for name in names[1:]} & KEYS
    return len(names) > 2 and names[0].strip().lower() in TIME_COLUMNS and not known


def _several_columns(names: Sequence[str], numbers: Sequence[str]) -> RowRefused:
    place = names.index(numbers[0]) + 1
    return RowRefused(
        "window.columns",
        f"The table has {len(numbers):,} columns of numbers: {list_some(map(quote, numbers), 5)}. A "
        "series has a time and one value.",
        f"Write a file for each column, as with: cut -d, -f1,{place} OLD > NEW.csv.",
    )


def _has_numbers(lines: Iterable[tuple[int, Record]], name: str) -> bool:
    """Return whether the first non-missing value of a column is a number."""
    values = (str(record[name]).strip() for _, record in lines)
    value = next((value for value in values if value.lower() not in MISSING), "")
    try:
        float(value.replace(",", "."))  # the check of the line names infinity and decimal commas
    except ValueError:
        return False
    return True


def _read_windows(
    records: Iterable[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    lines, valid_records, values = list[int](), list[Record](), list[float]()
    for line, record in records:
        time, value = record.values()
        if (number := parse_number(value)) is None:
            message = (
                f"The value of {quote(str(time))} is {quote(str(value))}, not a finite number up to "
                f"{LARGEST_VALUE:.0e}."
            )
            fix = "Write the measured value or an estimate: a series has no gaps."
            if DECIMAL_COMMA.fullmatch(str(value).strip()):
                fix = f"Write a decimal point: {str(value).strip().replace(',', '.')}."
            problems.append(Problem("window.value", message, fix, Location(file, line)))
        elif str(time).strip().lower() in MISSING:
            message = f"The time is missing: {quote(str(time))}."
            fix = "Write the time of the value, as in 2026-11-23 14:05, or remove the line."
            problems.append(Problem("window.time", message, fix, Location(file, line)))
        else:
            lines.append(line)
            valid_records.append(record)
            values.append(number)
    series_T = np.array(values, np.float64)
    times = parse_times([str(next(iter(record.values()))) for record in valid_records])
    rows = zip(lines, valid_records, times, strict=True)
    for index, (line, record, time) in enumerate(rows):
        latest = series_T[max(0, index + 1 - LONGEST_WINDOW) : index + 1]
        media = Media("window", f"{file}:{line}", array=latest, time=time)
        yield line, {**record, "window": media}
