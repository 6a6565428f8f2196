"""Results of a study: one row per configuration, compared on the same held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist, mean, median, stdev
from typing import Any

import numpy as np

from luthier.engine.metrics import SCORES, SHARES, cost_of
from luthier.evaluation.significance import (
    CHANCE,
    RowScores,
    as_gain,
    significant_of,
    welch_p_value,
)
from luthier.pages import PAGE, Table, Tabular, summary_page, svg_address
from luthier.workflows.study.cells import CellResult
from luthier.workflows.study.extrapolation import MIN_POINTS, CurvePoint, MoreRows
from luthier.workflows.study.grid import EARLIER, FIGURES, TEACHER, Configuration, Dimension

LEVEL = 0.05
"""Probability of any false significance in a study."""
LEAST_SAVING = 0.1
"""Share of the processor time by which another configuration is cheaper than the best."""


@dataclass(frozen=True, eq=False)
class StudyRow:
    """Measurements of a configuration with each seed."""

    configuration: Configuration
    outcomes: Sequence[CellResult]
    """Measured outcomes, one per seed."""
    reason: str = ""
    """Reason of a failure, or of a missing training."""

    @property
    def name(self) -> str:
        """The values of the configuration."""
        return self.configuration.name

    @property
    def is_measured(self) -> bool:
        """True if all seeds were measured."""
        return bool(self.outcomes) and not self.reason

    @property
    def measure(self) -> str:
        """``loss`` or a score."""
        return self.outcomes[0].measure

    @cached_property
    def value(self) -> float:
        """Mean measurement over the seeds."""
        return mean(each.value for each in self.outcomes if each.value is not None)

    @property
    def cost(self) -> float:
        """The measurement as a number to minimize."""
        if self.measure in ("loss", "reward"):
            return -as_gain(self.measure, self.value)
        return cost_of({self.measure: self.value}, self.measure)

    def cost_of_training(self) -> float:
        """Return the processor seconds of a training."""
        return self.figure("processor_seconds") or 0.0

    @cached_property
    def scores(self) -> RowScores | None:
        """Row-level measurement, averaged over the seeds."""
        if any(each.rows is None for each in self.outcomes):
            return None
        read = [RowScores.read(each.rows or {}) for each in self.outcomes]
        if len({len(each) for each in read}) > 1:
            return None
        parts_R = np.mean([each.parts_R for each in read], axis=0)
        wholes_R = np.mean([each.wholes_R for each in read], axis=0)
        return RowScores(parts_R, wholes_R, read[0].is_share)

    @property
    def seed_error(self) -> float:
        """Standard error of the mean over seeds; 0 for one seed."""
        return self._seed_error("value")

    def _seed_error(self, name: str) -> float:
        values = [getattr(each, name) or 0.0 for each in self.outcomes]
        return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0

    @property
    def row_error(self) -> float:
        """Standard error by the held-out rows; 0 if unknown."""
        return self.outcomes[0].error if self.scores is None else self.scores.error

    @property
    def order(self) -> str:
        """Key of the held-out rows and of their order; empty if the seeds differ."""
        orders = {each.order for each in self.outcomes}
        return orders.pop() if len(orders) == 1 else ""

    @property
    def error(self) -> float:
        """Standard error, by rows and seeds."""
        return math.hypot(self.row_error, self.seed_error)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        low, high = self.value - CHANCE * self.error, self.value + CHANCE * self.error
        return (max(0.0, low), min(1.0, high)) if self.is_share else (low, high)

    @property
    def is_share(self) -> bool:
        """True for a measurement in percent."""
        return self.measure in SHARES or self.outcomes[0].is_share

    @property
    def gain(self) -> float | None:
        """Improvement over the measurement before training."""
        start = self.figure("start")
        return None if start is None else as_gain(self.measure, self.value - start)

    @property
    def relative_gain(self) -> float | None:
        """Gain as a share of the measurement before training."""
        start = self.figure("start")
        return self.gain / abs(start) if self.gain is not None and start else None

    def figure(self, name: str) -> float | None:
        """Return the mean over seeds of a field of :class:`CellResult`."""
        values = [getattr(each, name) for each in self.outcomes]
        return None if any(value is None for value in values) or not values else mean(values)

    def error_of(self, name: str) -> float:
        """Return the standard error of a figure, by rows and seeds; 0 for exact figures."""
        rows = mean(getattr(each, f"{name}_error", 0.0) for each in self.outcomes)
        return math.hypot(rows, self._seed_error(name)) if rows else 0.0


@dataclass(frozen=True)
class Apart:
    """Difference of a row from the best row."""

    value: float
    """As a gain: negative if worse."""
    error: float
    significant: bool
    """True if beyond chance after Holm's correction for all rows."""


@dataclass(frozen=True, eq=False, repr=False)
class Study(Tabular):
    """The result of a study."""

    name: str
    folder: str
    rows: Sequence[StudyRow]
    """Rows in the order of the grid."""
    dimensions: Sequence[Dimension]
    held_out: int
    """Number of held-out rows."""
    limits: dict[str, float] = field(default_factory=dict)
    """Limits of the choice by figure: ``ms``, ``mb``, ``minutes`` or ``drift``."""
    command: str = ""
    """Command that trains the chosen configuration as a custom model."""
    pictures: Sequence[str] = ()
    is_search: bool = False
    """True for a search, whose choice is the best trial and not the cheapest within chance."""

    def summary(self) -> list[str]:
        """Return the verdict and the command that trains the choice."""
        return [
            f"Study of {len(self.rows)} configurations",
            self.verdict(),
            *filter(None, [self.command]),
        ]

    def remarks(self) -> list[str]:
        """Return shares of the teacher's score, the smallest difference, and the command that
        trains the choice."""
        score = SCORES.get(self.best.measure, self.best.measure) if self.measured else ""
        lines = [
            f"{row.name}: {kept:.1%} of the teacher's {score}"
            for row in self.measured
            if (kept := self.kept(row)) is not None
        ]
        if (least := self.smallest_difference) is not None:
            lines.append(
                f"{self.held_out:,} held-out rows show differences of {self.text(least)} and more. "
                "* is within chance of the best; for the earlier task, of no change."
            )
        if self.chosen is not None and (change := _earlier_text(self.chosen)):
            lines.append(f"{self.chosen.name}, earlier task before training and change: {change}")
        lines += dict.fromkeys(
            remark
            for row in self.measured
            for each in row.outcomes
            for remark in each.earlier_remarks
        )
        action = "store the start" if self.is_untrained else "train the choice"
        return [*lines, f"{action}: {self.command}"] if self.command else lines

    def html(self, layout: str = PAGE) -> str:
        """Return the study as an HTML page or fragment."""
        drawn = [svg_address(Path(path).read_bytes()) for path in self.pictures]
        return summary_page(
            f"Study {self.name}", [self.verdict(), *self.remarks()], layout, tables=self.tables(),
            pictures=[*zip(drawn[::2], drawn[1::2], strict=True)],
        )  # fmt: skip

    def tables(self) -> Sequence[Table]:
        """Return the measurements of each configuration, or the reason of a failure."""
        columns = columns_of(self)
        cells = zip(self.rows, zip(*columns.values(), strict=True), strict=True)
        rows = [
            [row.name, *(texts if row.is_measured else (row.reason.splitlines()[0], *texts[1:]))]
            for row, texts in cells
        ]
        headings = {"": "name", **dict.fromkeys(columns, "number")}
        strong = [self.best.name] if self.is_decided else []
        caption = f"Measurements on {self.held_out:,} held-out rows"
        return [Table.of(caption, headings, rows, strong=strong)]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return settings, mean measurement, error and costs of each configuration."""
        figures = ("processor_seconds", "peak_memory_bytes", "trained_weights", "saved_bytes",
                   "milliseconds")  # fmt: skip
        return [
            {
                "name": row.name, **row.configuration.settings, row.measure: row.value,
                "error": row.error, "gain": row.gain, **{each: row.figure(each) for each in figures},
            }
            for row in self.rows
            if row.is_measured
        ]  # fmt: skip

    @cached_property
    def measured(self) -> list[StudyRow]:
        """Measured rows, the best first."""
        rows = [row for row in self.rows if row.is_measured]
        return sorted(rows, key=lambda row: -as_gain(row.measure, row.value))

    @property
    def best(self) -> StudyRow:
        """The row with the best measurement."""
        return self.measured[0]

    @cached_property
    def apart(self) -> dict[str, Apart]:
        """Difference of each other measured row from the best row, by name."""
        others = self.measured[1:]
        found = [self.difference(row, self.best) for row in others]
        # The best row is chosen on the same data, so all pairs are compared.
        p_values = [min(1.0, p_value * len(self.measured) / 2) for _, _, p_value in found]
        return {
            row.name: Apart(value, error, beyond)
            for row, (value, error, _), beyond in zip(
                others, found, significant_of(p_values, LEVEL), strict=True
            )
        }

    def difference(self, row: StudyRow, other: StudyRow) -> tuple[float, float, float]:
        """Return the gain of ``row`` over ``other``, the standard error, and the p-value of this
        comparison alone."""
        value = as_gain(row.measure, row.value - other.value)
        if row.order and row.order == other.order and row.scores and other.scores:
            row_error = row.scores.difference_error(other.scores)
        else:
            row_error = math.hypot(row.row_error, other.row_error)
        parts = [
            (row_error, self.held_out - 1),
            (row.seed_error, len(row.outcomes) - 1),
            (other.seed_error, len(other.outcomes) - 1),
        ]
        return value, math.hypot(*(error for error, _ in parts)), welch_p_value(value, parts)

    def is_within_chance(self, row: StudyRow) -> bool:
        """Return True for the best row, and for a row that is not significantly worse."""
        return row is self.best or not self.apart[row.name].significant

    @property
    def is_decided(self) -> bool:
        """True if the best row is significantly better than every other row."""
        return bool(self.apart) and all(each.significant for each in self.apart.values())

    @property
    def is_untrained(self) -> bool:
        """True if no training improved measurably on the weights from before step 1."""
        outcomes = [each for row in self.measured for each in row.outcomes]
        return len(self.measured) > 1 and all(
            each.kept_step == 0 or each.verdict == "hardly_learned" for each in outcomes
        )

    @property
    def smallest_difference(self) -> float | None:
        """Smallest difference that is significant after the correction; ``None`` if unknown."""
        if not self.apart:
            return None
        error, count = median(each.error for each in self.apart.values()), len(self.measured)
        return NormalDist().inv_cdf(1 - LEVEL / (count * (count - 1))) * error or None

    @cached_property
    def more_rows(self) -> MoreRows | None:
        """Predicted effect of more rows, if only the number of rows differs, over four or more
        values."""
        if [each.key for each in self.dimensions] not in (["rows"], ["data.train_share"]):
            return None
        points = [
            CurvePoint(round(row.figure("training_rows") or 0), row.cost, row.error)
            for row in self.rows
            if row.is_measured
        ]
        if len(points) < MIN_POINTS:
            return None
        return MoreRows.of(sorted(points, key=lambda point: point.rows), self.best.measure)

    @cached_property
    def chosen(self) -> StudyRow | None:
        """The cheapest row within chance of the best row and within the limits, or the best of these
        if no other is clearly cheaper, in a search, or among numbers of rows; the smallest stored
        model if no training improved on its start.

        If no row within chance of the best is within the limits, the best row within the limits.
        """
        able = [row for row in self.measured if self._is_allowed(row)]
        near = [row for row in able if self.is_within_chance(row)]
        if self.is_untrained and near:  # equal weights
            return min(near, key=lambda row: row.figure("saved_bytes") or math.inf)
        if self.is_search or self.more_rows is not None or not near:
            return able[0] if able else None
        cheapest = min(near, key=StudyRow.cost_of_training)
        saved = 1 - cheapest.cost_of_training() / max(1e-9, near[0].cost_of_training())
        return cheapest if saved >= LEAST_SAVING else near[0]

    def _is_allowed(self, row: StudyRow) -> bool:
        figures = {name: figure_of(row, name) for name in self.limits}
        return all(f is not None and f <= self.limits[name] for name, f in figures.items())

    def kept(self, row: StudyRow) -> float | None:
        """Return the share of the teacher's score that a student keeps; else ``None``."""
        teacher = next((each for each in self.measured if each.name == TEACHER), None)
        if teacher is None or row is teacher or not row.is_measured or not row.is_share:
            return None
        return row.value / teacher.value if teacher.value else None

    def text(self, value: float, signed: bool = False) -> str:
        """Return a measurement, or a difference, as text."""
        sign = "+" if signed else ""
        return f"{value:{sign}.1%}" if self.best.is_share else f"{value:{sign}.3f}"

    def verdict(self) -> str:
        """Return the best configuration, and the cheapest configuration within chance; for numbers
        of rows, whether more rows would help."""
        if not self.measured:
            return "No training finished."
        failed = len(self.rows) - len(self.measured)
        unmeasured = f" ({failed} of {len(self.rows)} configurations not measured)" * bool(failed)
        if self.is_untrained:
            return (
                "No training improved measurably on its start, such as the logistic regression of a "
                f"new head, so this compares no configurations{unmeasured}. Keep the start; for "
                "labels, `--set objective.probe=false` trains without this start."
            )
        if self.more_rows is not None:
            return self.more_rows.verdict() + unmeasured
        best, measure = self.best, SCORES.get(self.best.measure, self.best.measure)
        text = f"Best: {best.name}, {measure} {self.text(best.value)}{unmeasured}"
        near = [row for row in self.measured[1:] if self.is_within_chance(row)]
        if len(self.measured) == 1:
            text += "; no other configuration was measured."
        elif self.is_decided:
            text += ", better than all others beyond chance."
        else:
            text += (
                f". {len(near)} of the others {'is' if len(near) == 1 else 'are'} within chance."
            )
        chosen = self.chosen
        if chosen is None:
            limits = ", ".join(f"{name} {value:g}" for name, value in self.limits.items())
            return f"{text} No configuration is within {limits}."
        cost = f"{chosen.cost_of_training():,.0f} s of processor time"
        if chosen is best:
            other = ", and no other is clearly cheaper" * (bool(near) and not self.is_search)
            return f"{text} The best takes {cost}{other}."
        kind = (
            "Within the limits"
            if self.is_search or not self.is_within_chance(chosen)
            else "The cheapest within chance"
        )
        return f"{text} {kind}: {chosen.name}, {self.text(chosen.value)} ({cost})."

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "name": self.name,
            "held_out_rows": self.held_out,
            "rows": [self._plain_row(row) for row in self.rows],
            "smallest_difference": self.smallest_difference,
            "chosen": None if self.chosen is None else self.chosen.name,
            "verdict": self.verdict(),
            "command": self.command,
            "pictures": list(self.pictures),
        }

    def _plain_row(self, row: StudyRow) -> dict[str, Any]:
        plain: dict[str, Any] = {"name": row.name, "settings": dict(row.configuration.settings)}
        if not row.is_measured:
            return plain | {"reason": row.reason}
        apart = self.apart.get(row.name)
        names = ("training_rows", "batch_size", "warmup_ratio")
        figures = {name: row.figure(name) for name in (*names, *_FIELDS)}
        errors = {f"{name}_error": error for name in _FIELDS if (error := row.error_of(name))}
        return plain | {
            "measure": row.measure,
            "value": row.value,
            "interval": list(row.interval),
            "seeds": [each.value for each in row.outcomes],
            "gain": row.gain,
            "relative_gain": row.relative_gain,
            **({} if (kept := self.kept(row)) is None else {"kept": kept}),
            "behind_best": None if apart is None else apart.value,
            "significant": None if apart is None else apart.significant,
            **figures,
            **errors,
        }


def figure_of(row: StudyRow, name: str) -> float | None:
    """Return a figure of :data:`FIGURES` in the unit of the limit."""
    if name == "earlier":
        if (change := row.figure("earlier")) is None:
            return None
        return max(0.0, -change) * (100 if row.outcomes[0].earlier_is_share else 1)
    field, unit, _ = _COLUMNS[FIGURES[name]]
    value = row.figure(field)
    return None if value is None else value / unit


def columns_of(found: Study) -> dict[str, list[str]]:
    """Return the figures of all rows as text, by heading. Columns without a figure are left out,
    except the score, which has the place of a reason."""

    def column(text: Callable[[StudyRow], str]) -> list[str]:
        return [text(row) if row.is_measured else "" for row in found.rows]

    def figure(row: StudyRow, name: str, unit: float, form: str) -> str:
        if (value := row.figure(name)) is None:
            return ""
        error = row.error_of(name)
        return f"{value / unit:{form}}" + (f" {error / unit:.3f}" if error else "")

    columns = {
        "score ±": column(partial(_score_text, found)),
        "vs. best ±": column(partial(_apart_text, found)),
        "gain": column(partial(_gain_text, found)),
        "kept": column(lambda row: f"{kept:.1%}" if (kept := found.kept(row)) else ""),
        EARLIER: column(_earlier_text),
        "steps": column(_steps_text),
    }
    for heading, (name, unit, form) in _COLUMNS.items():
        columns[heading] = column(partial(figure, name=name, unit=unit, form=form))
    return {name: texts for name, texts in columns.items() if any(texts) or name == "score ±"}


_COLUMNS = {
    "drift ±": ("forgotten", 1.0, ".3f"),
    "tokens": ("prompt_tokens", 1.0, ",.0f"),
    "minutes": ("seconds", 60.0, ",.1f"),
    "CPU s": ("processor_seconds", 1.0, ",.0f"),
    "GB": ("peak_memory_bytes", 1e9, ".2f"),
    "trained": ("trained_weights", 1.0, ",.0f"),
    "MB": ("saved_bytes", 1e6, ",.1f"),
    "ms": ("milliseconds", 1.0, ",.1f"),
}
"""Heading of a figure, with field, unit and form."""
_FIELDS = [name for name, _, _ in _COLUMNS.values()] + ["steps", "earlier", "earlier_start"]


def _score_text(found: Study, row: StudyRow) -> str:
    return (
        f"{found.text(row.value)} {found.text(row.error)}" if row.error else found.text(row.value)
    )


def _apart_text(found: Study, row: StudyRow) -> str:
    """Return the difference from the best row; a star marks a difference within chance."""
    if row is found.best:
        return ""
    apart = found.apart[row.name]
    mark = "" if apart.significant else " *"
    error = f" {found.text(apart.error)}" if apart.error else ""
    return f"{found.text(apart.value, signed=True)}{error}{mark}"


def _gain_text(found: Study, row: StudyRow) -> str:
    if row.gain is None:
        return ""
    points = found.text(row.gain, signed=True)
    return points if row.relative_gain is None else f"{points} ({row.relative_gain:+.0%})"


def _steps_text(row: StudyRow) -> str:
    """Return the stored step, 0 for the weights from before training, of all steps."""
    steps, kept = row.figure("steps"), row.figure("kept_step")
    if steps is None:
        return ""
    return f"{steps:,.0f}" if kept is None else f"{kept:,.0f} of {steps:,.0f}"


def _earlier_text(row: StudyRow) -> str:
    """Return the score of an earlier task before training, the change and its standard error; a
    star marks a change within chance."""
    if (change := row.figure("earlier")) is None:
        return ""
    form, error = ".1%" if row.outcomes[0].earlier_is_share else ".3f", row.error_of("earlier")
    start = row.figure("earlier_start")
    before = "" if start is None else f"{start:{form}} "
    mark = " *" if abs(change) <= CHANCE * error else ""
    return f"{before}{change:+{form}}" + (f" {error:{form}}" if error else "") + mark
