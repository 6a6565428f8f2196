"""Check for repeated rows: exact copies, near-duplicates, and copies with different numbers.

A repeated row has double weight and is memorized first (Lee et al. 2022, "Deduplicating training
data makes language models better"). Near-duplicates have a Jaccard similarity of at least 0.8
between their sets of five-character shingles, without letter case, punctuation and white space
(``luthier.gate.near_duplicates``). Labelled rows are copies only if the labels agree: "turn on" and
"turn off" look alike on purpose. Questions about a context are compared within one context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch, group_finding
from luthier.gate.checks import leakage
from luthier.gate.columns import MEMORY_LIMIT, ColumnStore
from luthier.gate.near_duplicates import (
    Groups,
    NearDuplicates,
    Sketches,
    Words,
    common_shingles,
    rows_by_value,
    sketch,
)
from luthier.gate.row_keys import (
    Keys,
    combine_keys,
    comparable_texts,
    context_key,
    hash_texts,
    key_column,
    mask_numbers,
    target_key,
)
from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.types import IntArray

EXACT = Rule(
    "duplicate.exact",
    "warning",
    "A split has the same row several times.",
    "A copied row has double weight and is memorized first.",
    "Keep the first row, unless the repetition is intended.",
)
NEAR = Rule(
    "duplicate.near",
    "warning",
    "Rows of a split have nearly equal inputs and targets.",
    "Similar rows have nearly double weight, and a random split leaks the answers.",
    "Keep one of the rows.",
)
NUMBERS = Rule(
    "duplicate.numbers",
    "note",
    "Rows of a split differ in their numbers only.",
    "The model learns the template. For data about numbers, this may be intended.",
    "Keep a few of each template.",
)
SAMPLED = Rule(
    "duplicate.sampled",
    "note",
    "The search for near-duplicates and near leaks uses a sample of the rows.",
    "Counts of near-duplicates refer to the sample. Exact copies are found among all rows.",
    "To compare all rows, run `luthier clean --dedupe near`.",
    whole=True,
)
COMPARED = 500_000
"""Maximum number of rows for the near-duplicate search. The search samples larger data."""
LARGEST = 10
"""Number of group sizes in the summary."""


@dataclass(frozen=True)
class DuplicateKeys:
    """Keys of all rows of a batch, and sketches of the rows in the near-duplicate search."""

    columns: Mapping[str, Keys]
    """Key columns of all rows."""
    inputs: Sketches
    wholes: Sketches
    """Sketches of whole rows; the object of ``inputs`` if rows have no target text."""
    sketched: Mapping[str, Keys]
    """Key columns of the sketched rows: ``asked`` for ``inputs``, the remaining columns for
    ``wholes``."""


class Duplicates(Check):
    """Copies within a split, and between training and held-out rows."""

    name: ClassVar[str] = "duplicates"
    rules: ClassVar[tuple[Rule, ...]] = (EXACT, NEAR, NUMBERS, SAMPLED, *leakage.RULES)
    measures_with: ClassVar[tuple[str, ...]] = ("common", "share")

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check: compare every row if requested, and no row if no near rule is
        requested."""
        near = {NEAR.id, NUMBERS.id, leakage.NEAR.id, leakage.MANY.id}
        return cls(every=context.every, alike=context.only is None or bool(context.only & near))

    def __init__(self, limit: int = MEMORY_LIMIT, every: bool = False, alike: bool = True) -> None:
        self.common: tuple[Words, Words] | None = None
        """Shingles that nearly all inputs share, and shingles that nearly all rows share."""
        self.share = 1.0 if alike else 0.0
        """Share of the rows in the near-duplicate search."""
        self._every = every
        self._table, self._compared = ColumnStore(limit), ColumnStore(limit)
        self._inputs, self._wholes = NearDuplicates(limit), NearDuplicates(limit)
        self._apart = False
        self._summary: dict[str, Any] = {}

    def begin(self, batch: RowBatch, rows: int = 0) -> None:
        """Learn the common shingles from the first rows, and set the share of compared rows."""
        inputs, wholes = comparable_texts(batch.rows)
        self.common = (common_shingles(inputs), common_shingles(wholes))
        if self.share and not self._every and rows > COMPARED:
            self.share = COMPARED / rows

    def measure(self, batch: RowBatch) -> DuplicateKeys:
        """Keys and sketches."""
        rows, count = batch.rows, len(batch)
        inputs, wholes = comparable_texts(rows)
        texts = [(row.inputs(), row.targets()) for row in rows]
        contexts_N = key_column(map(context_key, rows), count)
        salts_N = contexts_N.astype(np.uint32)

        def within_context(keys: Iterable[int], rows_S: Any) -> Keys:
            return combine_keys(key_column(keys, len(rows_S)), contexts_N[rows_S])

        columns = {
            "exact": key_column((hash_texts(*asks, "\0", *says) for asks, says in texts), count),
            "input": within_context(map(hash_texts, inputs), np.arange(count)),
            "target": key_column((hash_texts(*says) for _, says in texts), count),
        }
        common = self.common or (None, None)
        asked = sketch(inputs, common[0], self.share, salts_N) if self.share else sketch(())
        apart = bool(self.share) and inputs != wholes
        whole = sketch(wholes, common[1], self.share, salts_N) if apart else asked
        chosen = whole.rows_N.tolist()
        of_chosen = {
            "asked": columns["input"][asked.rows_N],
            "whole": within_context((hash_texts(wholes[row]) for row in chosen), whole.rows_N),
            "said": key_column((target_key(rows[row]) for row in chosen), len(chosen)),
            "masked": within_context(
                (hash_texts(mask_numbers(wholes[row])) for row in chosen), whole.rows_N
            ),
        }
        return DuplicateKeys(columns, asked, whole, of_chosen)

    def collect(self, where: BatchLines, measured: DuplicateKeys, findings: Findings) -> None:
        """Store the keys and sketches until all rows are known."""
        for name, column in measured.columns.items():
            self._table.append(name, column)
        for name, column in measured.sketched.items():
            self._compared.append(name, column)
        self._compared.append("asked rows", measured.inputs.rows_N + where.first)
        self._compared.append("whole rows", measured.wholes.rows_N + where.first)
        self._inputs.add(measured.inputs)
        self._apart |= measured.wholes is not measured.inputs
        self._wholes.add(measured.wholes)

    def finish(self, places: Places, findings: Findings) -> None:
        """Look for copies, then for leaks."""
        if not places.total:
            return
        splits_N = places.splits_N()
        train = places.names().index("train") if "train" in places.names() else -1
        leaks = leakage.Leaks(
            splits_N, train, self._table.read("input"), self._table.read("target")
        )
        copies_N = np.zeros(places.total, np.bool_)
        self._report(EXACT, self._exact(splits_N, copies_N), places, findings)
        near, numbers = self._alike(splits_N, leaks)
        rows_S = self._compared.read("whole rows")
        groups = (rows_S[group] for group in near.members())
        # Exact copies have a finding already.
        closer = (group[~copies_N[group]] for group in groups)
        self._report(NEAR, (group for group in closer if len(group) > 1), places, findings)
        filled = (rows_S[group] for group in numbers.members())
        self._report(NUMBERS, filled, places, findings)
        del near, numbers, rows_S, copies_N
        if self._apart and leaks.possible:
            leaks.set_rows(self._compared.read("asked rows"))
            self._inputs.find(self._compared.read("asked"), leaks.is_wanted, leaks.add_pairs)
        leaks.report(places, findings)
        leaks.report_overlap(places, findings)
        self._summary["leakage"] = leaks.summary()
        if 0 < self.share < 1:
            self._report_sampling(places, findings)

    def _exact(self, splits_N: Any, copies_N: Any) -> Iterator[IntArray]:
        """Yield groups of equal rows of a split; mark all rows but the first in ``copies_N``."""
        split_N = splits_N.astype(np.uint64) + np.uint64(1)
        for group in rows_by_value(combine_keys(split_N, self._table.read("exact"))):
            copies_N[group[1:]] = True
            yield group

    def _alike(self, splits_N: Any, leaks: leakage.Leaks) -> tuple[Groups, Groups]:
        """Group near-duplicates and rows with different numbers.

        Rows without target text also contribute leaks.
        """
        rows_S = self._compared.read("whole rows")
        split_S = splits_N[rows_S].astype(np.uint64) + np.uint64(1)
        apart_S = combine_keys(split_S, self._compared.read("said"))
        whole_S, masked_S = self._compared.read("whole"), self._compared.read("masked")
        near, numbers = Groups(len(rows_S)), Groups(len(rows_S))
        if not self._apart:
            leaks.set_rows(rows_S)

        def is_wanted(one_P: Any, other_P: Any) -> Any:
            same_P = apart_S[one_P] == apart_S[other_P]
            same_P &= ~(near.together(one_P, other_P) | numbers.together(one_P, other_P))
            return same_P if self._apart else same_P | leaks.is_wanted(one_P, other_P)

        def add_pairs(one_P: Any, other_P: Any) -> None:
            if not self._apart:
                leaks.add_pairs(one_P, other_P)
            copy_P = apart_S[one_P] == apart_S[other_P]
            one_P, other_P = one_P[copy_P], other_P[copy_P]
            filled_P = masked_S[one_P] == masked_S[other_P]
            numbers.join(one_P[filled_P], other_P[filled_P])
            near.join(one_P[~filled_P], other_P[~filled_P])

        self._wholes.find(combine_keys(apart_S, whole_S), is_wanted, add_pairs)
        # Only the first row of each text is compared; rows with equal text join the same group.
        near.join_equal(combine_keys(apart_S, whole_S))
        return near, numbers

    def _report(
        self, rule: Rule, groups: Iterable[IntArray], places: Places, findings: Findings
    ) -> None:
        relation = {EXACT.id: "equal to", NEAR.id: "nearly equal to",
                    NUMBERS.id: "except for numbers equal to"}[rule.id]  # fmt: skip
        count, rows, largest = 0, 0, list[int]()
        for group in groups:
            count, rows = count + 1, rows + len(group)
            if len(largest) < LARGEST or len(group) > largest[-1]:
                largest = sorted([*largest, len(group)], reverse=True)[:LARGEST]
            copies = len(group) - 1
            message = f"{copies} more {'rows are' if copies > 1 else 'row is'} {relation} this row."
            finding = group_finding(rule, group, message, places, findings)
            findings.add(finding, copies, rows=group[1:].tolist())
        self._summary[rule.id] = {"groups": count, "copies": rows - count, "largest": largest}

    def _report_sampling(self, places: Places, findings: Findings) -> None:
        count = self._wholes.rows
        self._summary["rows_compared_for_likeness"] = {"rows": count, "of": places.total}
        message = (
            f"{count:,} of {places.total:,} rows are compared; similar rows are sampled together. All "
            f"rows may have {1 / self.share:,.1f} times as many near-duplicates."
        )
        findings.add(Finding(SAMPLED, Place(places.place(0).file, 0), message))

    def summary(self) -> Mapping[str, Any]:
        """Groups and copies of each rule, sizes of the largest groups, and leaks of each split."""
        return self._summary
