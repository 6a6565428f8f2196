"""Base class of the data checks.

A check is one small file. :meth:`Check.measure` may run in a worker process: the method depends on
the check's fields and one batch only, and returns a picklable value. :meth:`Check.collect` and
:meth:`Check.finish` run in the main process, in the order of the files, and combine the batches.
Batches are discarded after use. A check stores numbers, not texts, so files may exceed memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.types import IntArray, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.objectives import Objective


Split = str
"""``train``, ``validation`` or ``test``."""


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one file."""

    split: Split
    file: str
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class BatchLines:
    """File and lines of a measured batch. Row ``i`` has the number ``first + i``."""

    split: Split
    file: str
    lines_N: IntArray
    first: int
    """Number of the first row among all rows of all splits, from 0; -1 if unknown."""
    unit: type[int] = int
    """Type of a line: ``int`` or :class:`~luthier.errors.RowNumber`."""

    def place(self, index: int) -> Place:
        """Place of the row at ``index`` of the batch."""
        number = self.first + index if self.first >= 0 else -1
        return Place(self.file, self.unit(self.lines_N[index]), number)


@dataclass(frozen=True)
class CheckContext:
    """Model, objective and options that checks are created from (:meth:`Check.of`)."""

    chat: ChatFormat | None = None
    """Tokenizer and template of the base model; ``None`` without a base model."""
    objective: Objective | None = None
    """Training objective; ``None`` to choose by the rows."""
    context: int = 0
    """Tokens the model reads at most; 0 without a model."""
    shown: int = 5
    """Number of rows per split that the report shows with tokens."""
    every: bool = False
    """Encode every row of a large file. By default the token counts use a sample."""
    in_job: bool = False
    """True for the checks that every job runs before training."""
    only: frozenset[str] | None = None
    """Ids of the rules to check; ``None`` for all rules."""


class Check(ABC):
    """A data check: one file in ``checks`` and one line in the table of checks."""

    name: ClassVar[str]
    """Stable name for ``skip`` options."""
    rules: ClassVar[tuple[Rule, ...]]
    """Every rule that the check can report."""
    needs_model: ClassVar[bool] = False
    """True if the check is impossible without a base model."""
    needs_tokenizer: ClassVar[bool] = False
    """True if the check is impossible for base models without a tokenizer (images, audio)."""
    of_targets: ClassVar[bool] = False
    """True for checks that assume that all targets of the rows are read."""
    of_texts: ClassVar[bool] = False
    """True if the check reads text only. The report omits the check if no row has text."""
    in_jobs: ClassVar[bool] = True
    """True if every job runs the check before training. The check must take less than half a second
    for 10,000 short rows and find faults that encoding the rows does not find."""
    measures_with: ClassVar[tuple[str, ...]] = ()
    """Fields that :meth:`measure` reads. Only these fields are pickled for worker processes."""

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check with defaults for the model and the objective of ``context``."""
        return cls()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.measures_with}

    def begin(self, batch: RowBatch, rows: int = 0) -> None:  # noqa: B027 - most have nothing to learn
        """Set the fields that :meth:`measure` needs from the first batch.

        Args:
            rows: estimated total number of rows; 0 if unknown.
        """

    @abstractmethod
    def measure(self, batch: RowBatch) -> Any:
        """Measure one batch, independently of all other batches. The result is picklable."""

    @abstractmethod
    def collect(self, where: BatchLines, measured: Any, findings: Findings) -> None:
        """Combine the measured value of a batch. Batches arrive in order."""

    def finish(self, places: Places, findings: Findings) -> None:  # noqa: B027 - most have nothing to add
        """Add the findings that depend on all rows."""

    def summary(self) -> Mapping[str, Any]:
        """Return the check's statistics for the report, ready for JSON.

        Reports render every summary by these rules, so a check needs no rendering code:

        - A key is a title; ``_`` is rendered as a space.
        - A number, string or Boolean is a line. A number from 0 to 1 under a key that ends in
          ``share``
          is rendered in percent.
        - ``{"bars": [{"from", "to", "count"}, ...]}`` is a histogram. Numbers next to ``bars``
          (``p50``,
          ``max``) are quantiles. :meth:`Histogram.plain` returns this form.
        - ``{"counts": {name: number}}`` is a bar chart, largest bar first. An optional text ``of``
          names the population of the shares.
        - ``{"splits": {split: summary}}`` renders the summaries of the splits side by side.
        - A list has plain values.
        - Any other mapping is a group.
        """
        return {}


class Places:
    """File and line of every row, by row number. Consecutive lines of a batch take one integer."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._batches: list[tuple[Split, str, type[int]]] = []
        self._sizes: list[int] = []
        self._lines: list[IntArray | int] = []
        """Line numbers of each batch; only the first line number if the lines are consecutive."""
        self.total = 0

    def add(self, split: Split, file: str, lines_N: IntArray, unit: type[int] = int) -> BatchLines:
        """Number the rows of a batch."""
        where = BatchLines(split, file, lines_N, self.total, unit)
        self._firsts.append(self.total)
        self._batches.append((split, file, unit))
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
        _, file, unit = self._batches[batch]
        return Place(file, unit(line), number)

    def split(self, number: int) -> Split:
        """Split of row ``number``."""
        return self._batches[self._at(number)[0]][0]

    def splits_N(self) -> Any:
        """``[N]`` number of each row's split in the order of :meth:`names`."""
        names = self.names()
        of_batches = np.array([names.index(split) for split, _, _ in self._batches], np.int8)
        return np.repeat(of_batches, self._sizes)

    def names(self) -> list[Split]:
        """Return the splits that have rows, in order of appearance."""
        return list(dict.fromkeys(split for split, _, _ in self._batches))


NAMED = 100
"""Maximum number of rows of a group that a finding lists."""


def group_finding(
    rule: Rule, group: IntArray, message: str, places: Places, findings: Findings
) -> Finding:
    """Create a finding at the first row of ``group``.

    The finding lists the other rows only if ``findings`` still stores findings of the rule.
    """
    further = group[1 : NAMED + 1].tolist() if findings.has_room(rule) else ()
    others = tuple(map(places.place, further))
    return Finding(rule, places.place(int(group[0])), message, others=others)
