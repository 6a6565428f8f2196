"""One pass of all checks over the data.

Memory grows only by a few numbers per row: rows are read in batches, measured by each check and
discarded. Worker processes may measure batches. Reading and combining stay in the main process, so
a report does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Self

import numpy as np

from luthier.data.files.containers import PACKED
from luthier.data.files.read import source_size
from luthier.data.files.sources import Source
from luthier.data.rows import Columns, RowReader
from luthier.data.shapes import describe_shapes
from luthier.data.shapes.media import MediaRow
from luthier.errors import DataError, LuthierError, Problem
from luthier.gate.batch_text import excerpt_of
from luthier.gate.check import Check, Places, RowBatch, Split
from luthier.gate.report import Report
from luthier.gate.rules import UNREAD_COLUMN, Finding, Findings, Place, SeverityChoice, rule_of
from luthier.types import Row

ROWS = 1024
"""Rows of a batch at most."""
CHARACTERS = 1 << 20
"""Characters of a batch, about: long rows come in smaller batches."""
LARGE, LARGE_MEDIA = 2_500_000, 200_000_000
"""Minimum size of text sources and of media sources for worker processes, in bytes. The start of
the workers takes one to two seconds, in which one process measures 2 MB of text or 14 MB of images."""
MEDIA_ROWS = 32
"""Maximum number of images or recordings per batch, because decoding is slow."""
KEY = 16
"""Bytes of a text's key and quotes, about."""
NO_TEXT = "no row has a text"
NO_TARGET = "a column that is not read may be the target"
"""Reason for omitting text checks for data without text."""


@dataclass(frozen=True)
class ScanProgress:
    """Progress of the pass."""

    rows: int
    done_bytes: int
    total_bytes: int
    findings: int


def inspect_rows(
    splits: Mapping[Split, Sequence[Row]],
    checks: Sequence[Check],
    overrides: Mapping[str, SeverityChoice] | None = None,
    on_row: Callable[[int, int], None] = lambda done, count: None,
    warnings: Sequence[Problem] = (),
) -> Report:
    """Run the checks on rows in memory, as in a job.

    Args:
        on_row: called with the number of processed rows and the total.
        warnings: warnings of the reader.
    """
    count = sum(map(len, splits.values()))
    with Gate(checks, Findings(overrides or {})) as gate:
        gate.add_problems([*warnings])
        for split, rows in splits.items():
            gate.scan_rows(split, rows, lambda: on_row(gate.places.total, count))
        return gate.report({split: sorted(gate.files[split]) for split in splits})


def inspect_sources(
    sources: Mapping[Split, Source],
    checks: Sequence[Check],
    overrides: Mapping[str, SeverityChoice] | None = None,
    columns: Columns | None = None,
    progress: Callable[[ScanProgress], None] = lambda _: None,
    processes: int = 1,
    known: Sequence[Finding] = (),
) -> Report:
    """Run the checks on sources of any size. Unreadable rows become findings of the reading rules.

    Args:
        processes: number of worker processes for sources of more than :data:`LARGE` bytes. The
            report does not depend on the number.
        known: findings in addition to the rows.
    """
    readers: dict[Split, RowReader] = {}
    refused: list[Problem] = []
    for split, source in sources.items():
        try:
            held = split != "train"
            readers[split] = RowReader(source, columns, whole=False, accepts_own_keys=held)
        except DataError as error:
            refused += error.problems
    total = sum(reader.size for reader in readers.values())
    processes = processes if is_large(readers.values()) else 1
    done = 0
    size = sum(unpacked_size(path) for reader in readers.values() for path in reader.files)
    with Gate(checks, Findings(overrides or {}), processes, size) as gate:
        for split in sources:
            gate.start_split(split)
        gate.findings.extend(known)
        gate.add_problems(refused)
        for split, reader in readers.items():
            for _ in gate.scan_source(split, reader):
                # Below 100 % until the checks have judged all rows together.
                progress(gate.progress(min(done + reader.done, max(0, total - 1)), total))
            done += reader.size
        files = {split: [str(path) for path in reader.files] for split, reader in readers.items()}
        report = gate.report({split: [str(sources[split])] for split in sources} | files)
        progress(gate.progress(total, total))  # findings about all rows are complete
    again = (
        RowReader(sources[split], columns, whole=False, accepts_own_keys=True) for split in readers
    )
    quote_rows(report.findings, again)
    return replace(report, sources={split: str(source) for split, source in sources.items()})


def is_large(readers: Iterable[RowReader]) -> bool:
    """Return True if the sources are large enough for worker processes."""
    media = text = 0
    for reader in readers:
        whole = all(path.is_dir() or path.suffix.lower() in _OF_MEDIA for path in reader.files)
        media, text = (media + reader.size, text) if whole else (media, text + reader.size)
    return text > LARGE or media > LARGE_MEDIA


_OF_MEDIA = (".zip", ".npz")


class Gate:
    """Batches through all checks, in order."""

    def __init__(
        self, checks: Sequence[Check], findings: Findings, processes: int = 1, size: int = 0
    ) -> None:
        self.checks = checks
        self.size = size
        """Approximate size of all rows, in bytes; 0 if unknown."""
        self.pool = BatchPool(checks, processes)
        self._begun = False
        self.findings = findings
        self.places = Places()
        self.files: dict[Split, set[str]] = {}
        self.rows: dict[Split, int] = {}
        self.has_texts = False
        """True if any row has text. Images and recordings may have captions."""
        self.forms: dict[Split, str] = {}
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.close()

    def start_split(self, split: Split) -> None:
        """A split may have no row, and is named all the same."""
        self.files.setdefault(split, set())
        self.rows.setdefault(split, 0)

    def scan_rows(
        self, split: Split, rows: Iterable[Row], on_batch: Callable[[], None] = lambda: None
    ) -> None:
        """All rows of a split; ``on_batch`` is called after each batch."""
        self.start_split(split)
        for batch in batches(split, rows):
            self.submit(batch)
            on_batch()
        self.drain()

    def scan_source(self, split: Split, reader: RowReader) -> Iterator[None]:
        """All rows of a source, with a pause after each batch."""
        problems = reader.problems
        # No check need look at a row that was refused in reading.
        rows = (
            row
            for row in reader
            if not (problems and (problems[-1].file, problems[-1].line) == (row.file, row.line))
        )
        for batch in batches(split, rows):
            self.submit(batch)
            self.add_problems(problems)
            self.add_problems(reader.warnings)
            yield
        self.add_problems(problems)
        self.add_problems(reader.warnings)
        self.drain()
        found = reader.recognition
        if found.form != "nothing":  # also where every row is refused
            self.forms[split] = f"{'; '.join(found.containers)}, {found.form}"

    def progress(self, done: int, total: int) -> ScanProgress:
        """Return the progress of the pass, in bytes."""
        return ScanProgress(self.places.total, done, total, sum(self.findings.counts.values()))

    def submit(self, batch: RowBatch) -> None:
        """Measure a batch with all checks."""
        if not self._begun:
            self._begun = True
            for check in self.checks:
                check.begin(batch, estimate_rows(self.size, batch))
        for each, measured in self.pool.measure(batch):
            self._collect(each, measured)

    def drain(self) -> None:
        """Wait for all batches, and combine the results."""
        for each, measured in self.pool.wait():
            self._collect(each, measured)

    def _collect(self, batch: RowBatch, measured: Sequence[Any]) -> None:
        lines_N = np.fromiter((row.line for row in batch.rows), np.int64, len(batch))
        unit = type(batch.rows[0].line)
        where = self.places.add(batch.split, batch.file, lines_N, unit)
        self.files[batch.split].add(batch.file)
        self.rows[batch.split] += len(batch)
        self.has_texts = self.has_texts or any(any(row.texts()) for row in batch.rows)
        self.forms.setdefault(batch.split, describe_shapes([batch.rows[0].shape]))
        for check, found in zip(self.checks, measured, strict=True):
            check.collect(where, found, self.findings)

    def add_problems(self, problems: list[Problem]) -> None:
        """Convert reading problems to findings, and clear the list."""
        for each in problems:
            place = Place(each.file, each.line)
            self.findings.add(Finding(rule_of(each.rule), place, each.message, each.advice))
        problems.clear()

    def report(self, files: Mapping[Split, Sequence[str]]) -> Report:
        """Finish all checks and return the report."""
        self.pool.close()
        silent = self.places.total and not self.has_texts
        idle = {each.name: NO_TEXT for each in self.checks if silent and each.of_texts}
        unread = self.findings.counts[UNREAD_COLUMN.id]
        if unread and self.findings.severity(UNREAD_COLUMN) == "error":
            idle |= {each.name: NO_TARGET for each in self.checks if each.of_targets}
        checks = [each for each in self.checks if each.name not in idle]
        for check in checks:
            check.finish(self.places, self.findings)
        summaries = {check.name: check.summary() for check in checks}
        seconds = time.perf_counter() - self.began
        return Report(
            files, self.rows, self.findings, summaries, seconds, self.forms, left_out=idle
        )


def unpacked_size(path: Path) -> int:
    """Return the approximate uncompressed size of a file. Text compresses to about a quarter."""
    size = source_size(path)
    return size * 4 if path.suffix in (*PACKED, ".parquet") else size


def estimate_rows(size: int, batch: RowBatch) -> int:
    """Estimate the number of rows in ``size`` bytes from the row size in ``batch``; 0 if unknown."""
    fields = [text.content for row in batch.rows for text in row.texts()]
    if not fields:  # images and numbers have no text size
        return 0
    bytes_ = sum(len(text.encode("utf-8", "surrogatepass")) + KEY for text in fields)
    return size * len(batch) // max(1, bytes_)


def batches(split: Split, rows: Iterable[Row]) -> Iterator[RowBatch]:
    """Group rows into batches of one file each and of bounded size."""
    held: list[Row] = []
    size = 0
    for row in rows:
        if held and (row.file != held[0].file or len(held) == ROWS or size >= CHARACTERS):
            yield RowBatch(split, held[0].file, held)
            held, size = [], 0
        held.append(row)
        size += sum(len(text.content) for text in row.texts())
        size += CHARACTERS // MEDIA_ROWS * isinstance(row, MediaRow)
    if held:
        yield RowBatch(split, held[0].file, held)


AHEAD = 4
"""Number of batches per worker process in progress."""

MeasuredBatch = tuple[RowBatch, list[Any]]
"""A batch, and the measurement of each check."""


class BatchPool:
    """Worker processes that measure batches and return results in order."""

    def __init__(self, checks: Sequence[Check], processes: int = 1) -> None:
        self.checks, self.processes = checks, processes
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[RowBatch, Future[list[Any]]]] = deque()

    def close(self) -> None:
        """Stop the worker processes; pending results are lost."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def measure(self, batch: RowBatch) -> Iterator[MeasuredBatch]:
        """Submit a batch, and yield the batches with due results."""
        if self.processes < 2:
            yield batch, [check.measure(batch) for check in self.checks]
            return
        if self._pool is None:
            checks = pickle.dumps(self.checks)  # only now: Check.begin needs the first batch
            self._pool = ProcessPoolExecutor(self.processes, _context(), _set_checks, (checks,))
        self._waiting.append((batch, self._pool.submit(_measure, batch)))
        if len(self._waiting) > AHEAD * self.processes:
            yield self._next()

    def wait(self) -> Iterator[MeasuredBatch]:
        """Yield the remaining batches in order."""
        while self._waiting:
            yield self._next()

    def _next(self) -> MeasuredBatch:
        batch, future = self._waiting.popleft()
        try:
            return batch, future.result()
        except BrokenProcessPool as error:
            text = "The operating system killed a process that checks rows."
            advice = "Free some memory and run the command again."
            raise LuthierError(text, rule="process.killed", advice=advice) from error


def _context() -> BaseContext:
    # Not fork: the tokenizer of this process may hold threads.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server process imports the modules once for all workers.
    context.set_forkserver_preload(["luthier.gate.preload"])
    return context


_checks: Sequence[Check] = ()
"""The checks of a measuring process."""


def _set_checks(checks: bytes) -> None:
    global _checks
    _checks = pickle.loads(checks)  # noqa: S301 - what our own parent has just made


def _measure(batch: RowBatch) -> list[Any]:
    return [check.measure(batch) for check in _checks]


QUOTED_RULES = (
    "duplicate.",
    "leakage.",
    "split.overlap",
    "label.contradiction",
    "preference.contradiction",
    "answer.",
)
"""Prefixes of rules whose findings are made without texts."""
QUOTED_ROWS = 200_000
"""Maximum number of rows per source that are read again for excerpts."""


def quote_rows(findings: Findings, readers: Iterable[RowReader]) -> None:
    """Add the beginnings of their rows to findings of :data:`QUOTED_RULES` about single rows."""
    rules = [rule for rule in findings.examples if rule.startswith(QUOTED_RULES)]
    wanted = {each.place for rule in rules for each in findings.examples[rule] if each.place.line}
    begins: dict[Place, str] = {}
    for reader in readers:
        names = {str(path) for path in reader.files}
        left = {place for place in wanted if place.file in names}
        for row in islice(reader, QUOTED_ROWS) if left else ():
            place = Place(row.file, row.line)
            if place in left:
                begins[place] = excerpt_of(row)
                left.discard(place)
                if not left:
                    break
    for rule in rules:
        findings.examples[rule] = [
            replace(each, excerpt=begins[each.place]) if each.place in begins else each
            for each in findings.examples[rule]
        ]
