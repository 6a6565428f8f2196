"""What a model would learn from each row: tokens, the loss mask, and what does not fit.

Rows are encoded as in training, by the objective and the model's own format, so that what is shown
is what would be trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from luthier.data.chat import ChatFormat
from luthier.errors import DataError, RecipeError, RowRefused
from luthier.inspection.check import Batch, Check, Where
from luthier.inspection.findings import Finding, Findings, Rule
from luthier.inspection.histogram import Histogram
from luthier.inspection.texts import texts
from luthier.objectives import Objective
from luthier.objectives.choosing import objective_for, shape_of, shapes_named
from luthier.types import Example, Row

TOO_LONG = Rule(
    "row.too_long",
    "error",
    "The row has more tokens than the model's context.",
    "Other trainers cut such rows in silence, and with them the end of the answer.",
    "Shorten the row, or choose --set data.long_rows=drop or truncate.",
    ("openai:n_too_long",),
)
NOTHING = Rule(
    "row.nothing_learned",
    "error",
    "No token of the row is learned.",
    "The row costs time and teaches nothing.",
    "Add what is to be learned, or remove the row.",
)
TEMPLATE = Rule(
    "row.template",
    "error",
    "The row cannot be written in the model's template.",
    fix="See the message.",
)
SHAPE = Rule(
    "row.objective", "error", "The row has a shape that the objective does not learn from."
)
EMPTY = Rule("row.empty", "error", "The tokenizer makes nothing of the text.")
_KNOWN = {rule.id: rule for rule in (TOO_LONG, NOTHING, TEMPLATE, SHAPE, EMPTY)}

SHOWN = 5
"""Rows whose tokens are kept for the report, of each split."""
WHOLE = 20_000
"""Rows of a file that are all encoded; of those after it one in :data:`EVERY` is."""
EVERY = 16


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it, for people."""

    line: int
    pieces: tuple[str, ...]
    """Its tokens as text."""
    learned: tuple[bool, ...]
    """Whether each is learned."""
    source: tuple[str, ...] = ()
    """What an encoder of its own reads, before."""
    taught: str = ""
    """What is learned about the row as a whole, such as its label."""


def stands_for(row: Row, context: int) -> int:
    """How many rows a row stands for in the counts of tokens; 0 where it is not encoded.

    No token is less than a byte, so that a row with fewer bytes than the context has tokens fits: what
    may be too long is always encoded. A quarter is left for what templates add.
    """
    if row.line <= WHOLE:
        return 1
    if zlib.crc32(b"%d" % row.line) % EVERY == 0:
        return EVERY
    return int(sum(len(text.content.encode()) for text in texts(row)) > 0.75 * context)


@dataclass(frozen=True)
class Measured:
    """Token counts of a batch, and what is wrong with its rows."""

    tokens_N: Any
    learned_N: Any
    times_N: Any
    """Rows that each one stands for (:func:`stands_for`)."""
    problems: tuple[tuple[int, str, str, str], ...]
    """Index in the batch, rule, message, fix."""
    shown: tuple[Shown, ...]


class Learning(Check):
    """Encodes every row for a model and an objective."""

    name: ClassVar[str] = "learning"
    rules: ClassVar[tuple[Rule, ...]] = tuple(_KNOWN.values())

    def __init__(self, objective: Objective | None, chat: ChatFormat, context: int) -> None:
        self.objective, self.chat, self.context = objective, chat, context
        self.lengths: dict[str, Histogram] = {}
        self.learned: dict[str, int] = {}
        self.sampled = False
        self.shown: dict[str, list[Shown]] = {}

    def measure(self, batch: Batch) -> Measured:
        """Encode the rows; the objective is chosen by the first one where none was asked for."""
        problems: list[tuple[int, str, str, str]] = []
        if self.objective is None:
            try:
                self.objective = objective_for(batch.rows[0], self.chat)
            except DataError as error:
                first = error.problems[0]
                none_N = np.zeros(len(batch), np.int64)
                problems = [(0, first.rule, first.message, first.fix)]
                return Measured(none_N, none_N, none_N, tuple(problems), ())
        objective = self._fitted(self.objective, batch)
        tokens_N, learned_N, times_N = np.zeros((3, len(batch)), np.int64)
        shown: list[Shown] = []
        for index, row in enumerate(batch.rows):
            times_N[index] = stands_for(row, self.context)
            example = self._encoded(objective, row, index, problems) if times_N[index] else None
            if example is None:
                times_N[index] = 0
                continue
            tokens_N[index] = sum(view.tokens for view in objective.views(example))
            learned_N[index] = self._judge(objective, example, index, problems)
            if len(shown) < SHOWN:
                shown.append(self._show(objective, example, row))
        return Measured(tokens_N, learned_N, times_N, tuple(problems), tuple(shown))

    def _encoded(
        self, objective: Objective, row: Row, index: int, problems: list[tuple[int, str, str, str]]
    ) -> Example | None:
        """The row as in training; ``None`` when why not has joined ``problems``."""
        allowed = objective.shapes | objective.also
        if shape_of(row) not in allowed:
            message = (
                f"objective {objective.method} learns from {shapes_named(allowed)}, and this "
                f"row is {shapes_named([shape_of(row)])}."
            )
            problems.append((index, SHAPE.id, message, ""))
            return None
        try:
            return objective.encode(row, index, self.chat)
        except RowRefused as bad:
            problems.append((index, bad.rule, bad.message, bad.fix))
        except RecipeError as error:
            problems.append((index, TEMPLATE.id, str(error), ""))
        return None

    def _fitted(self, objective: Objective, batch: Batch) -> Objective:
        """The objective fitted to a batch: what it takes from the rows changes no length."""
        allowed = objective.shapes | objective.also
        try:
            return objective.fit([row for row in batch.rows if shape_of(row) in allowed], self.chat)
        except RowRefused:
            return objective

    def _judge(
        self,
        objective: Objective,
        example: Example,
        index: int,
        problems: list[tuple[int, str, str, str]],
    ) -> int:
        """Learned tokens of a row; what does not fit joins ``problems``."""
        views = objective.views(example)
        rooms = [room for view in views for room in objective.room(view)]
        longest = max(room.longest for room in rooms)
        weight = sum(view.weight for view in views)
        if longest > self.context and not objective.packs:
            written = longest - max(view.longest for view in views)
            lost = sum(float(view.weight_T[self.context :].sum()) for view in views)
            cost = f"cutting it would lose {lost / max(weight, 1e-9):.0%} of what it teaches"
            if written:
                cost = f"{written} of them are for what the network is to write"
            message = (
                f"{longest} tokens are more than the model's context of {self.context}; {cost}."
            )
            problems.append((index, TOO_LONG.id, message, ""))
        learned = int(sum(np.count_nonzero(view.weight_T) for view in views))
        if not learned and objective.fixed:
            problems.append((index, NOTHING.id, "no token of the row is learned.", ""))
        return learned

    def _show(self, objective: Objective, example: Example, row: Row) -> Shown:
        views = objective.views(example)
        first = views[0] if objective.fixed else (objective.seen([example]) or views)[0]
        whole = first.target is None or len(first.target) == len(first)
        return Shown(
            row.line,
            tuple(self.chat.pieces(first.ids_T.tolist())),
            tuple(bool(weight) and whole for weight in first.weight_T.tolist()),
            () if first.source_T is None else tuple(self.chat.pieces(first.source_T.tolist())),
            objective.described(example),
        )

    def take(self, where: Where, measured: Measured, findings: Findings) -> None:
        """Count, and add what is wrong."""
        for index, name, message, fix in measured.problems:
            rule = _KNOWN.get(name) or Rule(name, "error", message, fix=fix)
            findings.add(Finding(rule, where.place(index), message, fix))
        lengths = self.lengths.setdefault(where.split, Histogram())
        lengths.add(measured.tokens_N, measured.times_N)
        learned = int(measured.learned_N @ measured.times_N)
        self.learned[where.split] = self.learned.get(where.split, 0) + learned
        self.sampled |= bool(np.any(measured.times_N != 1))
        kept = self.shown.setdefault(where.split, [])
        kept += measured.shown[: SHOWN - len(kept)]

    def summary(self) -> Mapping[str, Any]:
        """Tokens and learned tokens of each split, histogram of lengths, and the first rows.

        ``sampled`` says that the counts of large files are scaled up from every 16th row.
        """
        return {
            "objective": self.objective.method if self.objective else None,
            "context": self.context,
            "sampled": self.sampled,
            "splits": {
                split: {
                    "tokens": lengths.sum,
                    "learned_tokens": self.learned[split],
                    "lengths": lengths.plain(),
                    "shown": [
                        {
                            "line": row.line,
                            "source": list(row.source),
                            "tokens": list(row.pieces),
                            "learned": list(row.learned),
                            "taught": row.taught,
                        }
                        for row in self.shown[split]
                    ],
                }
                for split, lengths in self.lengths.items()
            },
        }
