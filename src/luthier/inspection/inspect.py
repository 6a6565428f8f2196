"""One pass over the data with every check: the data gate.

Memory does not grow with the files but for a few numbers a row: rows are read in batches, measured,
and let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from luthier.data.checker import Checker
from luthier.data.containers import PACKED
from luthier.data.rows import Columns, RowReader
from luthier.data.sources import Source
from luthier.errors import DataError, Problem
from luthier.inspection.check import Batch, Check, Places, Split
from luthier.inspection.findings import Finding, Findings, Place, Severity
from luthier.inspection.measuring import Measuring
from luthier.inspection.quoting import quote
from luthier.inspection.reading import rule_of
from luthier.inspection.texts import texts
from luthier.objectives.choosing import shape_of, shapes_named
from luthier.types import Row

ROWS = 1024
"""Rows of a batch at most."""
CHARACTERS = 1 << 20
"""Characters of a batch, about: long rows come in smaller batches."""
LARGE = 8_000_000
"""Bytes of sources beyond which other processes pay for their start of some seconds."""
KEY = 16
"""Bytes of a text's key and quotes, about."""
IDS = 1_000_000
"""Ids that are remembered."""


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
    forms: Mapping[Split, str] = field(default_factory=dict)
    """What the rows were taken for, by the first of each split."""
    base: str | None = None
    """Id of the model whose tokenizer and template the rows were encoded with."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Checks that were not run, and why."""
    sources: Mapping[Split, str] = field(default_factory=dict)
    """What was asked to be inspected: files, folders, patterns or addresses."""

    def source(self, split: Split) -> str:
        """What a command is to name for the rows of a split."""
        return self.sources.get(split) or next(iter(self.files.get(split, ())), "")

    @property
    def exit_code(self) -> int:
        """0 for nothing but notes, 1 for warnings, 2 for data that is refused."""
        return self.findings.exit_code

    @property
    def verdict(self) -> str:
        """``passed``, ``warnings`` or ``refused``."""
        return ("passed", "warnings", "refused")[self.exit_code]

    def html(self) -> str:
        """The report as one page that needs nothing beside it."""
        from luthier.inspection.report_html import page

        return page(self)

    def plain(self) -> dict[str, Any]:
        """The report for JSON."""
        found = self.findings
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "base": self.base,
            "forms": dict(self.forms),
            "left_out": dict(self.left_out),
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
    overrides: Mapping[str, Severity | Literal["off"]] | None = None,
) -> Report:
    """The gate on rows that are in memory already, as in a job."""
    with Gate(checks, Findings(overrides or {})) as gate:
        for split, rows in splits.items():
            gate.see(split, rows)
        return gate.report({split: sorted(gate.files[split]) for split in splits})


def inspect_sources(
    sources: Mapping[Split, Source],
    checks: Sequence[Check],
    overrides: Mapping[str, Severity | Literal["off"]] | None = None,
    columns: Columns | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    processes: int = 1,
) -> Report:
    """The gate on sources of any size; what cannot be read is found by the rules of reading.

    Sources of more than :data:`LARGE` bytes are measured by so many further processes; the report is
    the same.
    """
    readers: dict[Split, RowReader] = {}
    refused: list[Problem] = []
    for split, source in sources.items():
        try:
            readers[split] = RowReader(source, columns, Streaming, whole=False)
        except DataError as error:
            refused += error.problems
    total = sum(reader.size for reader in readers.values())
    processes = processes if total > LARGE else 1
    done = 0
    size = sum(unpacked_size(path) for reader in readers.values() for path in reader.files)
    with Gate(checks, Findings(overrides or {}), processes, size) as gate:
        for split in sources:
            gate.begin(split)
        gate.note(refused)
        for split, reader in readers.items():
            for _ in gate.see_all(split, reader):
                progress(gate.progress(done + reader.done, total))
            done += reader.size
        progress(gate.progress(total, total))
        files = {split: [str(path) for path in reader.files] for split, reader in readers.items()}
        report = gate.report({split: [str(sources[split])] for split in sources} | files)
    again = (RowReader(sources[split], columns, Streaming, whole=False) for split in readers)
    quote(report.findings, again)
    return replace(report, sources={split: str(source) for split, source in sources.items()})


class Streaming(Checker):
    """Remembers the first ids only: those of a file larger than memory would not fit either."""

    def check_id(self, value: object) -> None:
        """Report an id that one of the first :data:`IDS` rows has."""
        if len(self.line_of_id) < IDS or value in self.line_of_id:
            super().check_id(value)


class Gate:
    """Batches through all checks, in order."""

    def __init__(
        self, checks: Sequence[Check], findings: Findings, processes: int = 1, size: int = 0
    ) -> None:
        self.checks = checks
        self.size = size
        """Bytes of all rows, about; 0 where that is not known."""
        self.measuring = Measuring(checks, processes)
        self._begun = False
        self.findings = findings
        self.places = Places()
        self.files: dict[Split, set[str]] = {}
        self.rows: dict[Split, int] = {}
        self.forms: dict[Split, str] = {}
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.measuring.close()

    def begin(self, split: Split) -> None:
        """A split may have no row, and is named all the same."""
        self.files.setdefault(split, set())
        self.rows.setdefault(split, 0)

    def see(self, split: Split, rows: Iterable[Row]) -> None:
        """All rows of a split."""
        self.begin(split)
        for batch in batches(split, rows):
            self.take(batch)
        self.drain()

    def see_all(self, split: Split, reader: RowReader) -> Iterator[None]:
        """All rows of a source, with a pause after each batch."""
        problems = reader.problems
        # No check need look at a row that was refused in reading.
        rows = (
            row
            for row in reader
            if not (problems and (problems[-1].file, problems[-1].line) == (row.file, row.line))
        )
        for batch in batches(split, rows):
            self.take(batch)
            self.note(problems)
            yield
        self.note(problems)
        self.drain()
        if reader.rows:
            told = reader.recognized
            unread = f"; nothing is read from {', '.join(told.unread)}" if told.unread else ""
            self.forms[split] = f"{'; '.join(told.containers)}, {told.form}{unread}"

    def progress(self, done: int, total: int) -> Progress:
        """How far the pass is, in bytes."""
        return Progress(self.places.total, done, total, sum(self.findings.counts.values()))

    def take(self, batch: Batch) -> None:
        """One batch on its way through all checks."""
        if not self._begun:
            self._begun = True
            for check in self.checks:
                check.begin(batch, rows_of(self.size, batch))
        for each, measured in self.measuring.push(batch):
            self._taken(each, measured)

    def drain(self) -> None:
        """Take in all that is being measured."""
        for each, measured in self.measuring.rest():
            self._taken(each, measured)

    def _taken(self, batch: Batch, measured: Sequence[Any]) -> None:
        lines_N = np.fromiter((row.line for row in batch.rows), np.int64, len(batch))
        where = self.places.add(batch.split, batch.file, lines_N)
        self.files[batch.split].add(batch.file)
        self.rows[batch.split] += len(batch)
        self.forms.setdefault(batch.split, shapes_named([shape_of(batch.rows[0])]))
        for check, found in zip(self.checks, measured, strict=True):
            check.take(where, found, self.findings)

    def note(self, problems: list[Problem]) -> None:
        """What reading found, as findings; the list is emptied."""
        for each in problems:
            place = Place(each.file, each.line)
            self.findings.add(Finding(rule_of(each.rule), place, each.message, each.fix))
        problems.clear()

    def report(self, files: Mapping[Split, Sequence[str]]) -> Report:
        """What all checks say, after the last row."""
        self.measuring.close()
        for check in self.checks:
            check.finish(self.places, self.findings)
        summaries = {check.name: check.summary() for check in self.checks}
        seconds = time.perf_counter() - self.began
        return Report(files, self.rows, self.findings, summaries, seconds, self.forms)


def unpacked_size(path: Path) -> int:
    """Bytes of a file as rows, about: packed text has a quarter of them."""
    size = path.stat().st_size if path.is_file() else 0
    return size * 4 if path.suffix in (*PACKED, ".parquet") else size


def rows_of(size: int, batch: Batch) -> int:
    """About how many rows ``size`` bytes hold, if all are as those of ``batch``; 0 for no size."""
    fields = [text.content for row in batch.rows for text in texts(row)]
    bytes_ = sum(len(text.encode("utf-8", "surrogatepass")) + KEY for text in fields)
    return size * len(batch) // max(1, bytes_)


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
