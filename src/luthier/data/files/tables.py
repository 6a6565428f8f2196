"""Tables to records: CSV and TSV (RFC 4180, with one of four delimiters), and Parquet.

CSV cells are text, with two exceptions. ``rating`` and ``score`` are numbers. ``messages``,
``conversations``, ``tokens``, ``tags`` and ``answers`` are JSON, or printed by Python or numpy. A
cell that does not parse stays text, and a later check reports the cell. An empty cell of ``id``,
``expected`` or ``system`` is a missing value, as is a Parquet null in these columns.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

from luthier.data.files import parsing
from luthier.data.files.containers import SEPARATOR, empty_file_error, needs
from luthier.data.files.headers import missing_header
from luthier.data.files.parsing import Record, decode, loads, quote
from luthier.data.shapes import SHAPES
from luthier.errors import Problem, RowNumber, RowRefused

JSON_COLUMNS = frozenset(("conversations",)).union(*(kind.json_keys for kind in SHAPES.values()))
NUMBER_COLUMNS = frozenset[str]().union(*(kind.number_keys for kind in SHAPES.values()))
OPTIONAL_COLUMNS = frozenset(("id", "expected", "system"))

_LONGEST_NAME = 200
_BATCH_ROWS = 512


def read_table(
    stream: BinaryIO,
    file: str,
    problems: list[Problem],
    delimiter: str,
    quoted: bool = True,
    warnings: list[Problem] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Yield ``(line, record)`` for each row below the header; the line is the row's first line.

    Args:
        stream: decompressed bytes.
        file: name of the file for problems.
        problems: list for rows that cannot be read.
        delimiter: character between cells.
        quoted: False if quotes are part of the text.
        warnings: list for rows that may be several rows, joined by unescaped quotes.
    """
    csv.field_size_limit(parsing.MAX_LINE_BYTES)
    lines = _Lines(stream, delimiter)
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names: Sequence[str] | None = None
    count = 0
    while True:
        line = lines.next_number
        lines.texts.clear()
        try:
            cells = next(reader)
            if not cells:
                continue
            if names is None:
                names = _header(cells, delimiter)
                continue
            record = _record(names, cells)
        except StopIteration:
            break
        except csv.Error as error:
            bad = _not_csv(error, names is not None)
            problems.append(bad.at(file, line))
            if names is not None and (last := lines.read_again(names)):
                problems.append(bad.at(file, last))
                count += 1
        except RowRefused as bad:
            problems.append(bad.at(file, bad.problem.line or line))
        else:
            joined = len(lines.texts) > 1 and all(n == len(names) > 1 for n in lines.cells())
            if joined and warnings is not None:
                warnings.append(_joined_lines(line, lines.number).at(file, line))
            yield line, record
            count += 1
            continue
        if names is None:
            return
        count += 1  # rejected rows count
    if not count:
        raise empty_file_error("has a header and no rows" if names else "has no rows")


def _joined_lines(first: int, last: int) -> RowRefused:
    message = (
        f"Quotes join the lines {first} to {last}, and each line has as many cells as the header."
    )
    fix = 'If each line is a row, quote cells that start with a quote, and write " inside as "".'
    return RowRefused("table.joined", message, fix)


class _Lines:
    """Lines of a stream as text, ends included, without a first line ``sep=``."""

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        self.stream = stream
        self.delimiter = delimiter
        self.number = 0
        """Number of the last line, from 1."""
        self.texts: list[str] = []
        """Lines of the current row."""
        self._again: deque[tuple[int, str]] = deque()
        self._read = 0
        self._at_end = False

    @property
    def next_number(self) -> int:
        """Number of the next line."""
        return self._again[0][0] if self._again else self._read + 1

    def cells(self) -> list[int]:
        """Return the number of cells in each line of the row if quotes are plain text."""
        return [text.count(self.delimiter) + 1 for text in self.texts]

    def read_again(self, names: Sequence[str]) -> int:
        """Queue the lines between wrong quotes, which are rows of their own.

        Return the number of the last line if the line closes the quote; 0 if no line is a row, or if
        the last line is a row.
        """
        first = self.number - len(self.texts) + 1
        closes = not self._at_end and self.texts[-1].count('"') % 2 == 1
        inner = range(1, len(self.texts) - closes)
        counts = self.cells()
        if not inner or any(counts[at] != len(names) for at in inner):
            return 0
        self._again.extendleft((first + at, self.texts[at]) for at in reversed(inner))
        return self.number if closes else 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._again:
            self.number, text = self._again.popleft()
            self.texts.append(text)
            return text
        self._read += 1
        self.number = self._read
        raw = parsing.read_line(self.stream, "check the quotes around the cells")
        if not raw:
            self._at_end = True
            self.number = self._read = self._read - 1
            raise StopIteration
        text = decode(raw, self.number)
        if self.number == 1:
            text = text.removeprefix("\ufeff")
            if SEPARATOR.fullmatch(text):
                return next(self)
        self.texts.append(text)
        return text


def _header(cells: Sequence[str], delimiter: str) -> Sequence[str]:
    names = [cell.strip() for cell in cells]
    if any(len(name) > _LONGEST_NAME for name in names):
        raise missing_header("The first line has a cell longer than a name", [names], delimiter)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        what = f"the name {quote(repeated)} twice" if repeated else "empty names"
        message = f"The first row must name the columns, but has {what}."
        raise RowRefused("table.header", message, "Write each column's name once in the first row.")
    return names


def _record(names: Sequence[str], cells: Sequence[str]) -> Record:
    if len(cells) != len(names):
        raise RowRefused(
            "table.cells",
            f"The row has {len(cells)} cells, and the header {len(names)}.",
            'Put cells with a delimiter, a quote or a line break in double quotes, and write " as "".',
        )
    record: Record = dict(zip(names, cells, strict=True))
    for name in OPTIONAL_COLUMNS & record.keys():
        if record[name] == "":
            del record[name]
    for name in JSON_COLUMNS & record.keys():
        record[name] = _json_cell(name, str(record[name]))
    for name in NUMBER_COLUMNS & record.keys():
        text = str(record[name]).strip()
        record[name] = float(text) if parsing.NUMBER.fullmatch(text) else record[name]
    return record


def _json_cell(name: str, text: str) -> object:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = loads(text)
    except RowRefused as bad:
        with suppress(ValueError):
            return parsing.parse_python(text)
        message = f"Column {quote(name)}: {bad.problem.message}"
        raise RowRefused(bad.rule, message, bad.problem.advice) from None
    if parsing.may_hold_surrogates(text):
        parsing.reject_surrogates({name: value})
    return value


def _not_csv(error: csv.Error, has_header: bool) -> RowRefused:
    what = "row" if has_header else "header"
    if "new-line character" in str(error):
        message = (
            f"The {what} has a carriage return (CR) without a line feed (LF) outside of quotes."
        )
        fix = "Write line ends as LF: tr '\\r' '\\n' < OLD > NEW; or quote a cell with a CR."
        return RowRefused("table.invalid", message, fix)
    message = f"The {what} is no CSV: {error}."
    fix = 'Close each quote; inside of quotes, write " as "".'
    return RowRefused("table.invalid", message, fix)


def read_parquet(stream: BinaryIO) -> Iterator[tuple[int, Record]]:
    """Yield ``(number, record)`` for each row; memory is one row group."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise needs("pyarrow", "parquet", "Parquet") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        convert = _conversions(table.schema_arrow)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                for name, each in convert.items():
                    record[name] = each(record[name])
                yield RowNumber(number), _present(record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise RowRefused(
            "file.damaged",
            f"The Parquet file is damaged: {reason}.",
            "Write or download the file again.",
        ) from None
    if not number:
        raise empty_file_error("has no rows")


def _conversions(schema: Any) -> dict[str, Callable[[object], object]]:
    """Return conversions from Parquet's values to JSON's, by column."""
    from pyarrow.types import is_nested

    conversions: dict[str, Callable[[object], object]] = {
        each.name: _without_padding for each in schema if is_nested(each.type)
    }
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        info = json.loads((schema.metadata or {})[b"huggingface"])
        for name, feature in info["info"]["features"].items():
            while isinstance(feature, list) or "feature" in feature:
                feature = feature[0] if isinstance(feature, list) else feature["feature"]
            if feature.get("_type") == "ClassLabel" and name in schema.names:
                conversions[name] = partial(_class_names, [str(each) for each in feature["names"]])
    return conversions


def _without_padding(value: object) -> object:
    """Return a value without null struct members, because a column has the members of all rows."""
    if isinstance(value, dict):
        return {key: _without_padding(each) for key, each in value.items() if each is not None}
    return [*map(_without_padding, value)] if isinstance(value, list) else value


def _class_names(names: Sequence[str], value: object) -> object:
    """Return the names of Hugging Face class numbers; -1 is a row without a class."""
    if isinstance(value, list):
        return [_class_names(names, each) for each in value]
    if type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def _present(record: Record) -> Record:
    """Return the record without nulls of optional columns."""
    return {k: v for k, v in record.items() if v is not None or k not in OPTIONAL_COLUMNS}
