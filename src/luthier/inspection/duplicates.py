"""Rows that come more than once: the same, nearly the same, or the same but for their numbers.

A repeated row weighs double and is learned by heart first (Lee et al. 2022, "Deduplicating training
data makes language models better"). Near means a Jaccard similarity of at least 0.8 between the sets
of their characters five by five, letter case, punctuation and white space aside
(``luthier.inspection.shingles``).
Labelled rows are copies only with the same label: "turn on" and "turn off" are meant to look alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from luthier.inspection import leakage
from luthier.inspection.check import Batch, Check, Places, Where
from luthier.inspection.columns import LIMIT, Table
from luthier.inspection.findings import Finding, Findings, Rule
from luthier.inspection.groups import Groups, runs
from luthier.inspection.identity import Keys, compared, key, keys, masked, mixed, teaching
from luthier.inspection.near import Near
from luthier.inspection.shingles import Sketches, Words, common_shingles, sketch
from luthier.inspection.texts import input_of, target_of
from luthier.types import IntArray

EXACT = Rule(
    "duplicate.exact",
    "warning",
    "The same row comes more than once in a split.",
    "It counts double in every pass and is learned by heart before the others are learned.",
    "Keep the first, unless the repetition is meant.",
)
NEAR = Rule(
    "duplicate.near",
    "warning",
    "Rows of a split are nearly the same, in what they ask and in what they teach.",
    "They count almost double, and a split of them puts the answer on both sides.",
    "Keep one of them.",
)
NUMBERS = Rule(
    "duplicate.numbers",
    "note",
    "Rows of a split differ in their numbers only.",
    "Filled-in templates teach the template; for data about numbers that may be the purpose.",
    "Keep a few of each template.",
)
NAMED = 100
"""Rows of a group that a finding names."""


@dataclass(frozen=True)
class Measured:
    """Keys and sketches of a batch; the second sketches are ``None`` where rows are all input."""

    columns: Mapping[str, Keys]
    inputs: Sketches
    wholes: Sketches | None


class Duplicates(Check):
    """Copies within a split, and between training and held-out rows."""

    name: ClassVar[str] = "duplicates"
    rules: ClassVar[tuple[Rule, ...]] = (EXACT, NEAR, NUMBERS, *leakage.RULES)
    measures_with: ClassVar[tuple[str, ...]] = ("common",)

    def __init__(self, limit: int = LIMIT) -> None:
        self.common: tuple[Words, Words] | None = None
        """Shingles that nearly all rows share, of the inputs and of whole rows."""
        self._table, self._limit = Table(limit), limit
        self._inputs, self._wholes = Near(limit), Near(limit)
        self._apart = False
        self._summary: dict[str, Any] = {}
        self.originals: dict[str, IntArray] = {}
        """By rule, ``[N]`` number of the row that each row repeats; its own where it repeats none."""

    def begin(self, batch: Batch) -> None:
        """Learn what rows are written in from the first of them."""
        inputs, wholes = compared(batch.rows)
        self.common = (common_shingles(inputs), common_shingles(wholes))

    def measure(self, batch: Batch) -> Measured:
        """Keys and sketches."""
        rows, count = batch.rows, len(batch)
        inputs, wholes = compared(rows)
        texts = [(input_of(row), target_of(row)) for row in rows]
        columns = {
            "exact": keys((key(*asks, "\0", *says) for asks, says in texts), count),
            "input": keys((key(text) for text in inputs), count),
            "target": keys((key(*says) for _, says in texts), count),
            "whole": keys((key(text) for text in wholes), count),
            "said": keys(map(teaching, rows), count),
            "masked": keys((key(masked(text)) for text in wholes), count),
        }
        common = self.common or (None, None)
        apart = inputs != wholes
        return Measured(
            columns, sketch(inputs, common[0]), sketch(wholes, common[1]) if apart else None
        )

    def take(self, where: Where, measured: Measured, findings: Findings) -> None:
        """Keep them; nothing can be said before the last row."""
        for name, column in measured.columns.items():
            self._table.append(name, column)
        self._inputs.add(measured.inputs)
        self._apart |= measured.wholes is not None
        self._wholes.add(measured.wholes or measured.inputs)

    def finish(self, places: Places, findings: Findings) -> None:
        """Look for copies, then for leaks."""
        if not places.total:
            return
        splits_N = places.splits_N()
        train = places.names().index("train") if "train" in places.names() else -1
        leaks = leakage.Leaks(splits_N, train, *(self._key(n) for n in ("input", "target")))
        copies = self._copies(splits_N, leaks)
        if self._apart and leaks.possible:
            self._inputs.find(leaks.input_N, leaks.wanted, leaks.found)
        self._report(copies, places, findings)
        leaks.report(places, findings)
        self._summary["leakage"] = leaks.summary()

    def _key(self, name: str) -> Keys:
        found: Keys = self._table.read(name)
        return found

    def _copies(self, splits_N: Any, leaks: leakage.Leaks) -> list[tuple[Rule, list[IntArray]]]:
        """Groups of each rule; where rows are all input, leaks are found in the same pass."""
        split_N = splits_N.astype(np.uint64) + np.uint64(1)
        apart_N = mixed(split_N, self._key("said"))
        exact_N = mixed(split_N, self._key("exact"))
        whole_N, masked_N = self._key("whole"), self._key("masked")
        near, numbers = Groups(len(splits_N)), Groups(len(splits_N))

        def wanted(one_P: Any, other_P: Any) -> Any:
            same_P = apart_N[one_P] == apart_N[other_P]
            same_P &= ~(near.together(one_P, other_P) | numbers.together(one_P, other_P))
            return same_P if self._apart else same_P | leaks.wanted(one_P, other_P)

        def found(one_P: Any, other_P: Any) -> None:
            if not self._apart:
                leaks.found(one_P, other_P)
            copy_P = apart_N[one_P] == apart_N[other_P]
            one_P, other_P = one_P[copy_P], other_P[copy_P]
            filled_P = masked_N[one_P] == masked_N[other_P]
            numbers.join(one_P[filled_P], other_P[filled_P])
            near.join(one_P[~filled_P], other_P[~filled_P])

        self._wholes.find(mixed(apart_N, whole_N), wanted, found)
        # Only the first of rows with one text was compared; the others are as near as it is.
        _follow(near, mixed(apart_N, whole_N))
        exact = list(runs(exact_N))
        first_N = np.arange(len(splits_N))
        for group in exact:
            first_N[group] = group[0]
        self.originals = {EXACT.id: first_N, NEAR.id: near.roots_N, NUMBERS.id: numbers.roots_N}
        alone_N = first_N == np.arange(len(first_N))
        # Copies of a row that is named already say nothing new.
        closer = [group[alone_N[group]] for group in near.members()]
        return [
            (EXACT, exact),
            (NEAR, [group for group in closer if len(group) > 1]),
            (NUMBERS, list(numbers.members())),
        ]

    def _report(
        self, copies: list[tuple[Rule, list[IntArray]]], places: Places, findings: Findings
    ) -> None:
        words = {EXACT.id: "the same as", NEAR.id: "nearly the same as",
                 NUMBERS.id: "but for its numbers the same as"}  # fmt: skip
        for rule, groups in copies:
            sizes = sorted((len(group) for group in groups), reverse=True)
            self._summary[rule.id] = {
                "groups": len(groups),
                "copies": sum(sizes) - len(sizes),
                "largest": sizes[:10],
            }
            for group in groups:
                further = len(group) - 1
                rows = "rows are" if further > 1 else "row is"
                message = f"{further} further {rows} {words[rule.id]} this one."
                others = tuple(places.place(int(row)) for row in group[1 : NAMED + 1])
                place = places.place(int(group[0]))
                finding = Finding(rule, place, message, others=others)
                findings.add(finding, further, rows=group[1:].tolist())

    def summary(self) -> Mapping[str, Any]:
        """Groups and copies of each rule, sizes of the largest groups, and leaks of each split."""
        return self._summary


def _follow(groups: Groups, keys_N: Keys) -> None:
    """Join rows with the same key."""
    order = np.argsort(keys_N, kind="stable")
    same = np.flatnonzero(keys_N[order][1:] == keys_N[order][:-1])
    groups.join(order[same], order[same + 1])
