"""Reader of time series: a table of times and values becomes windows of the latest values.

A table is a time series if the header has a time, or the first column has dates under a name in
another language, and the first values of all other columns are numbers. Columns to ignore do not
count; ``--map time=COLUMN`` names the time, and ``--map value=COLUMN`` one column of many. A column
``label`` marks faults. Each line is a row: the values of that time and the values before. A network
reads the latest of these values.
:mod:`luthier.data.files.times` parses the times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from luthier.data.field_checks import DECIMAL_COMMA
from luthier.data.files.containers import TIME_COLUMNS
from luthier.data.files.parsing import Record, quote
from luthier.data.files.times import MISSING, is_date, parse_number, parse_times
from luthier.data.formats import KEYS
from luthier.data.inputs import LARGEST_VALUE, LONGEST_WINDOW, MOST_COLUMNS, Media
from luthier.errors import Location, Problem, RowRefused
from luthier.formatting import list_some, nearest_name

FIRST_LINES = 1_000
"""Lines that are searched for the first value, because a sensor may start late."""
LABEL_COLUMNS = ("label", "anomaly", "is_anomaly", "fault")
"""Names of columns that mark faults, in lower case."""
SHORTEST_WINDOW = 64
"""Values of a window in tables with many columns."""


def read_series(
    records: Iterator[tuple[int, Record]],
    file: str,
    problems: list[Problem],
    columns: Mapping[str, str],
) -> Iterator[tuple[int, Record]]:
    """Return the records of a table. Records of a time series have the latest values under
    ``window``."""
    first = next(records, None)
    if first is None:
        return iter(())
    lines = [first]
    table = chain(lines, records)
    names = [name for name in first[1] if columns.get(name) != ""]
    label = columns.get("label") or next((name for name in names if _is_label(name)), "")
    if label and label not in first[1]:
        near = nearest_name(label, names)
        fix = f"Did you mean {quote(near)}?" if near else f"Choose one of {list_some(names, 20)}."
        message = f"The column {quote(label)} is missing."
        problems.append(Problem("column.missing", message, fix, Location(file, first[0])))
        return iter(())
    names = [name for name in names if name != label]
    timed = next((key for key in TIME_COLUMNS if columns.get(key)), "timestamp")
    if columns.keys() & {timed, "value"}:
        time = columns.get(timed) or names[0]
        value = columns.get("value")
        names = [time, *([value] if value else [name for name in names if name != time])]
    elif any(source for name, source in columns.items() if name != "label"):
        return table  # another task
    if len(names) < 2 or not first[1].keys() >= {*names} or not _may_be_series(names, first[1]):
        return table
    lines += islice(records, FIRST_LINES - 1)
    numbers = [name for name in names[1:] if _has_numbers(lines, name)]
    if len(numbers) < len(names) - 1:
        return table  # text next to numbers
    if len(numbers) > MOST_COLUMNS:
        problems.append(_many_columns(numbers).at(file, 0))
        return iter(())
    return _read_windows(table, names, label, file, problems)


def _is_label(name: str) -> bool:
    return name.strip().lower() in LABEL_COLUMNS


def _may_be_series(names: Sequence[str], first: Record) -> bool:
    """Return whether a table has a time and columns that no other shape reads."""
    if {name.strip().lower() for name in names[1:]} & KEYS:
        return False
    return names[0].strip().lower() in TIME_COLUMNS or is_date(str(first[names[0]]))


def _many_columns(numbers: Sequence[str]) -> RowRefused:
    return RowRefused(
        "window.columns",
        f"The table has {len(numbers):,} columns of numbers: {list_some(map(quote, numbers), 5)}. A "
        f"series has at most {MOST_COLUMNS}.",
        f"Leave out columns, as with `data.columns.{numbers[0]}=`.",
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
    records: Iterable[tuple[int, Record]],
    names: Sequence[str],
    label: str,
    file: str,
    problems: list[Problem],
) -> Iterator[tuple[int, Record]]:
    lines, valid_records, values = list[int](), list[Record](), list[list[float]]()
    for line, record in records:
        time, cells = record[names[0]], [record[name] for name in names[1:]]
        numbers = [parse_number(cell) for cell in cells]
        if None in numbers:
            place = numbers.index(None)
            value, name = cells[place], names[place + 1]
            message = (
                f"The value of {quote(name)} at {quote(str(time))} is {quote(str(value))}, not a "
                f"finite number up to {LARGEST_VALUE:.0e}."
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
            values.append([number for number in numbers if number is not None])
    series = np.array(values, np.float64)
    longest = LONGEST_WINDOW
    if len(names) == 2:
        series = series.reshape(-1)
    else:
        # Rows on disk have the whole window: many columns have shorter windows.
        longest = max(SHORTEST_WINDOW, LONGEST_WINDOW // (len(names) - 1))
    texts = [str(record[names[0]]) for record in valid_records]
    rows = zip(lines, valid_records, texts, parse_times(texts), strict=True)
    columns = tuple(names[1:]) if len(names) > 2 else ()
    for index, (line, record, text, time) in enumerate(rows):
        latest = series[max(0, index + 1 - longest) : index + 1]
        media = Media(
            "window", f"{file}:{line}", array=latest, names=columns, time=time, time_text=text
        )
        marked = {"label": record[label]} if label else {}
        yield line, {**record, **marked, "window": media}
