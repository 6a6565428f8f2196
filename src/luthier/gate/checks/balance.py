"""How often each label comes in each split: classes too small, too frequent, misspelt or unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from luthier.data.parsing import quote
from luthier.data.shapes import Labelled, TaggedWords
from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch
from luthier.gate.near_duplicates import normalize
from luthier.gate.rules import ONE_CLASS, UNSEEN, Finding, Findings, Place, Rule
from luthier.printable import nearest_name
from luthier.types import Row

SMALL = Rule(
    "label.few_rows",
    "warning",
    "A class has fewer than 8 training rows.",
    "What so few rows teach depends on which they are.",
    "Add rows of it, or merge it with a class of nearly the same meaning.",
    whole=True,
)
SPELLING = Rule(
    "label.spelling",
    "warning",
    "Names of labels differ in letter case, white space or punctuation only.",
    "They are learned as two classes with the same meaning.",
    "Write the label in one way.",
    whole=True,
)
UNEVEN = Rule(
    "label.imbalance",
    "note",
    "One class has nine of ten training rows, or a hundred times those of another.",
    "Accuracy is high for a model that knows one answer only.",
    "Compare by macro F1, which `luthier evaluate` prints too; add rows of the rare classes, or let "
    "them count more with `objective.class_weights=balanced` (of `objective.method=classification`).",
    whole=True,
)
FEWEST = 8
"""Rows of a class: the fewest with which Tunstall et al. (SetFit, arXiv:2209.11055) report figures."""
FREQUENT = 5
"""So many times the rows of a rare label has the one that it may be a misspelling of."""
MOST_COMPARED = 1000
"""Labels up to which each rare one is compared with the frequent ones."""
SHOWN = 200
"""Labels of the summary, the most frequent first."""

_Counts = dict[str, tuple[int, int]]
"""Of each label, its rows and the line of the first."""


class Balance(Check):
    """Labels of texts, and names of what words are tagged as."""

    name: ClassVar[str] = "balance"
    rules: ClassVar[tuple[Rule, ...]] = (ONE_CLASS, UNSEEN, SMALL, SPELLING, UNEVEN)

    @classmethod
    def of(cls, known: CheckContext) -> Self:
        """Where an objective is fitted to the rows, that says what it cannot learn."""
        return cls(fitted=known.chat is not None)

    def __init__(self, fitted: bool = False) -> None:
        self.fitted = fitted
        """Whether labels that cannot be learned at all are found by fitting the objective."""
        self.counts: dict[str, Counter[str]] = {}
        """Rows of each label, by split."""
        self._places: dict[tuple[str, str], Place] = {}
        self._rows: Counter[str] = Counter()
        self._tagged = self._several = False

    def measure(self, batch: RowBatch) -> tuple[_Counts, int, bool, bool]:
        """Labels of the batch, rows that have any, and whether they are tags or several a row."""
        counts: _Counts = {}
        labelled = 0
        for index, row in enumerate(batch.rows):
            names = set(labels_of(row))
            labelled += isinstance(row, Labelled | TaggedWords)
            for name in names:
                count, first = counts.get(name, (0, index))
                counts[name] = (count + 1, first)
        tagged = any(isinstance(row, TaggedWords) for row in batch.rows)
        several = any(
            isinstance(row, Labelled) and not isinstance(row.label, str) for row in batch.rows
        )
        return counts, labelled, tagged, several

    def take(
        self, where: BatchLines, measured: tuple[_Counts, int, bool, bool], findings: Findings
    ) -> None:
        """Add up, and remember where each label comes first."""
        counts, labelled, tagged, several = measured
        self._rows[where.split] += labelled
        self._tagged |= tagged
        self._several |= several
        total = self.counts.setdefault(where.split, Counter())
        for name, (count, first) in counts.items():
            total[name] += count
            self._places.setdefault((where.split, name), where.place(first))

    def finish(self, places: Places, findings: Findings) -> None:
        """Say what the counts show."""
        if not any(self._rows.values()):
            return
        train = self.counts.get("train", Counter())
        if self._rows["train"]:
            self._judge(train, findings)
        self._spelling(findings)
        for split, counts in self.counts.items():
            for name in sorted(counts.keys() - train.keys()) if train and not self.fitted else ():
                message = (
                    f"{quote(name)} has {_count_rows(counts[name])} in {split} and none in train."
                )
                findings.add(Finding(UNSEEN, self._places[split, name], message))

    def _judge(self, train: Counter[str], findings: Findings) -> None:
        if len(train) == 1 and not (self._tagged or self._several or self.fitted):
            name = next(iter(train))
            place = Place(self._places["train", name].file, 0)
            findings.add(Finding(ONE_CLASS, place, f"every row has the label {quote(name)}."))
            return
        by_place = sorted(train.items(), key=lambda each: self._places["train", each[0]].number)
        for name, count in by_place:
            if count < FEWEST:
                message = f"{quote(name)} has {_count_rows(count)}; "
                message += f"{FEWEST - count} more would make {FEWEST}."
                fix = (
                    f"Add {_count_rows(FEWEST - count)} with this label, or merge it with one of "
                    "nearly the same meaning."
                )
                if meant := _likely_spelling(name, train):
                    message += f" It may be a misspelling of {quote(meant)}"
                    message += f" ({_count_rows(train[meant])})."
                    fix = f"If {quote(meant)} is meant, write it so; if not: {fix}"
                findings.add(Finding(SMALL, self._places["train", name], message, fix))
        if len(train) < 2 or self._tagged:
            return
        (often, most), (rare, least) = train.most_common(1)[0], train.most_common()[-1]
        if most >= 0.9 * self._rows["train"] or most >= 100 * least:
            share = most / self._rows["train"]
            message = f"{quote(often)} has {share:.1%} of the rows, "
            message += f"{quote(rare)} has {_count_rows(least)}."
            place = Place(self._places["train", often].file, 0)
            findings.add(Finding(UNEVEN, place, message))

    def _spelling(self, findings: Findings) -> None:
        """Names that are one to people."""
        first: dict[str, tuple[str, Place]] = {}
        for (_, name), place in self._places.items():
            other, where = first.setdefault(normalize(name.replace("_", " ")), (name, place))
            if other != name:
                message = (
                    f"the label {quote(name)} differs from {quote(other)} in its spelling only."
                )
                findings.add(Finding(SPELLING, place, message, others=(where,)))

    def summary(self) -> Mapping[str, Any]:
        """Rows of each label in each split, labelled rows, and how many labels there are."""
        if not any(self.counts.values()):
            return {}
        names = Counter[str]()
        for counts in self.counts.values():
            names.update(counts)
        chosen = [name for name, _ in names.most_common(SHOWN)]
        return {
            "labels": len(names),
            "kind": "tags" if self._tagged else "labels",
            "rows": dict(self._rows),
            "splits": {
                split: {"counts": {name: counts[name] for name in chosen if name in counts}}
                for split, counts in self.counts.items()
            },
        }


def labels_of(row: Row) -> Iterable[str]:
    """Labels of a text, or names of the entities among its words."""
    if isinstance(row, Labelled):
        return row.labels
    if isinstance(row, TaggedWords):
        return (tag[2:] for tag in row.tags or () if tag != "O")
    return ()


def _count_rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _likely_spelling(name: str, counts: Mapping[str, int]) -> str | None:
    """A much more frequent label that is written nearly as ``name``; numbers are no misspellings."""
    if len(counts) > MOST_COMPARED or any(character.isdigit() for character in name):
        return None
    frequent = [other for other, count in counts.items() if count >= FREQUENT * counts[name]]
    return nearest_name(name, frequent, cutoff=0.8)
