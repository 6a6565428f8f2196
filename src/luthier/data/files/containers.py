"""Detection of a file's format from its bytes; the file name decides only in doubt.

Formats are JSON Lines, a JSON array or object, CSV, TSV, Parquet, plain text and annotated lines
(:mod:`luthier.data.files.line_forms`). All but Parquet may be compressed with gzip or zstd, or be
the only data file of a zip archive, next to the images and audio that the rows name. Images and
audio alone are a folder or zip archive of files, or arrays in an ``.npz`` file. E-mail is a folder,
an mbox file or an EML file (:mod:`luthier.data.files.mail`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

from luthier.data.files.line_forms import LINE_FORMS
from luthier.data.files.mail import has_mail, is_mailbox
from luthier.data.files.nested import rows_inside
from luthier.data.files.parsing import quote, read_line
from luthier.data.formats import KEYS
from luthier.data.inputs import conversion_fix, is_media
from luthier.errors import RowRefused
from luthier.files import names_below
from luthier.plugins import bundled_extensions, extensions

FileFormat = Literal[
    "jsonl",
    "json",
    "csv",
    "tsv",
    "parquet",
    "text",
    "fasttext",
    "conll",
    "folder",
    "zip",
    "npz",
    "mail",
]
Packing = Literal["", "gzip", "zstd", "zip"]

JSON_LINES = (".jsonl", ".ndjson", ".json-lines")
PLAIN_TEXT = (".txt", ".md", ".text")
TABLES = (".csv", ".tsv")
PACKED = (".gz", ".zst")
_ROW_ENDINGS = (*JSON_LINES, ".json", *TABLES)
DATA_ENDINGS = (*_ROW_ENDINGS, ".parquet", ".npz", *PLAIN_TEXT)
"""Accepted file endings. All endings but plain text may have one of ``PACKED`` appended."""

TIME_COLUMNS = ("timestamp", "time", "date", "datetime", "ds")
"""Names of the first column of a time series."""
_HEAD_BYTES = 65536
_DELIMITERS = "\t,;|"
_FEWEST_ROWS = {"tsv": 2, "csv": 4}
"""Fewest rows below the first line of a ``.txt`` file, for a table with other names than keys."""
_UNQUOTED = "\t|"
"""Delimiters that some programs write without quoting, because both are rare in text."""
_QUOTED = re.compile(rb'"(?:[^"]|"")*"')
SEPARATOR = re.compile(r'"?sep=([^\w"\s]|\t)"?\s*')
"""First line of a table that tells Excel the delimiter."""
_SUPPORTED = (
    f"Supported are JSON Lines ({', '.join(JSON_LINES)}), JSON (.json), tables (.csv, .tsv, .parquet) "
    f"and plain text ({', '.join(PLAIN_TEXT)}) in UTF-8, optionally with .gz or .zst; "
    "images and audio in a folder or .zip, arrays (.npz), or e-mail (.mbox, .eml, Maildir)"
)
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
"""First bytes of a zip archive, and of an empty zip archive."""
# Every entry is impossible at the start of UTF-8 text, so a match alone is proof.
_MAGIC = (
    (_GZIP, "data compressed twice"),
    (_ZSTD, "data compressed twice"),
    (b"\xfd7zXZ\x00", "xz-compressed data"),
    (b"PK\x03\x04", "a zip archive or an Office document"),
    (b"PAR1", "a compressed Parquet file"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)
"""Exceptions of decompressors for damaged data."""

# Tab, line ends, backspace, form feed and escape do occur in text.
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\b\f\x1b"))


@dataclass(frozen=True, slots=True)
class Container:
    """Format of a file."""

    kind: FileFormat | str
    """Format, or the file ending of a plugin's reader."""
    packing: Packing = ""
    delimiter: str = ","
    """Character between the cells of a table."""
    quoted: bool = True
    """False for a table whose quotes are part of the text."""

    def __str__(self) -> str:
        kind = self.kind if self.quoted else f"{self.kind} without quoting"
        return f"{kind}, {self.packing}" if self.packing else kind


def container_of(path: Path) -> Container:
    """Return the format of the file at ``path``.

    Raises:
        RowRefused: if the file is not regular, not text, or of an unknown format.
        OSError: if the file cannot be read.
    """
    if path.is_dir() and any(map(is_media, names_below(path))):
        return Container("folder")
    if path.is_dir() and has_mail(path):
        return Container("mail")
    _reject_irregular(path)
    if is_mailbox(path):
        return Container("mail")
    ending = path.suffix.lower()
    if ending not in DATA_ENDINGS and ending[1:] in extensions(
        "readers"
    ).keys() - bundled_extensions("readers"):
        return Container(ending[1:])
    convert = conversion_fix([path.name])
    if is_media(path.name) or convert:
        message = "A single image or audio file is not a data set."
        fix = "Name the folder of the files; the names of subfolders are labels."
        fix = f"{convert} {fix}".strip()
        raise RowRefused("file.unknown_format", message, fix)
    packing: Packing = ""
    with path.open("rb") as raw:
        head = raw.read(_HEAD_BYTES)
        if head.startswith((_GZIP, _ZSTD)):
            packing = "gzip" if head.startswith(_GZIP) else "zstd"
            head = _unpacked_head(path, packing)
    if not head and path.suffix.lower() in (".parquet", ".npz", ".zip"):
        raise empty_file_error("is empty")
    if head.startswith(_PARQUET) and not packing:
        return Container("parquet")
    name = unpacked_name(path.name) if packing else path.name.lower()
    if head.startswith(_ZIP) and path.suffix.lower() in ("", ".npz", ".zip") and not packing:
        arrays = path.suffix.lower() == ".npz" or (not path.suffix and _holds_arrays(path))
        if arrays or not (member := _data_member(path)):
            return Container("npz" if arrays else "zip")
        packing, name = "zip", member.lower()
        head = _unpacked_head(path, packing)
    reject_binary(head)
    suffix = Path(name).suffix
    # errors="ignore" drops an incomplete last character.
    text = head.decode("utf-8", errors="ignore").removeprefix("\ufeff")
    first, _, rest = text.partition("\n")
    separator = SEPARATOR.fullmatch(first)
    kind = _kind(rest if separator else text, suffix, len(head) < _HEAD_BYTES)
    if kind is None:
        raise _unknown(path.suffix.lower())
    if kind not in ("csv", "tsv"):
        return Container(kind, packing)
    delimiter = separator[1] if separator else _delimiter(text, kind)
    quoted = delimiter not in _UNQUOTED or not _lacks_quoting(path, packing, delimiter)
    return Container(kind, packing, delimiter, quoted)


def unpacked_name(name: str) -> str:
    """Return a file name in lower case, without compression endings."""
    name = name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name


def _lacks_quoting(path: Path, packing: Packing, delimiter: str) -> bool:
    """Return whether the quotes of a table are plain text.

    True if every line has as many cells as the header, and a cell starts with a quote without a
    closing quote. A quoted cell with line breaks leaves lines with fewer cells, unless the cell
    also contains delimiters. Doubled quotes and a quoted header prove quoting.
    """
    columns, is_open = 0, False
    with path.open("rb") as raw, suppress(RowRefused, *BROKEN):  # the reader reports damage
        stream = unpack(raw, packing)
        while line := read_line(stream, ""):
            line = line.removeprefix(codecs.BOM_UTF8) if not columns else line
            cells = line.rstrip(b"\r\n").split(delimiter.encode())
            if cells == [b""] or (not columns and line.startswith((b"sep=", b'"sep='))):
                continue
            is_header, columns = not columns, columns or len(cells)
            quoted = [cell for cell in cells if cell.startswith(b'"')]
            if len(cells) != columns or columns == 1 or (is_header and quoted):
                return False
            if any(b'""' in cell[1:-1] for cell in quoted):
                return False
            is_open |= any(not _QUOTED.fullmatch(cell) for cell in quoted)
        return is_open
    return False


def _holds_arrays(path: Path) -> bool:
    """Return whether an archive without a file ending, such as an uploaded file, is an ``.npz``
    file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, RuntimeError, ValueError):
        return False  # the reader reports the damage


def _data_member(path: Path) -> str:
    """Return the only data file of a zip archive; empty for an archive of images or audio alone.

    Raises:
        RowRefused: for several data files, and for an encrypted file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [*filter(_is_listed, archive.namelist())]
            has_media = any(map(is_media, names))
            endings = (*JSON_LINES, *TABLES) if has_media else _ROW_ENDINGS
            rows = [name for name in names if name.lower().endswith(endings)]
            data = rows or [name for name in names if name.lower().endswith(".txt")]
            is_encrypted = any(archive.getinfo(name).flag_bits & 1 for name in data)
    except (zipfile.BadZipFile, RuntimeError, ValueError):
        return ""  # the reader reports the damage
    if not data or (has_media and not rows):
        return ""
    if len(data) > 1 or is_encrypted:
        what = "is encrypted" if is_encrypted else f"has {len(data):,} data files"
        fix = "Unpack the archive, and name one file or the folder."
        raise RowRefused("file.directory", f"The archive {what}.", fix)
    return data[0]


def _is_listed(name: str) -> bool:
    """Return whether a member of an archive is no folder, hidden file or file of macOS."""
    return not name.endswith("/") and not re.search(r"(^|/)(\.|__MACOSX/)", name)


def unpack(raw: BinaryIO, packing: Packing) -> BinaryIO:
    """The bytes of ``raw``, unpacked as they are read."""
    if packing == "zip":
        archive = zipfile.ZipFile(raw)
        return archive.open(_data_member(Path(raw.name)))  # type: ignore[return-value]
    if packing == "gzip":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(raw), 1 << 18) if packing else raw


def _unpacked_head(path: Path, packing: Packing) -> bytes:
    """Return the first bytes of a compressed file.

    Raises:
        RowRefused: for damaged data.
    """
    try:
        with path.open("rb") as raw:
            return unpack(raw, packing).read(_HEAD_BYTES)
    except BROKEN as error:
        raise damaged_file_error(error) from None


def reject_binary(data: bytes) -> None:
    """:class:`RowRefused` where ``data`` cannot be the start of UTF-8 text."""
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    controls = len(data) - len(data.translate(None, _CONTROL))
    if kind is None and b"\0" not in data and controls * 10 <= len(data):
        return
    message = f"The file is not UTF-8 text; it looks like {kind or 'binary data'}."
    fix = f"Convert the file. {_SUPPORTED}."
    if kind == "UTF-16 text":
        fix = "Save the file as UTF-8, or run: iconv -f UTF-16 -t UTF-8 OLD > NEW."
    raise RowRefused("file.binary", message, fix)


def damaged_file_error(error: Exception) -> RowRefused:
    """Return the error for compressed data that cannot be decompressed."""
    reason = str(error).rstrip(".")
    message = f"The compressed file is damaged or truncated: {reason[:1].lower()}{reason[1:]}."
    return RowRefused("file.damaged", message, "Compress or download the file again.")


def needs(package: str, extra: str, what: str) -> RowRefused:
    """Return the error for a missing optional package."""
    message = f"{what} needs the package {package}, which is not installed."
    return RowRefused("file.extra", message, f"Run: pip install 'luthier[{extra}]'.")


class _Zstd(io.RawIOBase):
    """Concatenated zstd frames; a truncated last frame raises :class:`EOFError`."""

    # Small, because a hostile frame may decompress to 30,000 times its size.
    _PIECE = 4096

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise needs("zstandard", "zstd", "zstd compression") from None
        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            data = data or self._raw.read(self._PIECE)
            if not data:
                if self._begun:
                    raise EOFError("the last frame is truncated")
                return 0
            self._begun = True
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _reject_irregular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the path
        fix = "Check the path for a spelling mistake."
        if not path.is_absolute():
            fix = f"Check the path for a spelling mistake; relative paths start at {Path.cwd()}."
        raise RowRefused("file.missing", "The file does not exist.", fix) from None
    if stat.S_ISDIR(mode):
        fix = "Name one file in the folder."
        raise RowRefused("file.directory", "The path is a folder, not a file.", fix)
    if not stat.S_ISREG(mode):
        message = "The path is a pipe, a socket or a device, not a regular file."
        raise RowRefused("file.unreadable", message, "Write the data to a file first.")


def _kind(text: str, suffix: str, whole: bool) -> FileFormat | None:
    """Return the format of the text at the start of a file; ``whole`` if that is all text."""
    start = text.lstrip(" \t\r\n")[:1]
    lines = [line for line in text.split("\n") if line.strip(" \t\r")]
    if suffix == ".tsv" and LINE_FORMS["conll"].matches(lines if whole else lines[:-1]):
        return "conll"
    if suffix in TABLES or suffix == ".md" or (not start and suffix in PLAIN_TEXT):
        return "text" if suffix in (".md", *PLAIN_TEXT) else "csv" if suffix == ".csv" else "tsv"
    first = _value(lines[0]) if lines and (whole or len(lines) > 1) else None
    if suffix in PLAIN_TEXT:
        # Two objects, or a single object, in a .txt file are JSON Lines.
        second = _value(lines[1]) if len(lines) > (1 if whole else 2) else first
        if isinstance(first, dict) and isinstance(second, dict):
            return "jsonl"
        return _annotated_form(lines if whole else lines[:-1]) or _table_or_text(text, whole)
    if start == "[" and (len(lines) < 2 or first is None):
        return "json"
    is_nested = isinstance(first, dict) and rows_inside(first) is not None
    if start == "{" and len(lines) < 2 and (is_nested or (first is None and suffix == ".json")):
        return "json"  # one object with all rows, possibly longer than the longest line
    if suffix in JSON_LINES:
        return "jsonl"
    if start == "{":
        return "jsonl" if first is not None or len(lines) < 2 else "json"
    if suffix == ".json":
        return "jsonl"
    return "csv" if _is_table(text) else _annotated_form(lines if whole else lines[:-1])


def _annotated_form(lines: Sequence[str]) -> FileFormat | None:
    """Return the form of annotated lines that all lines have; ``None`` for other text."""
    names = (name for name, form in LINE_FORMS.items() if lines and form.matches(lines))
    return next(names, None)  # type: ignore[arg-type]


def _table_or_text(text: str, whole: bool) -> FileFormat:
    """Return the format of a ``.txt`` file: a table, or text.

    A table has luthier's keys in the first line, or three rows in four have as many cells as a first
    line that may be names.
    """
    kind: FileFormat = "tsv" if "\t" in text.partition("\n")[0] else "csv"
    delimiter = _delimiter(text, kind)
    try:
        read = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names, *rows = (row for row in read if row)
    except (csv.Error, ValueError):
        return "text"
    rows = rows if whole else rows[:-1]
    equal = sum(len(row) == len(names) for row in rows)
    if len(names) < 2 or not rows or 2 * equal < len(rows):
        return "text"
    is_known = all(name.strip().lower() in KEYS for name in names)
    is_table = len(rows) >= _FEWEST_ROWS[kind] and 4 * equal >= 3 * len(rows)
    return kind if is_known or (is_table and _may_be_names(names, delimiter)) else "text"


def _may_be_names(cells: Sequence[str], delimiter: str) -> bool:
    """Return whether the cells of a line are names or values, and not parts of a sentence."""
    if not all(cell and cell == cell.strip() for cell in cells):
        return False
    is_number = any(a[-1].isdigit() and b[0].isdigit() for a, b in pairwise(cells))
    return delimiter == "\t" or not (is_number or cells[-1][-1] in ".!?…。！？")


def _value(line: str) -> object | None:
    try:
        return json.loads(line)  # type: ignore[no-any-return]
    except (ValueError, RecursionError):
        return None


def _is_table(text: str) -> bool:
    """Return whether text of unknown format has a header with a known column, and rows."""
    delimiter = _delimiter(text, "csv")
    rows = [row for line in text.split("\n")[:3] if (row := _cells(line, delimiter))]
    if len(rows) < 2 or len(rows[0]) < 2:
        return False
    return is_series_header(rows[0]) or any(name.strip().lower() in KEYS for name in rows[0])


def is_series_header(columns: Sequence[str]) -> bool:
    """Return whether a table with these columns may be a time series: a time and a value."""
    if len(columns) != 2:
        return False
    time, name = (column.strip().lower() for column in columns)
    return time in TIME_COLUMNS and name not in KEYS


def _delimiter(text: str, kind: FileFormat) -> str:
    """Return the delimiter that gives the most header cells; a comma on a tie.

    Tabs in a TSV need no count, because text has commas.
    """
    header = text.split("\n", 1)[0]
    if kind == "tsv" and "\t" in header:
        return "\t"
    return max(_DELIMITERS, key=lambda each: (len(_cells(header, each)), each == ","))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")], delimiter=delimiter), [])
    except csv.Error:
        return []


def empty_file_error(what: str) -> RowRefused:
    """Return the error for a file without rows."""
    return RowRefused("file.empty", f"The file {what}.", "Add rows, or name another file.")


def _unknown(suffix: str) -> RowRefused:
    ending = f"The file ending {quote(suffix)} is unknown" if suffix else "The file has no ending"
    message = f"{ending}, and the content is neither JSON nor a table with known columns."
    fix = f"Convert or rename the file. {_SUPPORTED}."
    return RowRefused("file.unknown_format", message, fix)
