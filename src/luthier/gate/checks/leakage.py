"""Check for held-out rows that also occur in the training rows, exactly or nearly.

The comparison of questions ignores letter case, punctuation and white space.

Leaked rows measure memory instead of skill. A few leaked rows change a score by at most their
share, so each leak is a warning. If a tenth of a split leaks, the scores mean nothing and the gate
rejects the data. (Banking77 repeats 0.8 % of its test texts, which is no reason to stop.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.gate.check import Places
from luthier.gate.near_duplicates import first_rows
from luthier.gate.row_keys import Keys, combine_keys
from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.types import IntArray

_WHY = "The score measures memory."
_FIX = "Remove one of the rows; `luthier split` makes splits without leaks."
EXACT = Rule(
    "leakage.exact",
    "warning",
    "A held-out row is also a training row, with the same answer.",
    _WHY,
    _FIX,
)
INPUT = Rule(
    "leakage.input",
    "warning",
    "A held-out row has the input of a training row, with another answer.",
    "The score measures memory, or the rows contradict each other.",
    _FIX,
)
NEAR = Rule(
    "leakage.near", "warning", "A held-out row has nearly the input of a training row.", _WHY, _FIX
)
MANY = Rule(
    "leakage.many",
    "error",
    "At least a tenth of a held-out split is in the training rows.",
    "The scores of the split measure memory.",
    "Make new splits with `luthier split`, or remove the rows from one split.",
    whole=True,
)
OVERLAP = Rule(
    "split.overlap",
    "warning",
    "A test row has the input of a validation row.",
    "Validation rows select settings and the stopping time, so the test score is too high.",
    "Remove one of the rows; `luthier split` makes splits without leaks.",
)
RULES = (EXACT, INPUT, NEAR, MANY, OVERLAP)
TOO_MANY = 0.1
"""Maximum share of leaked rows in a held-out split."""
FEWEST = 5
"""Minimum number of leaked rows for the share rule. Small splits have uncertain shares."""


class Leaks:
    """First training row that leaks each held-out row.

    Args:
        splits_N: split index of each row.
        train: split index of the training rows.
        input_N: key of each row's input.
        target_N: key of each row's target.
    """

    def __init__(self, splits_N: Any, train: int, input_N: Keys, target_N: Keys) -> None:
        self._splits_N, self._input_N = splits_N, input_N
        self._both_N = combine_keys(input_N, target_N)
        self._train_N = splits_N == train
        self._none = len(splits_N)
        self.possible = bool(self._train_N.any() and not self._train_N.all())
        self._rows_S: IntArray = np.zeros(0, np.int64)
        self._counts: dict[str, dict[str, int]] = {}

    def set_rows(self, rows_S: IntArray) -> None:
        """Set the rows that later pairs refer to by position."""
        self._rows_S, self._train_S = rows_S, self._train_N[rows_S]
        self._near_S = np.full(len(rows_S), self._none)
        """Number of the near training row; ``_none`` without such a row."""

    def is_wanted(self, one_P: Any, other_P: Any) -> Any:
        """Return True for pairs of a training row and a held-out row without a leak so far."""
        train_P = self._train_S[one_P]
        across_P = train_P != self._train_S[other_P]
        return across_P & (self._near_S[np.where(train_P, other_P, one_P)] == self._none)

    def add_pairs(self, one_P: Any, other_P: Any) -> None:
        """Add pairs of near-duplicates."""
        across_P = self._train_S[one_P] != self._train_S[other_P]
        one_P, other_P = one_P[across_P], other_P[across_P]
        train_P = self._train_S[one_P]
        held_P, from_P = np.where(train_P, other_P, one_P), np.where(train_P, one_P, other_P)
        np.minimum.at(self._near_S, held_P, self._rows_S[from_P])

    def report(self, places: Places, findings: Findings) -> None:
        """Report each leaked held-out row, and each split with many leaks."""
        if not self.possible:
            return
        held = np.flatnonzero(~self._train_N)
        left = np.ones(len(held), np.bool_)
        given = np.zeros(len(self._splits_N), np.bool_)
        near_H = self._nearest(held)
        for rule, key_N in ((EXACT, self._both_N), (INPUT, self._input_N), (NEAR, self._input_N)):
            leaking = _KeyIndex(key_N, self._train_N)
            partner_H = near_H if rule is NEAR else leaking.first(key_N[held], self._none)
            rows = np.flatnonzero(left & (partner_H < self._none))
            left[rows] = False
            given[held[rows]] = True
            for row in rows.tolist():
                partner = int(partner_H[row])
                rows_T = leaking.rows(key_N[partner])
                self._add(rule, int(held[row]), partner, rows_T, places, findings)
        self._judge(given, places, findings)

    def report_overlap(self, places: Places, findings: Findings) -> None:
        """Report each test row with the question of a validation row."""
        names = places.names()
        if not {"validation", "test"} <= set(names):
            return
        rows = np.flatnonzero(self._splits_N == names.index("test"))
        validation = _KeyIndex(self._input_N, self._splits_N == names.index("validation"))
        partner_R = validation.first(self._input_N[rows], self._none)
        for row in np.flatnonzero(partner_R < self._none).tolist():
            other = places.place(int(partner_R[row]))
            message = f"this test row has the input of the validation row {other}."
            finding = Finding(OVERLAP, places.place(int(rows[row])), message, others=(other,))
            findings.add(finding)

    def summary(self) -> dict[str, dict[str, int]]:
        """Return the number of leaked rows per held-out split and rule."""
        return self._counts

    def _nearest(self, held: IntArray) -> IntArray:
        """Return the near training row of each held-out row. Rows with equal input share one
        result."""
        near_H: IntArray = np.full(len(held), self._none)
        if not len(self._rows_S):
            return near_H
        mine = np.flatnonzero(self._near_S < self._none)
        at = np.searchsorted(held, self._rows_S[mine])
        np.minimum.at(near_H, at, self._near_S[mine])
        first_H = first_rows(self._input_N[held])
        best_H = np.full(len(held), self._none)
        np.minimum.at(best_H, first_H, near_H)
        return best_H[first_H]

    def _add(
        self,
        rule: Rule,
        row: int,
        partner: int,
        leaking: list[int],
        places: Places,
        findings: Findings,
    ) -> None:
        split, other = places.split(row), places.place(partner)
        count = self._counts.setdefault(split, {})
        count[rule.id] = count.get(rule.id, 0) + 1
        how = {
            EXACT.id: f"this {split} row equals the training row",
            INPUT.id: f"this {split} row has another answer than, and the input of, the training row",
            NEAR.id: f"this {split} row has nearly the input of the training row",
        }[rule.id]
        finding = Finding(rule, places.place(row), f"{how} {other}.", others=(other,))
        findings.add(finding, rows=leaking)

    def _judge(self, given_N: Any, places: Places, findings: Findings) -> None:
        """Reject a split with too many leaked rows."""
        for number, split in enumerate(places.names()):
            rows = np.flatnonzero(self._splits_N == number)
            count = int(given_N[rows].sum())
            if count < FEWEST or count < TOO_MANY * len(rows):
                continue
            file = places.place(int(rows[0])).file
            share = f"{count} of {len(rows)} {split} rows ({count / len(rows):.0%})"
            message = f"{share} are in the training rows, exactly or nearly."
            findings.add(Finding(MANY, Place(file, 0), message))


class _KeyIndex:
    """Index of some of the rows by key."""

    def __init__(self, key_N: Keys, is_indexed_N: Any) -> None:
        rows = np.flatnonzero(is_indexed_N)
        order = np.argsort(key_N[rows], kind="stable")
        self._rows, self._keys = rows[order], key_N[rows][order]

    def first(self, keys_H: Keys, none: int) -> IntArray:
        """Return the first row with each key; ``none`` without a row."""
        at_H = np.minimum(np.searchsorted(self._keys, keys_H), len(self._keys) - 1)
        return np.where(self._keys[at_H] == keys_H, self._rows[at_H], none)

    def rows(self, key: np.uint64) -> list[int]:
        """Return all rows with ``key``."""
        low, high = (np.searchsorted(self._keys, key, side) for side in ("left", "right"))
        found: list[int] = self._rows[low:high].tolist()
        return found
