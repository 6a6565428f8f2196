"""What an objective makes of all training rows together, from one row of each class.

Objectives that read their classes or the spread of ratings from the rows refuse data that has only one
of them, and held-out rows of a class that no training row has. To ask them, it is enough to keep one
row for each label or tag, and two different ratings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from luthier.data.chat import ChatFormat
from luthier.errors import RecipeError, RowRefused
from luthier.inspection.check import Where
from luthier.inspection.findings import Finding, Place
from luthier.inspection.reading import late_rule
from luthier.objectives import Objective
from luthier.objectives.choosing import shape_of
from luthier.objectives.classification import names_of
from luthier.types import Row

Kind = tuple[str, ...]


@dataclass
class Witness:
    """The first row of a kind, without its text, and how many there are."""

    row: Row
    index: int
    """Its index in the batch."""
    count: int


def witnesses(rows: Sequence[Row]) -> dict[Kind, Witness]:
    """One row for each kind of rows in a batch."""
    found: dict[Kind, Witness] = {}
    for index, row in enumerate(rows):
        for kind in _kinds(row):
            if kind in found:
                found[kind].count += 1
            else:
                found[kind] = Witness(_short(row), index, 1)
    return found


def _kinds(row: Row) -> Iterable[Kind]:
    if row.tags is not None:
        return {("tag", tag) for tag in row.tags}
    if row.label is not None:
        several = "labels" if isinstance(row.label, tuple) else "label"
        return [(several, name) for name in dict.fromkeys(names_of(row.label))]
    if row.rating is not None and row.reply is None:
        return [("rating", repr(row.rating))]
    if row.desirable is not None:
        return [("thumb", repr(row.desirable))]
    return [("row", shape_of(row))]


def _short(row: Row) -> Row:
    """The row with a text of one letter, so that any number may be kept."""
    if row.tags is not None:
        return replace(row, tokens=("a",) * len(row.tags))
    return replace(row, text="a") if row.text is not None else row


class Fitting:
    """Takes in the witnesses of all batches, and lets the objective judge them at the end."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[Kind, tuple[Place, Witness]]] = {}
        self._lines: Counter[str] = Counter()

    def take(self, where: Where, found: Mapping[Kind, Witness]) -> None:
        """Those of one batch."""
        self._lines[where.split] += len(where.lines_N)
        kept = self._kept.setdefault(where.split, {})
        ratings = sum(kind[0] == "rating" for kind in kept)
        for kind, witness in found.items():
            if kind in kept:
                kept[kind][1].count += witness.count
            elif kind[0] != "rating" or ratings < 2:
                kept[kind] = (where.place(witness.index), witness)
                ratings += kind[0] == "rating"

    def judge(self, objective: Objective, chat: ChatFormat) -> list[tuple[Finding, int]]:
        """What the objective refuses, and of how many rows.

        Raises:
            RecipeError: where it cannot learn such rows whatever they say.
        """
        train = self._kept.get("train", {})
        allowed = objective.shapes | objective.also
        rows = [w.row for _, w in train.values() if shape_of(w.row) in allowed]
        if not rows:
            return []
        file = next(iter(train.values()))[0].file
        if self._lines["train"] == 1 and shape_of(rows[0]) != "text":
            message = "this is the only row; one example cannot show what is to be learned."
            return [(Finding(late_rule("rows.too_few"), Place(file, rows[0].line), message), 1)]
        try:
            fitted = objective.fit(rows, chat)
        except RowRefused as bad:
            message = bad.message if len(train) > 1 else _plainly(bad, rows[0])
            return [(Finding(late_rule(bad.rule), Place(file, 0), message, bad.fix), 1)]
        except RecipeError:
            if objective.beside:  # it needs a second file, which only a job names
                return []
            raise
        return [
            (found, count)
            for split, kept in self._kept.items()
            if split != "train"
            for found, count in self._unseen(kept, fitted, chat)
        ]

    def _unseen(
        self, kept: dict[Kind, tuple[Place, Witness]], fitted: Objective, chat: ChatFormat
    ) -> Iterable[tuple[Finding, int]]:
        for place, witness in kept.values():
            try:
                fitted.encode(witness.row, 0, chat)
            except RowRefused as bad:
                if bad.rule.startswith("label."):
                    yield Finding(late_rule(bad.rule), place, bad.message, bad.fix), witness.count
            except RecipeError:
                continue


def _plainly(bad: RowRefused, row: Row) -> str:
    """The message without a count of rows, as only one of each class was looked at."""
    if row.rating is not None:
        return f"all rows have the rating {row.rating:g}."
    if row.tags is not None:
        return "all words have the tag O."
    if row.desirable is not None:
        return f"all answers have a thumb {'up' if row.desirable else 'down'}."
    names = names_of(row.label)
    return f"all rows have the label {names[0]!r}." if names else "no row has a label."
