"""Check for outliers in length, and for answers without content."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from luthier.data.shapes.texts import TextPair
from luthier.gate.batch_text import Spot, SpotCheck, excerpt
from luthier.gate.check import BatchLines, Places, RowBatch
from luthier.gate.histogram import Histogram
from luthier.gate.rules import Finding, Findings, Rule
from luthier.types import FloatArray, Row

OUTLIER = Rule(
    "length.outlier",
    "note",
    "The row is far longer or shorter than usual.",
    "Outliers are often cut, joined or empty rows. Long rows determine the cost of a batch.",
    "Check the row.",
)
EMPTYISH = Rule(
    "target.says_nothing",
    "warning",
    "The answer is a placeholder: N/A, -, null.",
    "The model learns the placeholder as an answer.",
    "Write the answer, or remove the row.",
    drop=True,
)
SAME_START = Rule(
    "target.same_start",
    "note",
    "Most answers begin with the same words.",
    "The model learns the phrase first, and begins every answer with the phrase.",
    "Remove the phrase, unless intended.",
    whole=True,
)
FENCE = 2.0
"""Distance of an outlier from a quartile of the log lengths, in interquartile ranges.

Tukey 1977 uses 1.5 for "outside" and 3 for "far out". In a normal distribution, 0.7 %, 0.08 % and
0.0002 % are beyond 1.5, 2 and 3.
"""
LEAST_SPREAD = 0.75
"""Minimum interquartile range of log lengths, so that data of equal length has no outliers."""
LEAST_ROWS = 50
"""Minimum number of rows for meaningful quartiles."""
WORDS = 4
"""Number of first words of an answer that are compared."""
MOSTLY = 0.5
_COUNTED = 512
_NOTHING = re.compile(
    r"\W*|[\W_]*(?:n/?a|n\.a\.?|nil|null|none|nan|undefined|unknown|tbd|todo|empty|blank|no answer"
    r"|no response|không có|không rõ)[\W_]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BatchLengths:
    """Log lengths and openings of a batch."""

    log_2N: FloatArray
    """``[2, N]`` log of 1 + number of characters of input and target; 0 without text."""
    starts: Counter[str]
    answers: int
    spots: tuple[Spot, ...]


class Lengths(SpotCheck):
    """Check for unusual lengths, empty answers and repeated openings."""

    name: ClassVar[str] = "lengths"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (OUTLIER, EMPTYISH, SAME_START)

    def __init__(self) -> None:
        super().__init__()
        self._logs: dict[str, list[FloatArray]] = {side: [] for side in _SIDES}
        self._histograms: dict[str, dict[str, Histogram]] = {}
        self._starts: Counter[str] = Counter()
        self.answers = 0
        self.fences: dict[str, tuple[int, int]] = {}

    def measure(self, batch: RowBatch) -> BatchLengths:
        """Measure a batch."""
        sizes_2N = np.zeros((2, len(batch)), np.int64)
        starts: Counter[str] = Counter()
        spots: list[Spot] = []
        answers = 0
        for index, row in enumerate(batch.rows):
            answer = None
            for text in row.texts():
                if text.part == "other":
                    continue
                side = int(text.part == "target")
                sizes_2N[side, index] += len(text.content)
                if side and text.field != "text" and not isinstance(row, TextPair):
                    answer = text
            if answer is None:
                continue
            answers += 1
            starts[" ".join(answer.content[:200].split()[:WORDS]).casefold()] += 1
            spot = _find_empty_answer(index, row, answer.field, answer.content)
            if spot:
                spots.append(spot)
        logs_2N = np.log1p(sizes_2N).astype(np.float32)
        return BatchLengths(logs_2N, starts, answers, tuple(spots))

    def collect(self, where: BatchLines, measured: BatchLengths, findings: Findings) -> None:
        """Store 8 bytes per row and the most frequent openings."""
        histograms = self._histograms.setdefault(
            where.split, {f"{part}_characters": Histogram() for part in _SIDES}
        )
        for part, log_N in zip(_SIDES, measured.log_2N, strict=True):
            self._logs[part].append(log_N)
            sizes_N = np.rint(np.expm1(log_N[log_N > 0].astype(np.float64)))
            histograms[f"{part}_characters"].add(sizes_N)
        self.answers += measured.answers
        self._count(measured.starts)
        self.add_spots(where, measured.spots, findings)

    def _count(self, starts: Counter[str]) -> None:
        """Count openings in bounded memory, with an error of at most one row in 512.

        The algorithm is Misra and Gries 1982, "Finding repeated elements", for batches: subtract
        the count of the first excess entry from all counts.
        """
        self._starts += starts
        if len(self._starts) > 2 * _COUNTED:
            ranked = self._starts.most_common(_COUNTED + 1)
            least = ranked[-1][1]
            self._starts = Counter(
                {start: count - least for start, count in ranked if count > least}
            )

    def finish(self, places: Places, findings: Findings) -> None:
        """Report length outliers, and an opening that most answers share."""
        if not places.total:
            return
        for part in _SIDES:
            self._outliers(part, places, findings)
        start, count = self._starts.most_common(1)[0] if self._starts else ("", 0)
        if self.answers >= LEAST_ROWS and count > MOSTLY * self.answers and " " in start:
            message = f"{count / self.answers:.0%} of the answers begin with {excerpt(start)!r}."
            findings.add(Finding(SAME_START, places.place(0), message))

    def _outliers(self, part: str, places: Places, findings: Findings) -> None:
        log_N = np.concatenate(self._logs[part])
        if np.count_nonzero(log_N) < LEAST_ROWS:
            return
        low, middle, high = np.quantile(log_N[log_N > 0], (0.25, 0.5, 0.75))
        reach = FENCE * max(high - low, LEAST_SPREAD)
        self.fences[part] = (round(np.expm1(low - reach)), round(np.expm1(high + reach)))
        usual = round(np.expm1(middle))
        outside_N = (log_N > 0) & ((log_N < low - reach) | (log_N > high + reach))
        for number in np.flatnonzero(outside_N).tolist():
            size = round(np.expm1(float(log_N[number])))
            message = f"The {part} has {size:,} characters; the median is {usual:,}."
            findings.add(Finding(OUTLIER, places.place(number), message))

    def summary(self) -> Mapping[str, Any]:
        """Return length histograms of each split, the fences and the most frequent opening."""
        start, count = self._starts.most_common(1)[0] if self._starts else ("", 0)
        return {
            "splits": {
                split: {name: each.plain() for name, each in names.items() if each.count}
                for split, names in self._histograms.items()
            },
            "fences": {part: list(pair) for part, pair in self.fences.items()},
            "rows": self.rows_by_rule(),
            "commonest_start": {"words": excerpt(start), "answers": count, "of": self.answers},
        }


_SIDES = ("input", "target")


def _find_empty_answer(index: int, row: Row, field: str, answer: str) -> Spot | None:
    if not row.turns():
        return None
    stripped = answer.strip()
    if _NOTHING.fullmatch(stripped[:64]) and len(stripped) < 64 and stripped:
        return Spot(index, EMPTYISH.id, f"{field} is {stripped!r}.")
    return None
