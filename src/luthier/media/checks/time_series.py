"""Checks of time series: missing, repeated, unsorted and irregular times, and short series.

A network reads a row as a value with the values of earlier lines, as if equally spaced in time.
:mod:`luthier.media.time_series` parses the times. Rows without times are not checked for gaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.data.files.parsing import quote
from luthier.data.shapes.media import BareWindow, LabelledWindow
from luthier.gate.check import BatchLines, Check, Places, RowBatch
from luthier.gate.rules import Finding, Findings, Place, Rule

FEW = Rule(
    "window.few",
    "error",
    "A time series has too few values to learn from.",
    "Windows of so few values are nearly equal, and the first windows are incomplete.",
    "Use a longer series.",
    whole=True,
)
REVERSED = Rule(
    "window.reversed",
    "error",
    "The times of a series are in descending order.",
    "Each value would be compared with later values.",
    "Sort the lines by time, the earliest first.",
    whole=True,
)
ORDER = Rule(
    "window.order",
    "warning",
    "A line of a time series is earlier than the previous line.",
    "The previous lines are not the previous values.",
    "Sort the lines by time. Use UTC if clocks were set back.",
)
DUPLICATE = Rule(
    "window.duplicate",
    "warning",
    "Two lines of a time series have the same time.",
    "The model reads one value as the successor of the other.",
    "Keep one line, or the mean of both.",
)
GAP = Rule(
    "window.gap",
    "warning",
    "A series has a gap in time.",
    "The model reads the values on both sides as consecutive.",
    "Fill in estimates, or use a part without a gap.",
)
SHORT_GAPS = Rule(
    "window.short_gaps",
    "note",
    "A series has short gaps in time.",
    "The model reads the values on both sides as consecutive.",
    "Fill in estimates if values change much from line to line.",
    whole=True,
)
UNREAD = Rule(
    "window.unread",
    "warning",
    "Times of a series are not read.",
    "The order of the lines, gaps and copies are not checked.",
    "Write the times as 2026-11-23 14:05. In 01/02/2026, the column must show which number is the day.",
    whole=True,
)
FAULTS = Rule(
    "window.faults",
    "error",
    "All training rows of a time series are labelled as faults.",
    "Faults are not learned.",
    "Label normal rows with 0 or normal, or choose the column with `data.columns.label`.",
    whole=True,
)
MOSTLY_FAULTS = Rule(
    "window.mostly_faults",
    "warning",
    "Most training rows of a time series are labelled as faults.",
    "A word for normal values that is not known counts as a fault.",
    "Label normal rows with 0 or normal.",
    whole=True,
)
CONSTANT = Rule(
    "window.constant",
    "warning",
    "A column of a time series has one value.",
    "Nothing is learned about the column, and any other value is an alarm.",
    "Leave the column out, as with `data.columns.NAME=`, or add rows with other values.",
    whole=True,
)
LEAST_VALUES = 100
"""Minimum number of lines of a series, including held-out lines."""
USUAL_QUANTILE = 0.9
"""Quantile of the usual time step: five of seven days are working days."""
LEAST_CLOCK_TIME = 1e8
"""Seconds of a time in 1973. Smaller numbers are counters, not times."""
MOST_FINDINGS = 10_000
"""Maximum number of findings per rule and file."""
GAP_RATIO = 1.5
"""Smallest length of a gap, relative to the usual time step."""
LONG_GAP_RATIO = 10
"""Smallest length of a gap that is a finding of its own, relative to the usual time step."""


class Measured(NamedTuple):
    """Times, faults and values of a batch."""

    times: NDArray[np.float64]
    """Seconds; NaN if not read, infinity without a time."""
    faults: NDArray[np.float64]
    """1 for a fault, 0 for a normal row, NaN without a label."""
    columns: tuple[str, ...]
    """Columns of the first window."""
    edges_2C: NDArray[np.float64]
    """Lowest and highest value of each column, without faults."""


Batches = list[tuple[BatchLines, Measured]]


class TimeSeries(Check):
    """Compares the time of each line with the time of the previous line."""

    name: ClassVar[str] = "time_series"
    rules: ClassVar[tuple[Rule, ...]] = (
        FEW, REVERSED, ORDER, DUPLICATE, GAP, SHORT_GAPS, UNREAD, FAULTS, MOSTLY_FAULTS, CONSTANT,
    )  # fmt: skip

    def __init__(self) -> None:
        self._batches: dict[tuple[str, str], Batches] = {}
        """Batches by split and file."""

    def measure(self, batch: RowBatch) -> Measured:
        """Return the times, faults, columns and values of the batch."""
        rows = [row for row in batch.rows if isinstance(row, BareWindow)]
        times = [np.inf if row.media.time is None else row.media.time for row in rows]
        faults = [row.is_fault if isinstance(row, LabelledWindow) else np.nan for row in rows]
        columns = rows[0].media.names if rows else ()
        normal = (row for row, fault in zip(rows, faults, strict=True) if fault != 1)
        last_RC = [row.media.values()[-1] for row in normal if row.media.names == columns != ()]
        edges_2C = np.array([np.min(last_RC, 0), np.max(last_RC, 0)] if last_RC else [[], []])
        return Measured(
            np.array(times, np.float64), np.array(faults, np.float64), columns, edges_2C
        )

    def collect(self, where: BatchLines, measured: Measured, findings: Findings) -> None:
        """Store the times until the end, when the usual time step is known."""
        if len(measured.times):
            self._batches.setdefault((where.split, where.file), []).append((where, measured))

    def summary(self) -> Mapping[str, Any]:
        """Return the columns, and the numbers of fault rows and of events, by split."""
        splits: dict[str, dict[str, Any]] = {}
        for (split, _), batches in self._batches.items():
            columns = batches[0][1].columns
            found = splits.setdefault(split, {"columns": [*columns]} if columns else {})
            faults = np.concatenate([measured.faults for _, measured in batches])
            if not np.isnan(faults).all():
                begins = np.diff(faults == 1, prepend=False) & (faults == 1)
                found["fault_rows"] = found.get("fault_rows", 0) + int(np.nansum(faults))
                found["events"] = found.get("events", 0) + int(begins.sum())
        return {"splits": splits} if any(splits.values()) else {}

    def finish(self, places: Places, findings: Findings) -> None:
        """Add the findings of each file."""
        lengths = {
            at: sum(len(measured.times) for _, measured in each)
            for at, each in self._batches.items()
        }
        count = sum(length for (split, _), length in lengths.items() if split == "train")
        if 0 < count < LEAST_VALUES:
            file = next(file for split, file in lengths if split == "train")
            message = f"{count:,} values; the minimum is {LEAST_VALUES:,}."
            findings.add(Finding(FEW, Place(file, 0), message))
        for (_, file), batches in self._batches.items():
            self._check_times(file, batches, findings)
        self._check_values(findings)

    def _check_values(self, findings: Findings) -> None:
        """Add findings of training rows without a normal value, and of constant columns."""
        train = {file: each for (split, file), each in self._batches.items() if split == "train"}
        measured = [each for batches in train.values() for _, each in batches]
        faults = np.concatenate([each.faults for each in measured] or [np.zeros(0)])
        count = int((faults == 1).sum())
        if 2 * count > len(faults):
            message = f"{count:,} of {len(faults):,} rows are faults, and are not learned."
            rule = FAULTS if count == len(faults) else MOSTLY_FAULTS
            findings.add(Finding(rule, Place(next(iter(train)), 0), message))
        edges: dict[str, list[float]] = {}
        for each in measured:
            for name, *values in zip(each.columns, *each.edges_2C, strict=False):
                edges.setdefault(name, []).extend(values)
        for name, values in edges.items():
            if min(values) == max(values):
                message = f"The column {quote(name)} is {values[0]:g} in all rows without a fault."
                findings.add(Finding(CONSTANT, Place(next(iter(train)), 0), message))

    def _check_times(self, file: str, batches: Batches, findings: Findings) -> None:
        all_times = np.concatenate([measured.times for _, measured in batches])
        if unread := int(np.isnan(all_times).sum()):
            message = f"{unread:,} of {len(all_times):,} times are not read."
            findings.add(Finding(UNREAD, Place(file, 0), message))
        all_times[np.isinf(all_times)] = np.nan
        steps = np.diff(all_times)
        finite_steps = steps[np.isfinite(steps)]
        if not len(finite_steps):
            return
        if len(finite_steps) > 1 and (finite_steps < 0).mean() > 0.5:
            count = int((finite_steps < 0).sum())
            message = (
                f"{count:,} of {len(finite_steps):,} lines are earlier than the previous line."
            )
            findings.add(Finding(REVERSED, Place(file, 0), message))
            return
        forward = finite_steps[finite_steps > 0]
        usual = float(np.quantile(forward, USUAL_QUANTILE, method="lower")) if len(forward) else 0.0
        format_step = _duration if np.nanmax(all_times) > LEAST_CLOCK_TIME else "{:.4g}".format
        is_gap = steps > GAP_RATIO * usual
        is_long = is_gap & (steps >= LONG_GAP_RATIO * usual)
        if count := int((is_gap & ~is_long).sum()):
            message = f"{count:,} gaps are shorter than {format_step(LONG_GAP_RATIO * usual)}."
            findings.add(Finding(SHORT_GAPS, Place(file, 0), message))
        checks = (
            (ORDER, steps < 0, "The line is {} earlier than the previous line."),
            (DUPLICATE, steps == 0, "The line has the time of the previous line."),
            (GAP, is_long, "The line is {} later than the previous line; {} is usual."),
        )
        ends = np.cumsum([len(measured.times) for _, measured in batches])
        for rule, mask, text in checks:
            rows = np.flatnonzero(mask) + 1
            for row in rows[:MOST_FINDINGS].tolist():
                batch = int(np.searchsorted(ends, row, side="right"))
                where, measured = batches[batch]
                message = text.format(format_step(abs(steps[row - 1])), format_step(usual))
                place = where.place(row - int(ends[batch]) + len(measured.times))
                findings.add(Finding(rule, place, message))


def _duration(seconds: float) -> str:
    """Return a duration in a readable unit."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.4g} seconds"
