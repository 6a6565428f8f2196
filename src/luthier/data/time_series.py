"""Time series as rows: a table of times and one number each, read as windows of the latest values.

A table is a time series when it has two columns, the first is called as one of :data:`TIME_COLUMNS`,
the second as nothing that rows of another kind have, and the first line has a number there. Each line
is a row: the value of that time and those before it. A network decides how many of them it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from luthier.data.forms import KEYS
from luthier.data.media import LONGEST_WINDOW, Media
from luthier.data.parsing import Record, quote
from luthier.errors import Problem

TIME_COLUMNS = ("timestamp", "time", "date", "datetime", "ds")
MOST_VALUES = 20_000_000
"""Of one series; they are held in memory."""


def read_series(
    records: Iterator[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    """The records of a table; those of a time series with the latest values as ``window``."""
    first = next(records, None)
    if first is None:
        return iter(())
    whole = chain([first], records)
    return _read_windows(whole, file, problems) if _is_time_series(first[1]) else whole


def _is_time_series(record: Record) -> bool:
    if len(record) != 2:
        return False
    (time, _), (name, value) = record.items()
    named = time.lower() in TIME_COLUMNS and name.lower() not in KEYS
    return named and _number(value) is not None


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_windows(
    records: Iterable[tuple[int, Record]], file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    lines, read, values = list[int](), list[Record](), list[float]()
    for line, record in records:
        time, value = record.values()
        if (number := _number(value)) is None:
            message = (
                f"The value of {quote(str(time))} is {quote(str(value))} and no finite number."
            )
            fix = "Fill in what was measured, or an estimate of it: a series has no gaps."
            problems.append(Problem(file, line, "window.value", message, fix))
        elif len(values) >= MOST_VALUES:
            message = f"The series has more than {MOST_VALUES:,} values."
            problems.append(Problem(file, line, "window.long", message, "Split the file."))
            return
        else:
            lines.append(line)
            read.append(record)
            values.append(number)
    series_T = np.array(values, np.float32)
    for index, (line, record) in enumerate(zip(lines, read, strict=True)):
        latest = series_T[max(0, index + 1 - LONGEST_WINDOW) : index + 1]
        name = f"{file}:{line}"
        yield line, {**record, "window": Media("window", name, array=latest)}
