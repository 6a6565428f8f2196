"""Estimates beside what came of them, and what later estimates learn from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.engine.actuals import history_file

CLOSE = 0.2
"""An estimate that is off by at most this share is called close."""
LEAST = 3
"""Runs on a machine before its estimates are corrected."""


@dataclass(frozen=True)
class PastRun:
    """One run that had been estimated."""

    model_id: str
    machine: str
    estimated_seconds: float
    seconds: float
    estimated_memory: float
    memory: float
    raw_seconds: float
    """As estimated before any correction by the history."""
    raw_memory: float

    @property
    def time_ratio(self) -> float:
        """Actual time for each second estimated."""
        return self.seconds / self.estimated_seconds

    @property
    def memory_ratio(self) -> float:
        """Actual memory for each byte estimated."""
        return self.memory / self.estimated_memory


@dataclass(frozen=True)
class Correction:
    """What estimates are multiplied by, as runs of the same machine took so much more, or less."""

    seconds: float = 1.0
    memory: float = 1.0
    runs: int = 0
    """Runs it was learned from; 0 where there are too few."""


def past(machine: str | None = None) -> list[PastRun]:
    """All runs that had been estimated, oldest first; those of one machine, if it is given."""
    found = [_past_run(line) for line in history_file().read()]
    return [each for each in found if machine in (None, each.machine)]


def correction(runs: Sequence[PastRun]) -> Correction:
    """Medians of actual by estimated, before corrections: one run that was disturbed moves nothing."""
    if len(runs) < LEAST:
        return Correction()
    return Correction(
        statistics.median(each.seconds / each.raw_seconds for each in runs),
        statistics.median(each.memory / each.raw_memory for each in runs),
        len(runs),
    )


def close(ratios: Sequence[float]) -> int:
    """How many of the ratios are within :data:`CLOSE`."""
    return sum(abs(ratio - 1) <= CLOSE for ratio in ratios)


def summary(runs: Sequence[PastRun]) -> dict[str, Any]:
    """The history as plain values: each run, and how many estimates were close."""
    return {
        "runs": [
            {**asdict(each), "time_ratio": each.time_ratio, "memory_ratio": each.memory_ratio}
            for each in runs
        ],
        "count": len(runs),
        "time_close": close([each.time_ratio for each in runs]),
        "memory_close": close([each.memory_ratio for each in runs]),
        "close_is_within": CLOSE,
    }


def _past_run(line: Mapping[str, Any]) -> PastRun:
    estimate = line["estimate"]
    return PastRun(
        model_id=line["model_id"],
        machine=line["machine"],
        estimated_seconds=estimate["seconds"]["value"],
        seconds=line["seconds"],
        estimated_memory=estimate["memory"]["value"],
        memory=line["peak_memory_bytes"],
        raw_seconds=estimate["raw_seconds"],
        raw_memory=estimate["raw_memory"],
    )
