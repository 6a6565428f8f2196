"""One pass over the data with every check: the data gate.

Memory does not grow with the files but for a few numbers a row: rows are read in batches, measured,
and let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.rows import stream_rows
from luthier.errors import Problem
from luthier.inspection.check import Batch, Check, Places, Split
from luthier.inspection.findings import Finding, Findings, Place, Rule, Severity
from luthier.inspection.reading import rule_of
from luthier.types import Row

ROWS = 1024
"""Rows of a batch at most."""
CHARACTERS = 1 << 20
"""Characters of a batch, about: long rows come in smaller batches."""


@dataclass(frozen=True)
class Progress:
    """How far the pass is."""

    rows: int
    done_bytes: int
    total_bytes: int
    problems: int


@dataclass
class Report:
    """What the gate says of a data set."""

    files: Mapping[Split, Sequence[str]]
    rows: dict[Split, int]
    findings: Findings
    summaries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each check has to show, by its name."""
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """The report for JSON."""
        found = self.findings
        return {
            "verdict": ("passed", "warnings", "refused")[found.exit_code],
            "files": {split: list(files) for split, files in self.files.items()},
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rules": [
                {
                    "rule": rule.id,
                    "severity": found.severity(rule),
                    "count": found.counts[rule.id],
                    "about": rule.about,
                    "why": rule.why,
                    "fix": rule.fix,
                    "aliases": list(rule.aliases),
                    "places": [each.plain() for each in found.kept[rule.id]],
                }
                for rule in found.rules()
            ],
            "summaries": {name: dict(each) for name, each in self.summaries.items()},
        }


def inspect_rows(
    splits: Mapping[Split, Iterable[Row]],
    checks: Sequence[Check],
    overrides: Mapping[str, Severity] | None = None,
) -> Report:
    """The gate on rows that are in memory already, as in a job."""
    gate = _Gate(checks, Findings(overrides or {}))
    for split, rows in splits.items():
        gate.see(split, rows)
    return gate.report({split: sorted(gate.files[split]) for split in splits})


def inspect_files(
    files: Mapping[Split, Sequence[Path]],
    checks: Sequence[Check],
    overrides: Mapping[str, Severity] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """The gate on files of any size; what cannot be read is found by the rules of reading."""
    gate = _Gate(checks, Findings(overrides or {}))
    total = sum(path.stat().st_size for paths in files.values() for path in paths if path.is_file())
    done = 0
    for split, paths in files.items():
        for path in paths:
            for _ in gate.see_file(split, path):
                broken = sum(gate.findings.counts.values())
                progress(Progress(gate.places.total, done, total, broken))
            done += path.stat().st_size if path.is_file() else 0
    broken = sum(gate.findings.counts.values())
    progress(Progress(gate.places.total, total, total, broken))
    return gate.report({split: [str(path) for path in paths] for split, paths in files.items()})


class _Gate:
    """Batches through all checks, in order."""

    def __init__(self, checks: Sequence[Check], findings: Findings) -> None:
        self.checks = checks
        self.findings = findings
        self.places = Places()
        self.files: dict[Split, set[str]] = {}
        self.rows: dict[Split, int] = {}
        self.began = time.perf_counter()

    def see(self, split: Split, rows: Iterable[Row]) -> None:
        """All rows of a split."""
        self.files.setdefault(split, set())
        self.rows.setdefault(split, 0)
        for batch in batches(split, rows):
            self.take(batch)

    def see_file(self, split: Split, path: Path) -> Iterator[None]:
        """All rows of a file, with a pause after each batch."""
        problems: list[Problem] = []
        self.files.setdefault(split, set()).add(str(path))
        self.rows.setdefault(split, 0)
        rows = (row for row, _ in stream_rows(path, problems))
        for batch in batches(split, rows):
            self.take(batch)
            self.note(problems)
            yield
        self.note(problems)

    def take(self, batch: Batch) -> None:
        """One batch through all checks."""
        lines_N = np.fromiter((row.line for row in batch.rows), np.int64, len(batch))
        where = self.places.add(batch.split, batch.file, lines_N)
        self.files[batch.split].add(batch.file)
        self.rows[batch.split] += len(batch)
        for check in self.checks:
            if not where.first:
                check.begin(batch)
            check.take(where, check.measure(batch), self.findings)

    def note(self, problems: list[Problem]) -> None:
        """What reading found, as findings; the list is emptied."""
        for each in problems:
            place = Place(each.file, each.line)
            self.findings.add(Finding(rule_of(each.rule), place, each.message, each.fix))
        problems.clear()

    def report(self, files: Mapping[Split, Sequence[str]]) -> Report:
        """What all checks say, after the last row."""
        for check in self.checks:
            check.finish(self.places, self.findings)
        summaries = {check.name: check.summary() for check in self.checks}
        seconds = time.perf_counter() - self.began
        return Report(files, self.rows, self.findings, summaries, seconds)


def batches(split: Split, rows: Iterable[Row]) -> Iterator[Batch]:
    """Rows in batches of one file each, of bounded size."""
    held: list[Row] = []
    size = 0
    for row in rows:
        if held and (row.file != held[0].file or len(held) == ROWS or size > CHARACTERS):
            yield Batch(split, held[0].file, held)
            held, size = [], 0
        held.append(row)
        size += len(row.text or row.completion or "") + len(row.prompt or "")
    if held:
        yield Batch(split, held[0].file, held)


def rules_of(checks: Sequence[Check]) -> list[Rule]:
    """Every rule that ``checks`` may find broken."""
    return [rule for check in checks for rule in check.rules]
