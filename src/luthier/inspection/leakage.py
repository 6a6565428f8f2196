"""Held-out rows that training rows give away: the same row, the same question, or nearly so.

Questions are the same where they differ in letter case, punctuation and white space only.

What is measured on such a row is memory. A few of them move a figure by no more than their share, so
each is a warning; where a tenth of a split is given away, its figures say nothing and the data is
refused. (A published set such as Banking77 repeats 0.8 % of its test texts: worth knowing, no reason
to stop.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.inspection.check import Places
from luthier.inspection.findings import Finding, Findings, Place, Rule
from luthier.inspection.groups import firsts
from luthier.inspection.identity import Keys, mixed

_WHY = "What is measured on it is memory."
_FIX = "Remove the row from one side; `luthier split` makes splits without such rows."
EXACT = Rule(
    "leakage.exact",
    "warning",
    "A held-out row is also a training row, with its answer.",
    _WHY,
    _FIX,
)
INPUT = Rule(
    "leakage.input",
    "warning",
    "A held-out row asks what a training row asks, and has another answer.",
    "What is measured on it is memory, or the two contradict each other.",
    _FIX,
)
NEAR = Rule(
    "leakage.near", "warning", "A held-out row asks nearly what a training row asks.", _WHY, _FIX
)
MANY = Rule(
    "leakage.many",
    "error",
    "A tenth or more of a held-out split is in the training rows.",
    "Its figures would say how much was learned by heart.",
    "Make new splits with `luthier split`, or remove these rows from one side.",
    whole=True,
)
RULES = (EXACT, INPUT, NEAR, MANY)
TOO_MANY = 0.1
"""Share of a held-out split that may not be given away."""
FEWEST = 5
"""Rows given away below which a share of a small split says nothing."""


class Leaks:
    """For each held-out row, the first training row that gives it away."""

    def __init__(self, splits_N: Any, train: int, input_N: Keys, target_N: Keys) -> None:
        self.input_N = input_N
        self._both_N = mixed(input_N, target_N)
        self._splits_N = splits_N
        self._train_N = splits_N == train
        self.possible = bool(self._train_N.any() and not self._train_N.all())
        self._none = len(splits_N)
        self._near_N = np.full(self._none, self._none)
        """Training row that is near; ``_none`` where there is none."""
        self._counts: dict[str, dict[str, int]] = {}

    def wanted(self, one_P: Any, other_P: Any) -> Any:
        """Whether a pair is of both sides, and its held-out row is not given away yet."""
        train_P = self._train_N[one_P]
        across_P = train_P != self._train_N[other_P]
        return across_P & (self._near_N[np.where(train_P, other_P, one_P)] == self._none)

    def found(self, one_P: Any, other_P: Any) -> None:
        """Take in pairs that are near."""
        across_P = self._train_N[one_P] != self._train_N[other_P]
        one_P, other_P = one_P[across_P], other_P[across_P]
        train_P = self._train_N[one_P]
        held_P, from_P = np.where(train_P, other_P, one_P), np.where(train_P, one_P, other_P)
        np.minimum.at(self._near_N, held_P, from_P)

    def report(self, places: Places, findings: Findings) -> None:
        """A finding for each held-out row that is given away, and one for a split with many."""
        if not self.possible:
            return
        held = np.flatnonzero(~self._train_N)
        ways = [(EXACT, self._same(self._both_N, held)), (INPUT, self._same(self.input_N, held))]
        ways.append((NEAR, self._nearest()[held]))
        left = np.ones(len(held), np.bool_)
        given = np.zeros(len(self._splits_N), np.bool_)
        for rule, partner_H in ways:
            giving = self._giving(rule)
            rows = np.flatnonzero(left & (partner_H < self._none))
            left[rows] = False
            given[held[rows]] = True
            for row in rows.tolist():
                partner = int(partner_H[row])
                self._add(rule, int(held[row]), partner, giving(partner), places, findings)
        self._judge(given, places, findings)

    def summary(self) -> dict[str, dict[str, int]]:
        """Rows given away of each held-out split, by rule."""
        return self._counts

    def _same(self, keys_N: Keys, held: Any) -> Any:
        """First training row with the same key as each held-out row."""
        train = np.flatnonzero(self._train_N)
        known, first = np.unique(keys_N[train], return_index=True)
        at_H = np.minimum(np.searchsorted(known, keys_N[held]), len(known) - 1)
        same_H = known[at_H] == keys_N[held]
        return np.where(same_H, train[first[at_H]], self._none)

    def _nearest(self) -> Any:
        """As ``_near_N``, with what was found for one row told to the others that ask the same."""
        first_N = firsts(self.input_N)
        best_N = np.full(self._none, self._none)
        np.minimum.at(best_N, first_N, self._near_N)
        return best_N[first_N]

    def _giving(self, rule: Rule) -> Callable[[int], list[int]]:
        """From a training row to all training rows that give the same away."""
        keys_N = self._both_N if rule is EXACT else self.input_N
        train = np.flatnonzero(self._train_N)
        order = train[np.argsort(keys_N[train], kind="stable")]
        sorted_N = keys_N[order]

        def rows(partner: int) -> list[int]:
            low, high = (np.searchsorted(sorted_N, keys_N[partner], s) for s in ("left", "right"))
            found: list[int] = order[low:high].tolist()
            return found

        return rows

    def _add(
        self,
        rule: Rule,
        row: int,
        partner: int,
        giving: list[int],
        places: Places,
        findings: Findings,
    ) -> None:
        split, other = places.split(row), places.place(partner)
        count = self._counts.setdefault(split, {})
        count[rule.id] = count.get(rule.id, 0) + 1
        how = {
            EXACT.id: f"this {split} row is also the training row",
            INPUT.id: f"this {split} row asks the same, with another answer, as the training row",
            NEAR.id: f"this {split} row asks nearly the same as the training row",
        }[rule.id]
        finding = Finding(rule, places.place(row), f"{how} {other}.", others=(other,))
        findings.add(finding, rows=giving)

    def _judge(self, given_N: Any, places: Places, findings: Findings) -> None:
        """Refuse a split of which too much is given away."""
        for number, split in enumerate(places.names()):
            rows = np.flatnonzero(self._splits_N == number)
            count = int(given_N[rows].sum())
            if count < FEWEST or count < TOO_MANY * len(rows):
                continue
            file = places.place(int(rows[0])).file
            share = f"{count} of {len(rows)} {split} rows ({count / len(rows):.0%})"
            message = f"{share} are in the training rows, or nearly."
            findings.add(Finding(MANY, Place(file, 0), message))
