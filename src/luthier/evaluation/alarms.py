"""Alarms of a time series: runs of anomalous rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from luthier.data.shapes.media import BareWindow
from luthier.errors import DataError, Problem

LEVELS_DIFFER = "most rows are alarms: compare the levels with those of the training rows"
"""Remark about a series whose ordinary rows have scores above the threshold."""


@dataclass(frozen=True)
class Alarm:
    """A run of anomalous rows of a file."""

    file: str
    begin: str
    """Time of the first row as written, or the row number if the rows have no time."""
    end: str
    rows: int
    highest_score: float
    column: str | None = None
    """Column of a series of several columns with the largest part of the highest score."""


def find_alarms(pairs: Iterable[tuple[BareWindow, Mapping[str, Any]]]) -> list[Alarm]:
    """Return the alarms of windows with predictions, in the order of the rows.

    Raises:
        DataError: for times in descending order.
    """
    pairs = [*pairs]
    check_order(row for row, _ in pairs)
    alarms = list[Alarm]()
    for (file, is_anomalous), group in groupby(
        pairs, lambda pair: (pair[0].file, pair[1]["anomalous"] is True)
    ):
        run = [*group]
        if is_anomalous:
            begin, end = (row.media.time_text or str(row.line) for row, _ in (run[0], run[-1]))
            _, peak = max(run, key=lambda pair: pair[1]["score"])
            alarms.append(Alarm(file, begin, end, len(run), peak["score"], peak.get("column")))
    return alarms


def check_order(rows: Iterable[BareWindow]) -> None:
    """Check the times of each file.

    Raises:
        DataError: for times in descending order.
    """
    for _, group in groupby(rows, lambda row: row.file):
        own = [*group]
        times = [row.media.time or 0.0 for row in own]
        if 2 * sum(one > other for one, other in pairwise(times)) >= len(times) > 1:
            message = "The times of the series are in descending order."
            fix = "Sort the lines by time, the earliest first."
            raise DataError([Problem("window.reversed", message, fix, own[0].location)])
