"""Reader of time series: a table of times and values becomes windows of the latest values.

A table is a time series if the header has a time and a value
(:func:`~luthier.data.containers.is_series_header`) and the first value is a number. Each line is a
row: the value of that time and the values before. A network reads the latest of these values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain, islice

import numpy as np

from luthier.data.containers import is_series_header
from luthier.data.inputs import LARGEST_VALUE, LONGEST_WINDOW, Media
from luthier.data.parsing import Record, quote
from luthier.errors import Location, Problem

FIRST_LINES = 1_000
"""Lines that are searched for the first value, because a sensor may start late."""
MISSING = ("", "nan", "na", "n/a", "null", "none", "-")
"""Spellings of a missing value in tables."""
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
"""ASCII numbers. Python also parses ``1_000`` and digits of other scripts."""
_SHORT_DAY = re.compile(r"((?:19|20)\d\d)(\d\d)(\d\d)", re.ASCII)
"""Days without separators, such as ``20261123``."""


def read_series(
    records: Iterator[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    """Return the records of a table. Records of a time series have the latest values under
    ``window``."""
    first = next(records, None)
    if first is None:
        return iter(())
    if not is_series_header([*first[1]]):
        return chain([first], records)
    lines = [first, *islice(records, FIRST_LINES - 1)]
    whole = chain(lines, records)
    return _read_windows(whole, file, problems) if _has_numbers(lines) else whole


def _has_numbers(lines: Iterable[tuple[int, Record]]) -> bool:
    """Return whether the first non-missing value is a number."""
    values = (str([*record.values()][1]) for _, record in lines)
    value = next((value for value in values if value.strip().lower() not in MISSING), "")
    try:
        float(value)
    except ValueError:
        return False
    return True


def _number(value: object) -> float | None:
    if not _NUMBER.fullmatch(str(value)):
        return None
    number = float(str(value))
    return number if abs(number) <= LARGEST_VALUE else None


def _seconds(time: object) -> float | None:
    """Return an ISO 8601 time or a number in seconds; ``None`` for ambiguous orders of day and
    month."""
    text = str(time).strip()
    number = _number(text)
    if number is not None and not _SHORT_DAY.fullmatch(text):
        return number
    try:
        moment = datetime.fromisoformat(text)
        # UTC: the local zone may have daylight saving time.
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return number


def _read_windows(
    records: Iterable[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    lines, valid_records, values = list[int](), list[Record](), list[float]()
    for line, record in records:
        time, value = record.values()
        if (number := _number(value)) is None:
            message = (
                f"The value of {quote(str(time))} is {quote(str(value))}, not a finite number up to "
                f"{LARGEST_VALUE:.0e}."
            )
            fix = "Write the measured value or an estimate: a series has no gaps."
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
    for index, (line, record) in enumerate(zip(lines, valid_records, strict=True)):
        latest = series_T[max(0, index + 1 - LONGEST_WINDOW) : index + 1]
        name, time = f"{file}:{line}", _seconds(next(iter(record.values())))
        yield line, {**record, "window": Media("window", name, array=latest, time=time)}
