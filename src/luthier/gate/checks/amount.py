"""Check that the training rows suffice for their shape.

For labels and tags, the check ``balance`` counts the rows of each class. For raw text, the number
of characters counts.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Self

from luthier.data.shapes import SHAPES
from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch
from luthier.gate.rules import Finding, Findings, Place, Rule

FEW = Rule(
    "rows.few",
    "warning",
    "The data has few training rows.",
    "The model learns the form of the rows, not the content; scores on few held-out rows are chance.",
    "Add rows.",
    whole=True,
)
ENOUGH_CHARACTERS = 100_000
"""Required length of raw text: about 25,000 tokens, or fifty sequences of common length."""


class Amount(Check):
    """Rows of each shape, and characters of raw text."""

    name: ClassVar[str] = "amount"
    of_targets: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (FEW,)

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check. With a base model, fitting the objective already rejects a single row."""
        return cls(fitted=context.chat is not None)

    def __init__(self, fitted: bool = False) -> None:
        self.fitted = fitted
        self._rows: Counter[str] = Counter()
        """Training rows of each shape."""
        self._characters = 0
        self._files: dict[str, None] = {}

    def measure(self, batch: RowBatch) -> tuple[Counter[str], int]:
        """Rows by shape, and characters of raw text."""
        texts = sum(len(row.plain_text()) for row in batch.rows if row.shape == "text")
        return Counter(row.shape for row in batch.rows), texts

    def collect(
        self, where: BatchLines, measured: tuple[Counter[str], int], findings: Findings
    ) -> None:
        """Add up the counts of training rows."""
        if where.split == "train":
            self._rows += measured[0]
            self._characters += measured[1]
            self._files[where.file] = None

    def finish(self, places: Places, findings: Findings) -> None:
        """Report a data set with few rows or little text."""
        if len(self._rows) != 1 or (self.fitted and self._rows.total() == 1):
            return
        (shape, count), one = next(iter(self._rows.items())), len(self._files) == 1
        place = Place(next(iter(self._files)), 0)
        enough = SHAPES[shape].enough
        if shape == "text" and self._characters < ENOUGH_CHARACTERS:
            what = "the text has" if one else f"the texts of {len(self._files):,} files have"
            message = f"{what} {self._characters:,} characters; "
            message += f"at least {ENOUGH_CHARACTERS:,} are recommended."
            findings.add(Finding(FEW, place, message, "Add text."))
        elif count < enough:
            message = f"{count:,} row{'s' * (count != 1)} of {SHAPES[shape].noun}; "
            message += f"at least {enough:,} are recommended."
            findings.add(Finding(FEW, place, message, f"Add {enough - count:,} rows or more."))
