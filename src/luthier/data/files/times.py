"""Times of tables: ISO 8601, counters, Excel, and exports of European and American programs.

In ``01/02/2026``, the whole column decides which number is the day: a number above 12 is a day, and
otherwise only one order gives regular steps. Serial dates of Excel are counters of days.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise, product
from statistics import median

import numpy as np

from luthier.data.field_checks import DECIMAL_COMMA
from luthier.data.inputs import LARGEST_VALUE

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
"""ASCII numbers. Python also parses ``1_000`` and digits of other scripts."""
MISSING = ("", "nan", "na", "n/a", "null", "none", "-")
"""Spellings of a missing value in tables, in lower case."""
_SHORT_DAY = re.compile(r"((?:19|20)\d\d)(\d\d)(\d\d)", re.ASCII)
"""Days without separators, such as ``20261123``."""
_YEAR_LAST = re.compile(r"(\d{1,2})([./-])(\d{1,2})\2(\d{4}|\d\d)\b(.*)", re.ASCII | re.DOTALL)
_YEAR_FIRST = re.compile(r"(\d{4})[./-](\d{1,2})[./-](\d{1,2})\b(.*)", re.ASCII | re.DOTALL)
_MONTH = re.compile(r"(\d{4})[/-](\d{1,2})|(\d{1,2})[/-](\d{4})", re.ASCII)
_CLOCK = re.compile(
    r"[\sT,]*(\d{1,2})[:.](\d\d)(?:[:.](\d\d)(?:[.,]\d+)?)?\s*(?:([ap])\.?m\.?)?",
    re.ASCII | re.IGNORECASE,
)
_NAMED_MONTHS = [
    f"{day}{clock}"
    for day, clock in product(
        ("%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"),
        ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p"),
    )
]
_CENTURY = 70
"""Years of two digits from here on are years of the 20th century."""
_CLEAR = 3.0
"""Ratio between the irregularities of two orders that decides for the more regular order."""


def parse_number(value: object) -> float | None:
    """Return a finite number up to :data:`LARGEST_VALUE`; ``None`` for other text."""
    if not _NUMBER.fullmatch(str(value)):
        return None
    number = float(str(value))
    return number if abs(number) <= LARGEST_VALUE else None


def parse_times(texts: Sequence[str]) -> list[float]:
    """Return the times of a column in seconds, or in the unit of a counter.

    A time is NaN if its form is unknown. All times are NaN if the order of day and month is unclear.
    """
    texts = [text.strip() for text in texts]
    dates = [_YEAR_LAST.fullmatch(text) for text in texts]
    if not any(dates):
        return [parse_time(text) for text in texts]
    day_first, month_first = (
        [math.nan if date is None else _moment(date, order) for date in dates]
        for order in ((3, 2, 0), (3, 0, 2))
    )
    known = [date for date in dates if date is not None]
    if any(date[2] == "." or int(date[1]) > 12 for date in known):
        return day_first
    if any(int(date[3]) > 12 for date in known) or day_first == month_first:
        return month_first
    if np.array_equal(np.diff(day_first), np.diff(month_first)):
        return day_first  # all lines of one day: the order of day and month changes no step
    one, other = _irregularity(day_first), _irregularity(month_first)
    if max(one, other) < _CLEAR * min(one, other):
        return [math.nan] * len(texts)
    return day_first if one < other else month_first


def _irregularity(times: Sequence[float]) -> float:
    """Return the largest step of time relative to the median step; 1 for fewer than two steps."""
    steps = [abs(after - before) for before, after in pairwise(times) if after != before]
    steps = [step for step in steps if math.isfinite(step)]
    return max(steps) / median(steps) if len(steps) > 1 else 1.0


def is_date(text: str) -> bool:
    """Return whether a text is a date or a moment, and not a number."""
    text = text.strip()
    date = _YEAR_LAST.fullmatch(text)
    if date is not None:
        return not all(math.isnan(_moment(date, order)) for order in ((3, 2, 0), (3, 0, 2)))
    return parse_number(text.replace(",", ".")) is None and not math.isnan(parse_time(text))


def parse_time(text: str) -> float:
    """Return a time in ISO 8601, with a named month or as a number; NaN for other text."""
    plain = text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text) else text
    number = parse_number(plain)
    if number is not None and not _SHORT_DAY.fullmatch(text):
        return number
    iso = re.sub(r"\s*(UTC|GMT)$", "+00:00", text)
    try:
        return _seconds(datetime.fromisoformat(iso))
    except (ValueError, OverflowError):
        pass
    if date := _YEAR_FIRST.fullmatch(text):
        return _moment(date, (0, 1, 2))
    if month := _MONTH.fullmatch(text):
        year, number = (
            (int(month[1]), int(month[2])) if month[1] else (int(month[4]), int(month[3]))
        )
        return _seconds(datetime(year, number, 1)) if 1 <= number <= 12 else math.nan
    for form in _NAMED_MONTHS:
        try:
            return _seconds(datetime.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    return math.nan if number is None else number


def _moment(date: re.Match[str], order: tuple[int, int, int]) -> float:
    """Return the time of a date with an optional clock time; NaN if the calendar has no such day.

    Args:
        order: groups of year, month and day, from 0.
    """
    groups = date.groups()
    year, month, day = (int(groups[group]) for group in order)
    if year < 100:
        year += 1900 if year >= _CENTURY else 2000
    hour = minute = second = 0
    if (rest := groups[-1].strip()) and (clock := _CLOCK.fullmatch(rest)):
        hour, minute, second = int(clock[1]), int(clock[2]), int(clock[3] or 0)
        if clock[4]:
            hour = hour % 12 + 12 * (clock[4].lower() == "p")
    elif rest:
        return math.nan
    try:
        return _seconds(datetime(year, month, day, hour, minute, second))
    except (ValueError, OverflowError):
        return math.nan


def _seconds(moment: datetime) -> float:
    # UTC: the local zone may have daylight saving time.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
