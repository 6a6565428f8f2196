"""Selection of the rows that a cleaning drops.

Dropping rows can uncover new findings: quartiles move, and several training rows may leak one test
row. The gate therefore runs on the remaining rows until no row is left to drop; the last run is the
proof. The selection stores no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from luthier.gate.check import Check, CheckContext, Split
from luthier.gate.checks import CHECKS, checks_for
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.rules import Findings, Place
from luthier.gate.scan import Gate
from luthier.types import Row

HeldOutRows = Mapping[Split, Callable[[], Iterable[Row]]]
"""Held-out rows by split, as functions that restart the iteration."""


@dataclass(frozen=True)
class Drop:
    """Reason for dropping a row."""

    rule: str
    other: Place | None = None
    """Row that causes the drop, such as the first of two copies."""


@dataclass
class Selection:
    """Dropped rows by row number after the edits, and the number of all rows."""

    drops: dict[int, Drop] = field(default_factory=dict)
    rows: int = 0


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
        self.selection = Selection()
        self.passes = 0

    def select(self) -> Selection:
        """Drop until nothing more is to be dropped."""
        while self._run_pass():
            pass
        return self.selection

    def _run_pass(self) -> bool:
        """Run one pass. Returns True if a row was dropped."""
        self.passes += 1
        wanted = self.plan.dropped_rules
        blamed: dict[str, list[tuple[int, int]]] = {rule: [] for rule in wanted}
        gate = Gate(self._checks(), Findings(blamed=blamed))
        alive = array("I")
        gate.scan_rows("train", self._remaining(alive))
        for split, rows in self.held.items():
            gate.scan_rows(split, rows())
        gate.report({})
        drops = self.selection.drops
        before = len(drops)
        for rule in wanted:
            for row, other in blamed[rule]:
                if row < len(alive):
                    place = gate.places.place(other) if other >= 0 and other != row else None
                    drops.setdefault(alive[row], Drop(rule, place))
        return len(drops) > before

    def _remaining(self, alive: array[int]) -> Iterator[Row]:
        """Yield the remaining rows and append their numbers to ``alive``."""
        self.selection.rows = 0
        for number, row in enumerate(self.rows()):
            self.selection.rows += 1
            if number not in self.selection.drops:
                alive.append(number)
                yield row

    def _checks(self) -> list[Check]:
        wanted = set(self.plan.dropped_rules)
        skip = [n for n, kind in CHECKS.items() if not wanted & {r.id for r in kind.rules}]
        return checks_for(replace(self.known, only=frozenset(wanted)), skip)[0]
