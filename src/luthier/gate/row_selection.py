"""Selection of the rows that a cleaning drops.

Dropping rows can uncover new findings: quartiles move, and several training rows may leak one test
row. The gate therefore runs on the remaining rows until no row is left to drop; the last run is the
proof. The selection stores 12 bytes per row, and no text.
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
"""Held-out rows by split, as functions that restart the iteration."""


class Selection:
    """Reason for dropping each row, by row number after the edits."""

    def __init__(self, rules: Sequence[str]) -> None:
        self.reasons = ("", *rules)
        self._why = array("h")
        self._lines = array("I")
        self._files = array("h")
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._why)

    def grow(self) -> None:
        """Append a row that stays."""
        self._why.append(0)
        self._lines.append(0)
        self._files.append(-1)

    def why(self, number: int) -> str:
        """Return the rule that drops the row; empty if the row stays."""
        return self.reasons[self._why[number]] if number < len(self._why) else ""

    def other(self, number: int) -> Place | None:
        """Return the row that causes the drop, such as the first of two copies."""
        file = self._files[number]
        return Place(self._names[file], self._lines[number]) if file >= 0 else None

    def drop(self, number: int, rule: str, other: Place | None = None) -> bool:
        """Drop a row. Returns False if the row is already dropped."""
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
    """Runs the gate over the remaining rows until no row is left to drop.

    Args:
        plan: rules to drop rows for.
        known: base model for rules that need a tokenizer.
        rows: returns all edited rows; called for each pass.
        held: rows of the held-out splits.
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
        """Run one pass. Returns True if a row was dropped."""
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
        """Yield the remaining rows and append their numbers to ``alive``."""
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
