"""Rows longer than a model's context: rejected, dropped or truncated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.significance import Score
from luthier.types import Example, LongRows, Row


@dataclass(frozen=True)
class FittingRows:
    """Rows that fit into the context."""

    rows: list[Row]
    examples: list[list[Example]]
    """Encoded texts of each row: one, or two for pairs."""
    dropped: int = 0
    truncated: int = 0

    def evaluation(
        self,
        scores: Mapping[str, Score],
        records: Sequence[Mapping[str, Any]],
        remarks: Sequence[str] = (),
    ) -> Evaluation:
        """Return the evaluation of the rows."""
        return Evaluation(
            scores, self.rows, remarks=[*remarks], records=[dict(each) for each in records],
            dropped=self.dropped, truncated=self.truncated,
        )  # fmt: skip


def fit_rows(
    rows: Sequence[Row],
    examples: Sequence[list[Example]],
    context: int,
    long_rows: LongRows,
    truncate: Callable[[Example, int], Example],
) -> FittingRows:
    """Return the rows whose texts fit into ``context`` tokens.

    Raises:
        DataError: long rows exist, and ``long_rows`` is ``error``.
        RecipeError: all rows are dropped.
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
            kept.append((row, [truncate(t, context) if len(t) > context else t for t in texts]))
        elif long_rows == "drop":
            dropped += 1
        else:
            message = f"the row has {longest} tokens, and the model's context {context}."
            fix = "Shorten the row, or set `long_rows=drop` or `long_rows=truncate`."
            problems.append(Problem("row.too_long", message, fix, row.location))
    reject_long_rows(problems, len(kept), dropped)
    return FittingRows([r for r, _ in kept], [texts for _, texts in kept], dropped, truncated)


def reject_long_rows(problems: Sequence[Problem], kept: int, dropped: int) -> None:
    """Raise :class:`DataError` for ``problems``, and :class:`RecipeError` if no row is left."""
    if problems:
        raise DataError(problems)
    if dropped and not kept:
        raise RecipeError(f"all {dropped} rows are longer than the model's context")
