r"""Reading of records from all file formats of ``luthier.data.files.containers``.

No row is dropped silently. A row that cannot be read becomes a ``Problem`` in the caller's list.
Reading continues with the next line, so one pass finds all problems. ``luthier.gate.rules`` lists
the rules.

Only ``\n`` ends a line: text may contain U+2028 and U+0085, which ``str.splitlines`` treats as line
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import BinaryIO

from luthier.data.files import parsing
from luthier.data.files.containers import (
    BROKEN,
    PLAIN_TEXT,
    Container,
    container_of,
    damaged_file_error,
    empty_file_error,
    reject_binary,
    unpack,
)
from luthier.data.files.headers import reject_missing_header
from luthier.data.files.interactions import read_interactions
from luthier.data.files.json_files import read_document
from luthier.data.files.line_forms import LINE_FORMS
from luthier.data.files.mail import read_mail
from luthier.data.files.parsing import PieceDecoder, Record, decode, parse_line, read_line
from luthier.data.files.tables import read_parquet, read_table
from luthier.data.in_memory import stored_rows
from luthier.errors import Problem, RowRefused
from luthier.files import folder_size
from luthier.plugins import bundled_extensions, extensions, load_extension

_CHUNK_BYTES = 64 * 1024
_PROGRESS_EVERY = 256


def read_records(
    path: Path,
    problems: list[Problem],
    whole: bool = True,
    *,
    container: Container | None = None,
    on_progress: Callable[[int], None] | None = None,
    warnings: list[Problem] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Yield ``(line, record)`` for each readable record; append problems to ``problems``.

    Lines count from 1; a file whose rows are no lines has a :class:`~luthier.errors.RowNumber` for
    each row. A plain-text file is one record at line 1.
    Without ``whole``, a plain-text file is a sequence of records of about 64 KiB. Memory is
    constant, except for plain text with ``whole``. The contents of a file never raise an error.
    ``problems`` is complete when the iterator is exhausted.

    Args:
        path: the file.
        problems: list for the problems.
        whole: read plain text as one record.
        container: format of the file, if known.
        on_progress: called with the number of bytes read so far.
        warnings: list for warnings about records that are probably parsed incorrectly.
        columns: column names of the file by luthier's keys, which select a time series.
    """
    file = str(path)
    try:
        container = container or find_container(path, problems)
        if container is None:
            return
        point = extensions("readers").get(container.kind)
        if point or container.kind == "mail":
            reader = load_extension(point) if point else read_mail
            size = 0 if on_progress is None else source_size(path)

            def on_record(number: int, total: int) -> None:
                if on_progress is not None:  # assumes files of equal size in a folder
                    on_progress(size * number // total)

            yield from reader(path, on_record)
            return
        with path.open("rb") as raw:
            records = _records(raw, container, file, problems, whole, warnings, columns or {})
            for done, record in enumerate(records):
                yield record
                if on_progress is not None and done % _PROGRESS_EVERY == 0:
                    on_progress(raw.tell())
            if on_progress is not None:
                on_progress(raw.seek(0, 2))
    except RowRefused as bad:
        problems.append(bad.at(file, bad.problem.line))
    except BROKEN as error:
        problems.append(damaged_file_error(error).at(file, 0))
    except OSError as error:
        problems.append(_read_failure(error).at(file, 0))


def source_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 if missing."""
    return folder_size(path) if path.is_dir() else path.stat().st_size if path.is_file() else 0


def _records(
    raw: BinaryIO,
    container: Container,
    file: str,
    problems: list[Problem],
    whole: bool,
    warnings: list[Problem] | None,
    columns: Mapping[str, str],
) -> Iterator[tuple[int, Record]]:
    if container.kind == "parquet":
        return _read_sparse_table(read_parquet(raw), file, problems, columns)
    stream = unpack(raw, container.packing)
    if container.kind == "json":
        return read_document(stream, file, problems, warnings)
    if container.kind in ("csv", "tsv"):
        table = read_table(stream, file, problems, container.delimiter, container.quoted, warnings)
        as_text = file.lower().endswith(PLAIN_TEXT)
        table = reject_missing_header(table, container.delimiter, columns.values(), as_text)
        return _read_tasks(table, file, problems, columns)
    if container.kind == "text":
        return (_read_text if whole else _read_pieces)(stream)
    if container.kind in LINE_FORMS:
        return LINE_FORMS[container.kind].read(_text_lines(stream))
    lines = _read_lines(stream, file, problems)
    is_stored = Path(file).parent == stored_rows()
    return _read_sparse_table(lines, file, problems, columns) if is_stored else lines


class _Absent(str):
    """An empty cell of a table without empty cells."""

    __slots__ = ()


_ABSENT, _FIRST_ROWS = _Absent(), 1_000


def _read_sparse_table(
    table: Iterator[tuple[int, Record]],
    file: str,
    problems: list[Problem],
    columns: Mapping[str, str],
) -> Iterator[tuple[int, Record]]:
    """Return the rows of a table that leaves out missing values: rows in memory and Parquet."""
    first = [*islice(table, _FIRST_ROWS)]
    names = {name: _ABSENT for _, record in first for name in record}
    filled = ((line, {**names, **record}) for line, record in chain(first, table))
    for line, record in _read_tasks(filled, file, problems, columns):
        yield line, {name: each for name, each in record.items() if each is not _ABSENT}


def _read_tasks(
    table: Iterator[tuple[int, Record]],
    file: str,
    problems: list[Problem],
    columns: Mapping[str, str],
) -> Iterator[tuple[int, Record]]:
    """Return the rows of a table: a log of users and items, a time series, or any other table."""
    table = read_interactions(table, file, problems, columns)
    for reader in bundled_extensions("table_readers").values():
        table = reader.load()(table, file, problems, columns)
    return table


def _text_lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    for number in count(1):
        if not (raw := read_line(stream, "check the line ends")):
            return
        line = decode(raw, number).rstrip("\r\n")
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _read_failure(error: OSError) -> RowRefused:
    reason = error.strerror or type(error).__name__
    fix = "Check the permissions of file and folder, and the disk."
    return RowRefused("file.unreadable", f"The file cannot be read: {reason}.", fix)


def find_container(path: Path, problems: list[Problem]) -> Container | None:
    """Return the format of a file; ``None`` after a reported problem."""
    try:
        return container_of(path)
    except RowRefused as bad:
        problems.append(bad.at(str(path), bad.problem.line))
    except OSError as error:
        problems.append(_read_failure(error).at(str(path), 0))
    return None


def _read_text(stream: BinaryIO) -> Iterator[tuple[int, Record]]:
    data = stream.read()
    if b"\0" in data:
        reject_binary(data)
    text = decode(data, 1).removeprefix("\ufeff")
    if not text:
        raise empty_file_error("is empty")
    yield 1, {"text": text}


def _read_pieces(stream: BinaryIO) -> Iterator[tuple[int, Record]]:
    """A plain-text file, cut before white space (:func:`last_cut`)."""
    decoder, text, empty = PieceDecoder(), "", True
    while data := stream.read(_CHUNK_BYTES):
        if b"\0" in data:
            reject_binary(data)
        text += decoder.decode(data)
        # Text without white space is cut at the limit for lines.
        cut = last_cut(text) or (len(text) if len(text) > parsing.MAX_LINE_BYTES else 0)
        if cut:
            yield 1, {"text": text[:cut]}
            text, empty = text[cut:], False
    decoder.decode(b"", last=True)
    if text:
        yield 1, {"text": text}
    elif empty:
        raise empty_file_error("is empty")


def last_cut(text: str) -> int:
    """Return the last position to cut ``text`` without a change of tokenization; 0 if none.

    The position is before white space that follows another character: tokenizers split words there,
    and look ahead from white space but never back.
    """
    end = len(text)
    while (end := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        if not text[end - 1].isspace():
            return end
    return 0


def _read_lines(
    stream: BinaryIO, file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    blank = True
    for number in count(1):
        try:
            raw = read_line(stream, "write one row per line instead of one array")
            if not raw:
                break
            record = parse_line(raw, number)
        except RowRefused as bad:
            problems.append(bad.at(file, number))
            blank = False
            continue
        if record is not None:
            blank = False
            yield number, record
    if blank:
        raise empty_file_error("has only blank lines" if number > 1 else "is empty")
