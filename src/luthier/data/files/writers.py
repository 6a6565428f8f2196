"""Records to files: JSON, JSON Lines, CSV, TSV and Parquet, packed by the ending; all or nothing."""

from __future__ import annotations

import csv
import gzip
import io
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from luthier.data.files.containers import needs
from luthier.data.files.parsing import NUMBER, Record, json_kind, quote
from luthier.data.files.sources import Source, files_of
from luthier.data.files.tables import JSON_COLUMNS, NUMBER_COLUMNS, OPTIONAL_COLUMNS
from luthier.data.shapes import SHAPES
from luthier.errors import DataError, Location, Problem, RecipeError, RowRefused
from luthier.files import check_creatable, new_file

_BATCH_ROWS = 1000


class Writer(Protocol):
    """Interface of record writers."""

    def write(self, record: Record) -> None:
        """Write one record; raise :class:`RowRefused` if the format cannot represent the record."""


def check_target(
    target: Path, additional: Sequence[Path], sources: Sequence[Source], replace: bool
) -> None:
    """Reject a target that is a source, or that exists and may not be replaced.

    Args:
        target: the new file.
        additional: other files written with the target.
        sources: sources of the command.
        replace: allow to replace existing files.

    Raises:
        RecipeError: with an alternative.
    """
    check_creatable(target)
    if target.is_dir():
        raise RecipeError(f"{target} is a folder; name a file", rule="target.folder")
    for source in sources:
        if Path(source).is_dir() and target.resolve().is_relative_to(Path(source).resolve()):
            raise RecipeError(
                f"{target} is inside the source {source}; name another file",
                rule="target.inside_source",
            )
    read = {path.resolve() for source in sources for path in files_of(source)}
    for path in (target, *additional):
        if path.resolve() in read:
            raise RecipeError(
                f"{path} is a source; name another target file",
                rule="target.is_source",
            )
        if path.exists() and not replace:
            raise RecipeError(f"{path} exists; --overwrite replaces the file", rule="target.exists")


@contextmanager
def writer_of(kind: str, target: Path, names: Sequence[str]) -> Iterator[Writer]:
    """Yield a writer of ``kind`` with columns ``names``; the file appears after a successful block."""
    with ExitStack() as stack:
        file = stack.enter_context(new_file(target))
        if kind == "parquet":
            yield stack.enter_context(_parquet(file, names))
            return
        packed = stack.enter_context(pack(file, target))
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="", write_through=False)
        if kind in ("jsonl", "text"):
            yield _Lines(text) if kind == "jsonl" else _Text(text)
        elif kind == "json":
            array = _Array(text)
            yield array
            array.close()
        else:
            yield _Csv(text, names, "\t" if kind == "tsv" else ",")
        text.flush()
        # Otherwise the wrapper would close the file, which `new_file` renames afterwards.
        text.detach()


def write_packed(target: Path, data: bytes) -> None:
    """Write a file completely or not at all, compressed according to the ending."""
    with new_file(target) as file, pack(file, target) as packed:
        packed.write(data)


@contextmanager
def pack(file: BinaryIO, target: Path) -> Iterator[BinaryIO]:
    """Yield a stream that compresses into ``file`` according to the ending of ``target``."""
    ending = target.name.lower()
    if ending.endswith(".gz"):
        # No name and time in the header, so equal rows give equal bytes.
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
            yield packed  # type: ignore[misc]
    elif ending.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise _missing("zstandard", "zstd", "zstd compression") from None
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
            yield packed
    else:
        yield file


class _Lines:
    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text

    def write(self, record: Record) -> None:
        self.text.write(to_json(record) + "\n")


class _Array:
    """Writer of one JSON array with a row per line."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.before = text, "[\n"

    def write(self, record: Record) -> None:
        self.text.write(self.before + to_json(record))
        self.before = ",\n"

    def close(self) -> None:
        self.text.write("[]\n" if self.before == "[\n" else "\n]\n")


def json_records(rows: Sequence[tuple[Record, Location]], finite: bool = True) -> list[Record]:
    """Return the records in JSON types; dates and similar values of tables become text.

    Raises:
        DataError: with every row that JSON cannot represent; with ``finite`` also rows with NaN.
    """
    problems, converted = list[Problem](), list[Record]()
    for record, location in rows:
        json_record = dict(record)
        for name, value in record.items():
            if value is None or isinstance(value, str | int):
                continue
            try:
                json_record[name] = json.loads(json.dumps(value, default=str, allow_nan=not finite))
            except (TypeError, ValueError) as error:
                reason = str(error).split(":", 1)[0]
                bad = _no_place("JSON", f"a value in the field {quote(name)} ({reason})").problem
                fix = "Remove the field, or correct the value."
                problems.append(Problem(bad.rule, bad.message, fix, location))
        converted.append(json_record)
    if problems:
        raise DataError(problems)
    return converted


def to_json(record: Record) -> str:
    """Return ``record`` as one line of JSON; :class:`RowRefused` for other types."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise _no_place("JSON", "a value that is not text, a number, a list or an object") from None


class _Text:
    """Writer of plain text, for records with a text only."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text

    def write(self, record: Record) -> None:
        if record.keys() != {"text"}:
            raise _no_place("plain text", "more than a text")
        self.text.write(str(record["text"]))


class _Csv:
    def __init__(self, text: io.TextIOWrapper, names: Sequence[str], delimiter: str) -> None:
        self.names = names
        # "\r\n" makes the csv module quote cells with either character.
        self.writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
        # A quoted header marks a TSV whose quotes are not part of the text.
        head = csv.writer(text, self.writer.dialect, quoting=csv.QUOTE_ALL)
        (head if delimiter == "\t" else self.writer).writerow(names)

    def write(self, record: Record) -> None:
        check_columns(record, self.names)
        self.writer.writerow([cell(name, record.get(name), record) for name in self.names])


def cell(name: str, value: object, record: Mapping[str, object]) -> str:
    """Return a CSV cell that reads back as ``value``; :class:`RowRefused` if impossible."""
    judged = name == "label" and "prompt" in record and "completion" in record
    if value is None and name in OPTIONAL_COLUMNS:
        return ""
    if isinstance(value, str):
        number = name in NUMBER_COLUMNS and NUMBER.fullmatch(value.strip())
        nested = name in JSON_COLUMNS and value.lstrip().startswith(("[", "{"))
        thumb = judged and value.strip().lower() in ("true", "false")
        lost = name in OPTIONAL_COLUMNS and not value
        if "\0" not in value and not (number or nested or thumb or lost):
            return value
    elif isinstance(value, bool):
        if judged:
            return str(value).lower()
    elif isinstance(value, (int, float)):
        if name in NUMBER_COLUMNS or name == "id":
            return repr(value)
    elif isinstance(value, list) and (name == "label" or (name in JSON_COLUMNS and value)):
        return json.dumps(value, ensure_ascii=False)
    raise _no_place("a CSV cell", f"{json_kind(value)} in the column {quote(name)}")


class ColumnNames:
    """Collector of the columns of a table, with the interface of a writer."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        """Column names in order of appearance."""

    def write(self, record: Record) -> None:
        """Collect the columns; reject objects in additional columns, whose keys may differ per row."""
        for name, value in record.items():
            if name not in JSON_COLUMNS and name not in _OWN_OBJECTS and _holds_object(value):
                raise _no_place("a table", f"an object in the column {quote(name)}")
        self.names.update(dict.fromkeys(record))


def check_columns(record: Record, names: Sequence[str]) -> None:
    """Reject a row without a required column."""
    for name in names:
        if name not in record and name not in OPTIONAL_COLUMNS:
            raise RowRefused(
                "convert.container",
                f"The row has no {quote(name)}, and a table cell cannot be missing.",
                "Write JSON Lines (.jsonl), or drop extra keys with --drop-extra-keys.",
            )


_OWN_OBJECTS = frozenset(("system",)).union(*(kind.object_keys for kind in SHAPES.values()))


def _holds_object(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_holds_object, value))
    return isinstance(value, dict)


@contextmanager
def _parquet(file: BinaryIO, names: Sequence[str]) -> Iterator[Writer]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing("pyarrow", "parquet", "Parquet") from None
    writer = _Parquet(file, names, pyarrow)
    try:
        yield writer
        writer.flush()
    finally:
        writer.close()


def arrow_columns(
    records: Sequence[Record], refuse: Callable[[int, RowRefused], None]
) -> dict[str, Any]:
    """Return Parquet columns for ``records`` by name, each with one type.

    ``refuse`` receives the number and the problem of each record that does not fit.

    Raises:
        RecipeError: if pyarrow is missing.
    """
    try:
        import pyarrow
    except ImportError:
        raise _missing("pyarrow", "parquet", "Parquet") from None
    names = ColumnNames()
    for check in (names.write, lambda record: check_columns(record, [*names.names])):
        for number, record in enumerate(records):
            try:
                check(record)
            except RowRefused as bad:
                refuse(number, bad)
    columns = dict[str, Any]()
    for name in names.names:
        values = [record.get(name) for record in records]
        try:
            column = pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            reason = str(error).split("\n", 1)[0]
            what = f"a value that does not fit the column {quote(name)} ({reason})"
            refuse(_first_misfit(values, pyarrow), _no_place("a Parquet column", what))
            continue
        is_empty = str(column.type) == "null"
        columns[name] = column.cast(pyarrow.string()) if is_empty else column
    return columns


def _first_misfit(values: Sequence[object], arrow: Any) -> int:
    """Return the index of the first value with a type that differs from the values before."""

    def is_refused(count: int) -> bool:
        try:
            arrow.array(values[:count])
        except (arrow.ArrowException, TypeError, OverflowError):
            return True
        return False

    return bisect_left(range(1, len(values) + 1), True, key=is_refused)


class _Parquet:
    """Writer of row batches; the first batch sets the column types."""

    def __init__(self, file: BinaryIO, names: Sequence[str], arrow: Any) -> None:
        self.file, self.names, self.arrow = file, names, arrow
        self.rows: list[Record] = []
        self.schema: Any = None
        self.writer: Any = None

    def write(self, record: Record) -> None:
        check_columns(record, self.names)
        self.rows.append({name: record.get(name) for name in self.names})
        if len(self.rows) >= _BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        try:
            if self.schema is None:
                schema = self.arrow.Table.from_pylist(self.rows).schema
                text = self.arrow.string()
                # A column without a value in the first batch may have text later; a column of type
                # null could not.
                fields = [f.with_type(text) if str(f.type) == "null" else f for f in schema]
                self.schema = self.arrow.schema(fields)
                self.writer = self.arrow.parquet.ParquetWriter(self.file, self.schema)
            table = self.arrow.Table.from_pylist(self.rows, schema=self.schema)
        except (self.arrow.ArrowException, TypeError) as error:
            reason = str(error).split("\n", 1)[0]
            raise _no_place("a Parquet column", f"values of several types ({reason})") from None
        self.writer.write_table(table)
        self.rows = []

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _missing(package: str, extra: str, what: str) -> RecipeError:
    return RecipeError.of_problems(needs(package, extra, what).problems)


def _no_place(where: str, what: str) -> RowRefused:
    return RowRefused(
        "convert.container",
        f"The row has {what}, which {where} cannot represent.",
        "Write JSON Lines (.jsonl), drop extra keys with --drop-extra-keys, or remove the row.",
    )
