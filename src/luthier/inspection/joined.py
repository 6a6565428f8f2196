"""The texts of a batch as one string, so that a pattern is run once and not for every short text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from luthier.inspection.check import Batch, Where
from luthier.inspection.excerpts import excerpt
from luthier.inspection.findings import Finding, Findings, Rule
from luthier.inspection.pii.spans import SEPARATOR
from luthier.inspection.texts import Text, texts

BETWEEN = f"\n{SEPARATOR}\n"
"""Stands between two texts: the end of a line for patterns, and a character that none of them takes."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One row of a batch that breaks a rule; picklable."""

    index: int
    rule: str
    message: str
    excerpt: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Joined:
    """All texts of a batch, one behind the other."""

    text: str
    starts: Sequence[int]
    """Where each text begins in ``text``."""
    owners: Sequence[tuple[int, Text]]
    """Index of its row in the batch, and the text."""

    @staticmethod
    def of(batch: Batch) -> Joined:
        """Join the texts of ``batch``; several checks look at one batch after the other."""
        global _last
        if _last is None or _last[0] is not batch:
            owners = [(index, text) for index, row in enumerate(batch.rows) for text in texts(row)]
            _last = batch, Joined.join(owners)
        return _last[1]

    @staticmethod
    def join(owners: Sequence[tuple[int, Text]]) -> Joined:
        """Join texts, each with the index of its row."""
        contents = [each.content for _, each in owners]
        starts = accumulate((len(each) + len(BETWEEN) for each in contents[:-1]), initial=0)
        return Joined(BETWEEN.join(contents), list(starts) if contents else [], owners)

    def only(self, wanted: Callable[[str], bool]) -> Joined:
        """The texts that are ``wanted``."""
        return Joined.join([owner for owner in self.owners if wanted(owner[1].content)])

    def at(self, position: int) -> tuple[int, Text, int]:
        """Row, text, and character in that text of a ``position``."""
        number = bisect_right(self.starts, position) - 1
        index, text = self.owners[number]
        return index, text, position - self.starts[number]

    def spots(self, rule: Rule, found: Iterable[tuple[int, int, str]]) -> list[Spot]:
        """One spot for each row with anything ``found``: start, end and what it is, in words."""
        first: dict[int, tuple[Text, int, int, str]] = {}
        more: dict[int, int] = {}
        for start, end, what in found:
            index, text, offset = self.at(start)
            if offset >= len(text.content):
                continue  # Between two texts.
            if index in first:
                more[index] = more.get(index, 0) + 1
            else:
                first[index] = (text, offset, offset + end - start, what)
        spots = []
        for index, (text, start, end, what) in first.items():
            others = f", and {more[index]} more in this row" if index in more else ""
            message = f"{text.field} holds {what}{others}."
            spots.append(Spot(index, rule.id, message, excerpt(text.content, start, end)))
        return spots


_last: tuple[Batch, Joined] | None = None


def add(spots: Iterable[Spot], rules: Sequence[Rule], where: Where, findings: Findings) -> None:
    """Add ``spots`` of a batch to ``findings``."""
    known = {rule.id: rule for rule in rules}
    for spot in spots:
        finding = Finding(
            known[spot.rule], where.place(spot.index), spot.message, spot.fix, spot.excerpt
        )
        findings.add(finding)
