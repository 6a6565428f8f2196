"""The seam of the data gate: a check sees all rows in batches, and says what is wrong with them.

A check is one small file. What it computes of a batch alone (:meth:`Check.measure`) may run in
another process, so it depends on the check's fields and the batch only, and returns what can be
pickled. What needs the order of rows or all of them stands in :meth:`Check.take` and
:meth:`Check.finish`, which run in the main process, batch by batch in the order of the files. Rows
are gone after their batch: a check keeps numbers, not texts, so that a file may be larger than memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.types import IntArray, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.objectives import Objective


Split = str
"""``train``, ``validation`` or ``test``."""


@dataclass(frozen=True)
class RowBatch:
    """Rows that follow each other in one file."""

    split: Split
    file: str
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class BatchLines:
    """Where the rows of a measured batch stand; row ``i`` of it has the number ``first + i``."""

    split: Split
    file: str
    lines_N: IntArray
    first: int
    """Number of its first row among all rows of all splits, from 0; -1 where it is not known."""

    def place(self, index: int) -> Place:
        """Place of the row at ``index`` of the batch."""
        number = self.first + index if self.first >= 0 else -1
        return Place(self.file, int(self.lines_N[index]), number)


@dataclass(frozen=True)
class CheckContext:
    """What is known beside the rows; checks are made from it (:meth:`Check.of`)."""

    chat: ChatFormat | None = None
    """Tokenizer and template of the base model; ``None`` without one."""
    objective: Objective | None = None
    """What is to be learned; ``None`` where the rows decide."""
    context: int = 0
    """Tokens the model reads at most; 0 without a model."""
    shown: int = 5
    """Rows of each split that the report shows as the model sees them."""
    every: bool = False
    """Whether every row of a large file is encoded, not one in some for its counts."""
    only: frozenset[str] | None = None
    """Ids of the rules that are of interest; ``None`` for all."""


class Check(ABC):
    """One kind of fault, looked for in all rows: a file in ``checks`` and a line in its table."""

    name: ClassVar[str]
    """Stable name, by which a check is left out."""
    rules: ClassVar[tuple[Rule, ...]]
    """Every rule it can find broken."""
    needs_model: ClassVar[bool] = False
    """Whether it can do nothing without a model."""
    needs_tokenizer: ClassVar[bool] = False
    """Whether it can do nothing with a model that has none, as it reads images or sounds."""
    of_texts: ClassVar[bool] = False
    """Whether it looks at texts alone; where no row has one, it is left out of the report."""
    in_jobs: ClassVar[bool] = True
    """Whether it costs so little (under half a second for 10,000 short rows) that each job
    runs it before training, and finds what encoding the rows does not find anyway."""
    measures_with: ClassVar[tuple[str, ...]] = ()
    """The fields that :meth:`measure` reads; a copy in another process has only these."""

    @classmethod
    def of(cls, known: CheckContext) -> Self:
        """The check with its defaults, for a model and an objective where there are some."""
        return cls()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.measures_with}

    def begin(self, batch: RowBatch, rows: int = 0) -> None:  # noqa: B027 - most have nothing to learn
        """Set the fields that :meth:`measure` needs from the first batch, before any is measured.

        ``rows`` is about how many rows there are in all, 0 where that is not known.
        """

    @abstractmethod
    def measure(self, batch: RowBatch) -> Any:
        """What is to be known of a batch, without regard to any other; picklable."""

    @abstractmethod
    def take(self, where: BatchLines, measured: Any, findings: Findings) -> None:
        """Take in what was measured of a batch; batches come in order."""

    def finish(self, places: Places, findings: Findings) -> None:  # noqa: B027 - most have nothing to add
        """Say what only all rows together show."""

    def summary(self) -> Mapping[str, Any]:
        """What the report shows of the check beside its findings, ready for JSON.

        Reports draw any summary by these rules, so that a check needs no code there:

        - A key is a title; ``_`` is shown as a space.
        - A number, a text or a truth value is a line. A number from 0 to 1 under a key that ends
          in ``share`` is shown in percent.
        - ``{"bars": [{"from", "to", "count"}, ...]}`` is a histogram; numbers beside ``bars``
          (``p50``, ``max``) are its quantiles. :meth:`Histogram.plain` gives just this.
        - ``{"counts": {name: number}}`` is a bar for each name, the largest first; a text under
          ``of`` beside it says what the shares are of, where that is not all there is, and ``kinds``
          and ``total`` how many names and how many of all there are where some are left out
          (:func:`most_common`).
        - ``{"splits": {split: summary}}`` is the same for each split, side by side.
        - A list of mappings with the same keys is a table; of ``{"file", "line"}``, places.
        - Any other mapping is a group of the above.
        """
        return {}


def most_common(counts: Counter[str], most: int) -> dict[str, Any]:
    """The ``most`` frequent names of a summary, as :func:`counts_of` lists them."""
    return counts_of(counts, [name for name, _ in counts.most_common(most)])


def counts_of(counts: Counter[str], names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that a summary counts, and what all come to where others are left out."""
    found: dict[str, Any] = {"counts": {name: counts[name] for name in names if name in counts}}
    all_listed = len(found["counts"]) == len(counts)
    return found if all_listed else found | {"kinds": len(counts), "total": counts.total()}


class Places:
    """Where every row stands, by its number: an entry a batch, and lines where some are left out."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._batches: list[tuple[Split, str]] = []
        self._sizes: list[int] = []
        self._lines: list[IntArray | int] = []
        """Lines of each batch; the first one where they follow each other."""
        self.total = 0

    def add(self, split: Split, file: str, lines_N: IntArray) -> BatchLines:
        """Number the rows of a batch."""
        where = BatchLines(split, file, lines_N, self.total)
        self._firsts.append(self.total)
        self._batches.append((split, file))
        follow = len(lines_N) > 0 and bool(np.all(np.diff(lines_N) == 1))
        self._lines.append(int(lines_N[0]) if follow else lines_N)
        self._sizes.append(len(lines_N))
        self.total += len(lines_N)
        return where

    def _at(self, number: int) -> tuple[int, int]:
        batch = bisect_right(self._firsts, number) - 1
        return batch, number - self._firsts[batch]

    def place(self, number: int) -> Place:
        """File and line of row ``number``."""
        batch, index = self._at(number)
        lines = self._lines[batch]
        line = lines + index if isinstance(lines, int) else int(lines[index])
        return Place(self._batches[batch][1], line, number)

    def split(self, number: int) -> Split:
        """Split of row ``number``."""
        return self._batches[self._at(number)[0]][0]

    def splits_N(self) -> Any:
        """``[N]`` number of each row's split in the order of :meth:`names`."""
        names = self.names()
        of_batches = np.array([names.index(split) for split, _ in self._batches], np.int8)
        return np.repeat(of_batches, self._sizes)

    def names(self) -> list[Split]:
        """Splits that have rows, in the order they came."""
        return list(dict.fromkeys(split for split, _ in self._batches))


NAMED = 100
"""Rows of a group that a finding names."""


def group_finding(
    rule: Rule, group: IntArray, message: str, places: Places, findings: Findings
) -> Finding:
    """A finding at the first of some rows, with the places of the others while it would be kept."""
    further = group[1 : NAMED + 1].tolist() if findings.has_room(rule) else ()
    others = tuple(map(places.place, further))
    return Finding(rule, places.place(int(group[0])), message, others=others)
