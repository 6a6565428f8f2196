"""Languages of inputs and targets, identified with py3langid.

py3langid (Barbaresi; after Lui and Baldwin 2012, langid.py) is naive Bayes on byte n-grams: offline
and deterministic. Probabilities of at least 0.9 are trusted; all others count as unknown.

The check reads the first 240 characters of the input and of the target. The check covers all of the
first 10,000 lines of a file and a decreasing share of later lines, so language identification never
dominates the run time. The summary reports the number of checked rows.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from luthier.data.languages import detect_languages
from luthier.gate.check import BatchLines, Check, Places, RowBatch
from luthier.gate.rules import Finding, Findings, Rule
from luthier.types import IntArray, Row

MIX = Rule(
    "language.mix",
    "note",
    "The rows are in several languages.",
    "The model learns each language from a part of the rows.",
    "If unintended, remove the rows in other languages.",
    whole=True,
)
OTHER = Rule(
    "language.other",
    "warning",
    "The language of the row differs from almost all rows.",
    "A few rows in another language are usually mistakes; the model learns to change the language.",
    "Translate the row, or remove it.",
)
ANSWER = Rule(
    "language.answer",
    "warning",
    "The languages of question and answer differ, unlike in almost all rows.",
    "The model learns to answer in the wrong language.",
    "Write the answer in the language of the question.",
)
SPLITS = Rule(
    "language.splits_differ",
    "warning",
    "Training and held-out rows are in different languages.",
    "Scores on the held-out rows say little about the training.",
    "Split one data set into training and held-out rows.",
    whole=True,
)
CHARACTERS = 240
ALL_UNTIL = 10_000
RARE = 0.02
"""Maximum share of a language that counts as a mistake."""
APART = 0.2
"""Limit of the total variation distance between the languages of two splits."""
LEAST_ROWS = 50


@dataclass(frozen=True)
class BatchLanguages:
    """Languages of the sampled rows of a batch."""

    rows_N: IntArray
    """Index of each in the batch."""
    codes: tuple[tuple[str, str], ...]
    """ISO 639 codes of input and target; empty if unknown or absent."""


class Language(Check):
    """Check for rows and splits in an unexpected language."""

    name: ClassVar[str] = "language"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (MIX, OTHER, ANSWER, SPLITS)
    in_jobs: ClassVar[bool] = False

    def __init__(self) -> None:
        self._rows: list[IntArray] = []
        self._codes: list[tuple[str, str]] = []
        self._splits: list[str] = []
        self._seen: Counter[str] = Counter()
        self._identified: Counter[str] = Counter()

    def measure(self, batch: RowBatch) -> BatchLanguages:
        """Identify the languages of a sample of the batch."""
        rows: list[int] = []
        texts: list[str] = []
        for index, row in enumerate(batch.rows):
            given, learned = _texts(row)
            if _is_sampled(row, given or learned):
                rows.append(index)
                texts += [given, learned]
        codes = detect_languages(texts)
        pairs = tuple(zip(codes[::2], codes[1::2], strict=True))
        return BatchLanguages(np.asarray(rows, np.int64), pairs)

    def collect(self, where: BatchLines, measured: BatchLanguages, findings: Findings) -> None:
        """Keep the codes of the sample."""
        self._rows.append(measured.rows_N + where.first)
        self._codes += measured.codes
        self._splits += [where.split] * len(measured.codes)
        self._seen[where.split] += len(where.lines_N)
        self._identified[where.split] += len(measured.codes)

    def finish(self, places: Places, findings: Findings) -> None:
        """Report rows and splits that differ from the rest."""
        rows_N = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)
        for side, part in enumerate(("input", "target")):
            self._strays(side, part, rows_N, places, findings)
        self._answers(rows_N, places, findings)
        self._compare_splits(places, findings)

    def _strays(
        self, side: int, part: str, rows_N: IntArray, places: Places, findings: Findings
    ) -> None:
        counts = Counter(codes[side] for codes in self._codes if codes[side])
        total = sum(counts.values())
        if total < LEAST_ROWS:
            return
        main, _ = counts.most_common(1)[0]
        common = {code for code, count in counts.items() if count > RARE * total}
        if len(common) > 1:
            shares = ", ".join(
                f"{code} {n / total:.0%}" for code, n in counts.most_common() if code in common
            )
            finding = Finding(MIX, places.place(0), f"The languages of the {part} are {shares}.")
            findings.add(finding)
        # Many rows in rare languages mean a multilingual data set, not mistakes.
        rare = total - sum(counts[code] for code in common)
        if rare > 2 * RARE * total:
            return
        for number, codes in zip(rows_N.tolist(), self._codes, strict=True):
            if codes[side] and codes[side] not in common:
                message = f"The {part} is in {codes[side]!r}; most rows are in {main!r}."
                findings.add(Finding(OTHER, places.place(number), message))

    def _answers(self, rows_N: IntArray, places: Places, findings: Findings) -> None:
        pairs = [(n, *codes) for n, codes in zip(rows_N.tolist(), self._codes, strict=True)]
        both = [(number, one, two) for number, one, two in pairs if one and two]
        apart = [(number, one, two) for number, one, two in both if one != two]
        if len(both) < LEAST_ROWS or len(apart) > 2 * RARE * len(both):
            return
        for number, one, two in apart:
            message = f"The question is in {one!r}, and the answer in {two!r}."
            findings.add(Finding(ANSWER, places.place(number), message))

    def _compare_splits(self, places: Places, findings: Findings) -> None:
        shares = self._shares()
        if "train" not in shares:
            return
        for split, parts in shares.items():
            for part, counts in parts.items():
                trained = shares["train"].get(part, Counter())
                if split == "train" or min(counts.total(), trained.total()) < LEAST_ROWS:
                    continue
                names = counts.keys() | trained.keys()
                distance = 0.5 * sum(
                    abs(counts[name] / counts.total() - trained[name] / trained.total())
                    for name in names
                )
                if distance > APART:
                    most, usual = counts.most_common(1)[0][0], trained.most_common(1)[0][0]
                    message = (
                        f"The {part} is mostly in {most!r} in {split}, and in {usual!r} in train; the "
                        f"languages differ in {distance:.0%} of the rows."
                    )
                    findings.add(Finding(SPLITS, places.place(0), message))

    def _shares(self) -> dict[str, dict[str, Counter[str]]]:
        found: dict[str, dict[str, Counter[str]]] = {}
        for split, codes in zip(self._splits, self._codes, strict=True):
            for part, code in zip(("input", "target"), codes, strict=True):
                if code:
                    found.setdefault(split, {}).setdefault(part, Counter())[code] += 1
        return found

    def summary(self) -> Mapping[str, Any]:
        """Return the rows per language for each split and part, and the sizes of the samples."""
        return {
            "splits": {
                split: {
                    part: {"counts": dict(counts), "of": self._subset(split, counts)}
                    for part, counts in parts.items()
                }
                for split, parts in self._shares().items()
            },
        } | (
            {"rows": dict(self._seen), "rows_told": dict(self._identified), "sampled": True}
            if self._identified != self._seen
            else {"sampled": False}
        )

    def _subset(self, split: str, counts: Counter[str]) -> str:
        """Describe the sample behind ``counts``; empty if the sample is the whole split."""
        if counts.total() == self._seen[split]:
            return ""
        looked_at = self._identified[split]
        drawn = "" if looked_at == self._seen[split] else f" (sample of {self._seen[split]:,})"
        return f"recognized in {counts.total():,} of {looked_at:,} rows{drawn}"


def _texts(row: Row) -> tuple[str, str]:
    """The beginning of the last input, and of the first target."""
    given = learned = ""
    for text in row.texts():
        if text.part == "input" and not learned:
            given = text.content[:CHARACTERS]
        elif text.part == "target" and not learned:
            learned = text.content[:CHARACTERS]
    return given, learned


def _is_sampled(row: Row, text: str) -> bool:
    """Return True for all rows up to a line, and for a decreasing share of later rows.

    The decision depends on the row alone, so batch borders do not matter.
    """
    if row.line <= ALL_UNTIL:
        return True
    drawn = zlib.crc32(f"{row.line}\0{text}".encode("utf-8", "surrogatepass"))
    return drawn / 2**32 < ALL_UNTIL / row.line
