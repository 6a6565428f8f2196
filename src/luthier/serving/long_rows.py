"""Rows longer than a model's context, where it is measured: refused, left out, or cut.

What training does with them is for ``data.long_rows``; the choices have the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.evaluate import Evaluation
from luthier.types import Example, Row

LongRows = Literal["error", "drop", "truncate"]
"""Refuse them all at once, leave them out, or cut them to the context."""


@dataclass(frozen=True)
class FittingRows:
    """Rows that a model can read, each as the texts it consists of."""

    rows: list[Row]
    examples: list[list[Example]]
    """The texts of each row: one, or two where a row compares or pairs two."""
    dropped: int = 0
    """Rows left out as too long."""
    truncated: int = 0
    """Rows cut to the context."""


@dataclass(frozen=True)
class RowScores:
    """How good what a model says of rows is, by what the rows say."""

    scores: dict[str, float]
    measured: FittingRows
    """The rows that were read, and how many were not or not whole."""
    answers: list[dict[str, Any]]
    """What the model says of each of them."""
    remarks: list[str] = field(default_factory=list)
    """What the scores do not say."""

    def evaluation(self) -> Evaluation:
        """The scores and the counts."""
        rows = self.measured
        count, dropped, truncated = len(rows.rows), rows.dropped, rows.truncated
        return Evaluation(
            self.scores, count, [], dropped=dropped, truncated=truncated, remarks=self.remarks
        )


def fit_rows(
    rows: Sequence[Row],
    examples: Sequence[list[Example]],
    context: int,
    long_rows: LongRows,
    cut: Callable[[Example, int], Example],
) -> FittingRows:
    """``rows`` with texts of at most ``context`` tokens; ``cut`` shortens a text.

    Raises:
        DataError: with ``error``, naming every row that is too long; or where none is left.
    """
    problems: list[Problem] = []
    kept: list[tuple[Row, list[Example]]] = []
    dropped = truncated = 0
    for row, texts in zip(rows, examples, strict=True):
        longest = max(len(text) for text in texts)
        if longest <= context:
            kept.append((row, texts))
        elif long_rows == "truncate":
            truncated += 1
            kept.append((row, [cut(t, context) if len(t) > context else t for t in texts]))
        elif long_rows == "drop":
            dropped += 1
        else:
            message = f"{longest} tokens are more than the model's context of {context}."
            problems.append(too_long(row, message))
    refuse_long_rows(problems, left=len(kept), dropped=dropped)
    return FittingRows([r for r, _ in kept], [texts for _, texts in kept], dropped, truncated)


def too_long(row: Row, message: str, cure: str = ", or `long_rows=truncate`") -> Problem:
    """What is wrong with a row that is too long; ``cure`` is what else would make it fit."""
    fix = f"Shorten the row, or choose `long_rows=drop`{cure}."
    return Problem(row.file, row.line, "row.too_long", message, fix)


def refuse_long_rows(problems: Sequence[Problem], left: int, dropped: int) -> None:
    """Refuse ``problems``, and data of which no row is ``left``.

    Raises:
        DataError: with each row that is too long.
        RecipeError: where all rows were dropped.
    """
    if problems:
        raise DataError(problems, "nothing was evaluated")
    if dropped and not left:
        raise RecipeError(f"all {dropped} rows are longer than the model's context; none is left")


def long_rows_summary(found: Evaluation) -> str:
    """What became of rows longer than the context, for people; empty where there were none."""
    if found.dropped:
        count = found.rows + found.dropped
        return f"{found.dropped} of {count} rows are longer than the context and were left out"
    cut = found.truncated
    return f"{cut} of {found.rows} rows were cut to the context" if cut else ""
