"""Check for rows with equal input and different targets, and for passages with two roles.

Two labels for one text are usually a mistake; a text with two valid labels needs both. Two
completions of one prompt are often equally good, so the check only reports a note. The comparison
ignores letter case, punctuation and white space.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.preferences import JudgedAnswers
from luthier.data.shapes.texts import TextPair
from luthier.gate.check import BatchLines, Check, Places, RowBatch, group_finding
from luthier.gate.checks.balance import spelling_key
from luthier.gate.columns import MEMORY_LIMIT, ColumnStore
from luthier.gate.near_duplicates import normalize, rows_by_value
from luthier.gate.row_keys import hash_texts, key_column
from luthier.gate.rules import Findings, Rule
from luthier.types import IntArray, Row

LABEL = Rule(
    "label.contradiction",
    "warning",
    "Rows with the same text have different labels, tags, ratings or judgements.",
    "The model learns the mean of the targets.",
    "Correct the wrong row: tags must be equal. If both labels are right, write an array of labels.",
    drop=True,
)
PASSAGE = Rule(
    "pair.contradiction",
    "warning",
    "A passage is the positive of a query in one row, and a negative in another row.",
    "The rows cancel each other.",
    "Remove the passage from the negatives, or remove the row.",
    drop=True,
)
PREFERENCE = Rule(
    "preference.contradiction",
    "warning",
    "Two rows have opposite preferences between two answers to a prompt.",
    "The two rows cancel each other.",
    "Keep the correct row, or remove both.",
    drop=True,
)
ANSWERS = Rule(
    "answer.several",
    "note",
    "A prompt has different answers.",
    "Good answers teach variety; contradicting answers teach the mean.",
    "Check all answers.",
)
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_KINDS = (LABEL, PREFERENCE, ANSWERS)
"""Rules by the kind of a row."""


class Contradictions(Check):
    """Comparison of the targets of rows with equal input, across all splits."""

    name: ClassVar[str] = "contradictions"
    rules: ClassVar[tuple[Rule, ...]] = (*_KINDS, PASSAGE)

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._table = ColumnStore(limit)
        self._summary: dict[str, Any] = {}

    def measure(self, batch: RowBatch) -> Mapping[str, Any]:
        """Compute the kind, the input key and the target key of each row."""
        parts = [_parts(row) for row in batch.rows]
        count = len(parts)
        pairs = [row if isinstance(row, TextPair) else None for row in batch.rows]
        negatives = [
            (index, _passage_key(row, text))
            for index, row in enumerate(pairs)
            if row is not None
            for text in row.negatives
        ]
        replies = [
            (index, hash_texts(text))
            for index, row in enumerate(batch.rows)
            for text in row.other_replies
        ]
        return {
            "positive": key_column(
                (_passage_key(row, row.positive) if row else 0 for row in pairs), count
            ),
            "negative": key_column((key for _, key in negatives), len(negatives)),
            "negative_row": np.array([index for index, _ in negatives], np.int64),
            "reply": key_column((key for _, key in replies), len(replies)),
            "reply_row": np.array([index for index, _ in replies], np.int64),
            "kind": np.fromiter((kind for kind, _, _ in parts), np.uint8, count),
            "asked": key_column((asked for _, asked, _ in parts), count),
            "taught": key_column((taught for _, _, taught in parts), count),
        }

    def collect(self, where: BatchLines, measured: Mapping[str, Any], findings: Findings) -> None:
        """Store the keys until all rows are known."""
        for name, column in measured.items():
            self._table.append(name, column + where.first if name.endswith("_row") else column)

    def finish(self, places: Places, findings: Findings) -> None:
        """Report inputs with different targets."""
        if not places.total:
            return
        asked_N, taught_N, kind_N = map(self._table.read, ("asked", "taught", "kind"))
        replies: defaultdict[int, set[int]] = defaultdict(set)
        for row, reply in zip(*map(self._table.read, ("reply_row", "reply")), strict=True):
            replies[int(row)].add(int(reply))
        for group in rows_by_value(asked_N):
            different, kind = len(np.unique(taught_N[group])), int(kind_N[group[0]])
            if different > 1 and kind < len(_KINDS):
                sets = [{int(taught_N[row])} | replies.get(row, set()) for row in group.tolist()]
                if set.intersection(*sets):
                    continue  # A reply that is correct in all rows.
                self._add(_KINDS[kind], different, group, places, findings)
        positive_N, negative_M, rows_M = map(
            self._table.read, ("positive", "negative", "negative_row")
        )
        order_M = np.argsort(negative_M, kind="stable")
        sorted_M, rows_M = negative_M[order_M], rows_M[order_M]
        starts_N, ends_N = (np.searchsorted(sorted_M, positive_N, side) for side in _SIDES)
        for row in np.flatnonzero(ends_N > starts_N).tolist():
            rejects_K = np.unique(rows_M[starts_N[row] : ends_N[row]])
            group = np.concatenate([[row], rejects_K[rejects_K != row]])
            self._add_passage(group, places, findings)

    def _add_passage(self, group: IntArray, places: Places, findings: Findings) -> None:
        """Report the row with a passage as positive, and the rows with the passage as negative."""
        count = self._summary.setdefault(PASSAGE.id, {"inputs": 0, "rows": 0})
        count["inputs"] += 1
        count["rows"] += 1
        message = "the positive is a negative of the same query in another row."
        findings.add(group_finding(PASSAGE, group, message, places, findings))

    def _add(
        self, rule: Rule, different: int, group: IntArray, places: Places, findings: Findings
    ) -> None:
        count = self._summary.setdefault(rule.id, {"inputs": 0, "rows": 0})
        count["inputs"] += 1
        count["rows"] += len(group)
        conflict = {
            LABEL: f"one text has {different} labels",
            PREFERENCE: "two answers have opposite preferences",
            ANSWERS: f"one prompt has {different} answers",
        }[rule]
        message = f"{conflict}, in {len(group)} rows."
        finding = group_finding(rule, group, message, places, findings)
        findings.add(finding, rows=group.tolist())

    def summary(self) -> Mapping[str, Any]:
        """Return the affected inputs and rows of each rule."""
        return self._summary


def _passage_key(row: TextPair, passage: str) -> int:
    return hash_texts("passage", normalize(row.text), "\0", normalize(passage))


def _parts(row: Row) -> tuple[int, int, int]:
    """Return the index of the rule, the input key and the target key of a row."""
    asks = [normalize(text) for text in row.inputs()]
    if isinstance(row, JudgedAnswers):
        answers = ["\0".join(turn.whole_text for turn in answer) for answer in row.answers()]
        if len(answers) > 1:
            return 1, hash_texts("ranking", *asks, "\0", *sorted(answers)), hash_texts(*answers)
        return 0, hash_texts("judged", *asks, "\0", *answers), hash_texts(*row.judgement())
    says = row.targets()
    if isinstance(row, Labelled):  # `label.spelling` reports different spellings
        says = tuple(sorted("\0".join(spelling_key(name)) for name in row.labels))
    if row.annotated:
        return 0, hash_texts("named", *asks), hash_texts(*says)
    if not says or isinstance(row, MediaRow):  # many images share a caption
        return len(_KINDS), hash_texts("bare", *asks), 0
    first = says[: len(says) - len(row.other_replies)]
    return 2, hash_texts("written", *asks), hash_texts(*first)
