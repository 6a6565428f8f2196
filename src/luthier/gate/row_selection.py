"""Which rows go: by the rules of the gate until it finds none broken.

Rules look at rows beside each other, so that dropping some may uncover others: quartiles move, and a
test row may be given away by two. So the gate is run on what is left until it finds nothing that was to
be dropped; the last run is the proof. What is kept of a row are 12 bytes, never its text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from luthier.gate.check import Check, CheckContext, Split
from luthier.gate.checks import CHECKS, checks_for
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.rules import BlamedRows, Findings, Place
from luthier.gate.scan import Gate
from luthier.types import Row

HeldOutRows = Mapping[Split, Callable[[], Iterable[Row]]]
"""Held-out rows, which can be read again."""


class Selection:
    """Why each row goes, by its number among the rows as edited."""

    def __init__(self, rules: Sequence[str]) -> None:
        self.reasons = ("", *rules)
        self._why = array("h")
        self._lines = array("I")
        self._files = array("h")
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._why)

    def grow(self) -> None:
        """Take in one more row, which stays."""
        self._why.append(0)
        self._lines.append(0)
        self._files.append(-1)

    def why(self, number: int) -> str:
        """The rule that the row goes by; empty where it stays."""
        return self.reasons[self._why[number]] if number < len(self._why) else ""

    def other(self, number: int) -> Place | None:
        """The row for which it goes: of two copies the first."""
        file = self._files[number]
        return Place(self._names[file], self._lines[number]) if file >= 0 else None

    def drop(self, number: int, rule: str, other: Place | None = None) -> bool:
        """Let a row go; False where it is gone already."""
        if self._why[number]:
            return False
        self._why[number] = self.reasons.index(rule)
        if other is not None:
            if other.file not in self._names:
                self._names.append(other.file)
            self._files[number] = self._names.index(other.file)
            self._lines[number] = other.line
        return True


class Selector:
    """Runs the gate over what is left, again and again.

    Args:
        plan: what is to be dropped.
        known: the model, for rules that need one.
        rows: all rows as edited; called for each pass.
        held: rows of the other splits.
    """

    def __init__(
        self,
        plan: CleaningPlan,
        known: CheckContext,
        rows: Callable[[], Iterable[Row]],
        held: HeldOutRows,
    ) -> None:
        self.plan, self.known, self.rows, self.held = plan, known, rows, held
        self.selection = Selection(plan.dropped_rules)
        self.passes = 0

    def select(self) -> Selection:
        """Drop until nothing more is to be dropped."""
        while self._round():
            pass
        return self.selection

    def _round(self) -> bool:
        """One pass; whether anything was dropped."""
        self.passes += 1
        wanted = self.plan.dropped_rules
        blamed = {rule: BlamedRows() for rule in wanted}
        gate = Gate(self._checks(), Findings(blamed=blamed))
        alive = array("I")
        gate.scan_rows("train", self._remaining(alive))
        for split, rows in self.held.items():
            gate.scan_rows(split, rows())
        gate.report({})
        dropped = 0
        for rule in wanted:
            for row, other in zip(blamed[rule].rows, blamed[rule].others, strict=True):
                if row < len(alive):
                    place = gate.places.place(other) if other >= 0 and other != row else None
                    dropped += self.selection.drop(alive[row], rule, place)
        return bool(dropped)

    def _remaining(self, alive: array[int]) -> Iterator[Row]:
        """Rows that are not dropped yet; their numbers join ``alive``."""
        for number, row in enumerate(self.rows()):
            if number == len(self.selection):
                self.selection.grow()
            if not self.selection.why(number):
                alive.append(number)
                yield row

    def _checks(self) -> list[Check]:
        wanted = set(self.plan.dropped_rules)
        skip = [n for n, kind in CHECKS.items() if not wanted & {r.id for r in kind.rules}]
        return checks_for(replace(self.known, only=frozenset(wanted)), skip)[0]
