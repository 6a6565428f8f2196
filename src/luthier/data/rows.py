"""Sources to checked rows: shapes told apart by their keys.

``{"prompt", "completion"}``, ``{"messages": [{"role", "content"}, ...]}``, ``{"text"}``, text with
what it means: ``{"text", "label"}``, ``{"text", "rating"}``, ``{"tokens", "tags"}``,
``{"anchor", "positive"}``; what is only asked: ``{"prompt"}``, with the ``expected`` answer where there
is one; what people prefer (``luthier.data.preferences``); and the forms of other tools, which become
one of these (``luthier.data.forms``). Text is never altered. A source with anything wrong in it is
refused as a whole, with every problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.data.checker import Checker
from luthier.data.containers import Container, container_of
from luthier.data.parsing import Record, Unreadable
from luthier.data.read import read_records
from luthier.data.renames import listed, rename_fix
from luthier.data.rules import RULES
from luthier.data.sources import Source, files_of
from luthier.data.targets import used_keys
from luthier.errors import DataError, Problem
from luthier.types import Row

__all__ = ["RULES", "Checker", "listed", "rename_fix"]  # for who checks rows another way

Columns = Mapping[str, str]
"""The file's name for each of our keys; an empty one sets the key aside."""

ROWS_CHECKED = 1000
"""Rows that are looked at for columns that nothing is read from."""


@dataclass(frozen=True, slots=True)
class Recognized:
    """What a source was taken for."""

    containers: tuple[str, ...]
    """What its files are made of, each kind once."""
    form: str
    """Form or shape of the rows."""
    rows: int
    files: int
    unread: tuple[str, ...] = ()
    """Columns that nothing was read from: of all rows where the caller said what columns are called,
    else of the first ones."""

    def __str__(self) -> str:
        files = f" in {self.files:,} files" if self.files > 1 else ""
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        return f"{'; '.join(self.containers)}, {self.form}, {rows}{files}"


class RowReader:
    """Rows of a source, one after the other, never all in memory.

    What was found (``recognized``) and how far reading is (``done`` of ``size`` bytes) can be asked at
    any time. Problems are in ``problems``, complete when the iterator is exhausted.

    Args:
        source: a file, a folder, a pattern, ``file://`` or ``s3://``.
        columns: the file's name for each of our keys.
        checker: what checks records and makes rows.
        whole: read plain text as one row; otherwise as pieces that follow each other.
        told: now and then given ``done`` and ``size``.

    Raises:
        DataError: where the source names nothing that can be read.
    """

    def __init__(
        self,
        source: Source,
        columns: Columns | None = None,
        checker: type[Checker] = Checker,
        whole: bool = True,
        told: Callable[[int, int], None] | None = None,
    ) -> None:
        self.files = files_of(source)
        self.problems: list[Problem] = []
        self.checker = checker(str(self.files[0]), self.problems, columns)
        self.whole = whole
        self.told = told
        self.size = sum(path.stat().st_size for path in self.files if path.is_file())
        self.done = 0
        self.rows = 0
        self._containers: list[str] = []
        self._unread: dict[str, None] = {}

    @property
    def recognized(self) -> Recognized:
        """What the rows that were read so far are."""
        form = self.checker.recognized or ("raw text" if self.rows else "nothing")
        containers, unread = tuple(self._containers), tuple(self._unread)
        return Recognized(containers, form, self.rows, len(self.files), unread)

    def __iter__(self) -> Iterator[Row]:
        for path in self.files:
            before = self.done
            container = self._container(path)
            if container is None:
                continue
            self.checker.begin(str(path))
            told, pieces = self._told(before), not self.whole and container.kind == "text"
            rows = self.rows
            for line, record in read_records(
                path, self.problems, self.whole, container=container, told=told
            ):
                row = _piece(path, record) if pieces else self.checker.row(line, record)
                if row is not None:
                    self.rows += 1
                    looked_at = not self.problems and self.rows <= ROWS_CHECKED
                    if row.members is None and (self.checker.columns or looked_at):
                        beside = self.checker.given.keys() - used_keys(row, self.checker.form)
                        self._unread |= dict.fromkeys(sorted(beside - {"id", "schemaVersion"}))
                    yield row
            if pieces and rows == self.rows:
                self.checker.row(1, {"text": " "})  # refused, as nothing else is there

    def _told(self, before: int) -> Callable[[int], None]:
        def told(done: int) -> None:
            self.done = before + done
            if self.told is not None:
                self.told(self.done, self.size)

        return told

    def _container(self, path: Path) -> Container | None:
        """What a file is made of; None after its problem was noted."""
        try:
            container = container_of(path)
        except (Unreadable, OSError):
            # Said by the reader, in its own words.
            list(read_records(path, self.problems))
            return None
        if str(container) not in self._containers:
            self._containers.append(str(container))
        return container


def _piece(path: Path, record: Record) -> Row | None:
    """A part of a plain text; white space alone is none."""
    text = str(record["text"])
    return None if text.isspace() else Row(str(path), 1, text=text)


def load_rows(
    source: Source,
    columns: Columns | None = None,
    told: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Read and check a whole source; raise ``DataError`` with every problem if there is any."""
    return read_rows(source, columns, told)[0]


def read_rows(
    source: Source,
    columns: Columns | None = None,
    told: Callable[[int, int], None] | None = None,
    checker: type[Checker] = Checker,
) -> tuple[list[Row], Recognized]:
    """The same as :func:`load_rows`, and what the source was taken for."""
    reader = RowReader(source, columns, checker, told=told)
    rows = list(reader)
    if reader.problems:
        raise DataError(reader.problems)
    return rows, reader.recognized


def stream_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[Row, bool]]:
    """Rows of a file one after the other, never all in memory, and whether each ends a document.

    A plain-text file is one document and comes as many rows (see ``read_records``). Checked is all
    that :func:`load_rows` checks but for repeated ids, which would have to be remembered.
    """
    checker = Checker(str(path), problems)
    in_pieces = is_text(path)
    blank = True
    for line, record in read_records(path, problems, whole=False):
        if in_pieces:
            text = str(record["text"])
            blank = blank and text.isspace()
            yield Row(str(path), line, text=text), False
            continue
        record.pop("id", None)
        row = checker.row(line, record)
        if row is not None:
            yield row, True
    if in_pieces and blank and not problems:
        checker.line = 1
        checker.text({"text": " "}, "text", target=True)
    if in_pieces:
        yield Row(str(path), 1, text=""), True


def is_text(path: Path) -> bool:
    """Whether a file is plain text; what cannot be read is not."""
    try:
        return container_of(path).kind == "text"
    except (Unreadable, OSError):
        return False
