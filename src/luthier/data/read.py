"""Bytes to records: one JSON object per line, or one plain-text file.

Nothing is dropped in silence. What cannot be read becomes a ``Problem`` in the caller's list, and
reading goes on with the next line, so that one pass finds them all. What the rules mean is listed
in ``luthier.data.rows.RULES``.

Lines end at ``\\n`` and nowhere else: text written by people holds U+2028 and U+0085, which
``str.splitlines`` would take for line ends.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from luthier.errors import Problem

Record = dict[str, object]

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is refused, and skipped without being held in memory."""

JSON_LINES = (".jsonl", ".ndjson", ".json-lines")
PLAIN_TEXT = (".txt", ".md", ".text")

_HEAD_BYTES = 8192
_CHUNK_BYTES = 64 * 1024
_SUPPORTED = (
    f"Supported are JSON Lines in UTF-8 ({', '.join(JSON_LINES)}) and plain text in UTF-8"
    f" ({', '.join(PLAIN_TEXT)})"
)
# Every entry is impossible at the start of UTF-8 text, so a match alone is proof.
_MAGIC = (
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"\xfd7zXZ\x00", "xz-compressed data"),
    (b"PK\x03\x04", "a zip archive or an Office document"),
    (b"PAR1\x15", "a Parquet file"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
# Tab, line ends, backspace, form feed and escape do occur in text.
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\b\f\x1b"))
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class _Bad(Exception):
    """What is wrong with the line or file in hand; becomes a ``Problem`` where both are known."""

    def __init__(self, rule: str, message: str, fix: str, line: int = 0) -> None:
        super().__init__(rule)
        self.rule, self.message, self.fix, self.line = rule, message, fix, line

    def at(self, file: str, line: int) -> Problem:
        return Problem(file, line, self.rule, self.message, self.fix)


def read_records(
    path: Path, problems: list[Problem], whole: bool = True
) -> Iterator[tuple[int, Record]]:
    """Yield ``(line, record)`` for each readable record; append to ``problems`` for the others.

    Lines count from 1; a plain-text file is one record at line 1, or without ``whole`` many, of some
    64 KiB each, whose texts follow each other: a file may then be larger than memory. No error is
    raised for anything that the file holds. ``problems`` is complete only when the iterator is
    exhausted.
    """
    file = str(path)
    try:
        reader = _reader_for(path)
        if reader is _read_text and not whole:
            reader = _read_pieces
        with path.open("rb") as stream:
            _refuse_binary(stream.read(_HEAD_BYTES))
            stream.seek(0)
            yield from reader(stream, file, problems)
    except _Bad as bad:
        problems.append(bad.at(file, bad.line))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = "Check the permissions of the file and of its folder, and the disk."
        problem = _Bad("file.unreadable", f"The file could not be read: {reason}.", fix)
        problems.append(problem.at(file, 0))


def check_file(path: Path, problems: list[Problem]) -> None:
    """Append a problem where ``path`` is no file of a known format; its content is not looked at."""
    try:
        _reader_for(path)
    except _Bad as bad:
        problems.append(bad.at(str(path), bad.line))


def json_kind(value: object) -> str:
    """Name the type of a decoded JSON value in JSON's own words, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def shown(text: str) -> str:
    """Quote text from the data for a message: short, on one line, nothing unprintable."""
    # Raw escape codes would reach the user's terminal, and a lone surrogate cannot be printed.
    clipped = text if len(text) <= 40 else text[:39] + "…"
    return f'"{repr(clipped)[1:-1]}"'


def _reader_for(
    path: Path,
) -> Callable[[BinaryIO, str, list[Problem]], Iterator[tuple[int, Record]]]:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the path
        fix = "Check the path for a spelling mistake."
        if not path.is_absolute():
            fix = f"Check the path for a spelling mistake; it is looked up from {Path.cwd()}."
        raise _Bad("file.missing", "There is no file at this path.", fix) from None
    if stat.S_ISDIR(mode):
        fix = "Name one file inside the folder."
        raise _Bad("file.directory", "This is a folder, not a file.", fix)
    if not stat.S_ISREG(mode):
        message = "This is a pipe, a socket or a device, not a regular file."
        raise _Bad("file.unreadable", message, "Write the data to a file first, and name that.")
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _read_lines
    if suffix in PLAIN_TEXT:
        return _read_text
    ending = f"The file ending {shown(suffix)} is not known" if suffix else "The file has no ending"
    fix = f"Convert the file, or rename it if only its ending is wrong. {_SUPPORTED}."
    raise _Bad("file.unknown_format", f"{ending}, so its format is unclear.", fix)


def _refuse_binary(data: bytes) -> None:
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    controls = len(data) - len(data.translate(None, _CONTROL))
    if kind is None and b"\0" not in data and controls * 10 <= len(data):
        return
    message = f"The file is not UTF-8 text; it looks like {kind or 'binary data'}."
    fix = f"Unpack or convert it, then name the result. {_SUPPORTED}."
    raise _Bad("file.binary", message, fix)


def _empty(what: str) -> _Bad:
    return _Bad("file.empty", f"The file {what}.", "Add rows to it, or name another file.")


def _read_text(
    stream: BinaryIO, file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    data = stream.read()
    if b"\0" in data:
        _refuse_binary(data)
    text = _decode(data, 1).removeprefix("\ufeff")
    if not text:
        raise _empty("is empty")
    yield 1, {"text": text}


def _read_pieces(
    stream: BinaryIO, file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    """A plain-text file, cut before white space (:func:`last_cut`)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, text = 1, ""
    first = empty = True
    while data := stream.read(_CHUNK_BYTES):
        if b"\0" in data:
            _refuse_binary(data)
        before = decoder.getstate()[0]
        try:
            decoded = decoder.decode(data)
        except UnicodeDecodeError:
            _decode(before + data, lines)  # says where
            raise
        lines += data.count(b"\n")
        text += decoded.removeprefix("\ufeff") if first else decoded
        first = False
        # A run without white space is cut where the longest line would be refused.
        cut = last_cut(text) or (len(text) if len(text) > MAX_LINE_BYTES else 0)
        if cut:
            yield 1, {"text": text[:cut]}
            text, empty = text[cut:], False
    if decoder.getstate()[0]:
        _decode(decoder.getstate()[0], lines)
    if text:
        yield 1, {"text": text}
    elif empty:
        raise _empty("is empty")


def last_cut(text: str) -> int:
    """The last place where ``text`` can be cut in two without another reading of either part.

    That is before white space that follows something else: tokenizers split words there, and look
    ahead from white space, never back at it. 0 where there is no such place.
    """
    end = len(text)
    while (end := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        if not text[end - 1].isspace():
            return end
    return 0


def _read_lines(
    stream: BinaryIO, file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    number = 0
    blank = True
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        try:
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raise _too_long(len(raw) + _skip_line(stream))
            record = _parse_line(raw, number)
        except _Bad as bad:
            problems.append(bad.at(file, number))
            blank = False
            continue
        if record is not None:
            blank = False
            yield number, record
    if blank:
        raise _empty("holds only blank lines" if number else "is empty")


def _skip_line(stream: BinaryIO) -> int:
    """Read past the next line end in small pieces; return how many bytes of text came before."""
    skipped = 0
    while piece := stream.readline(_CHUNK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            return skipped - 1
    return skipped


def _too_long(size: int) -> _Bad:
    message = f"The line has {size:,} bytes; at most {MAX_LINE_BYTES:,} are read."
    fix = "Split the row into shorter ones; if the file is one large array, write one row per line."
    return _Bad("line.too_long", message, fix)


def _decode(data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        number = line + data.count(b"\n", 0, error.start)
        found = f"0x{data[error.start]:02X}"
        message = f"Byte {error.start - start + 1} of the line ({found}) is not valid UTF-8."
        fix = "Save the file as UTF-8; from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
        raise _Bad("encoding.utf8", message, fix, number) from None


def _parse_line(raw: bytes, number: int) -> Record | None:
    """Decode and check one line; None when it is blank."""
    text = _decode(raw, number).rstrip("\r\n")  # or columns could point past the line
    if number == 1:
        text = text.removeprefix("\ufeff")
    if not text.strip(" \t\r\n"):
        return None
    value = _loads(text)
    if not isinstance(value, dict):
        message = f"The line holds {json_kind(value)}; a row is an object, like {{...}}."
        fix = 'Write each row as one object on its own line, for example {"text": "..."}.'
        raise _Bad("json.not_object", message, fix)
    # Valid UTF-8 holds no surrogates, so only a \uD8xx escape can bring one in.
    if "\\u" in text and _SURROGATE_ESCAPE.search(text):
        _refuse_surrogates(value)
    return value


def _loads(text: str) -> object:
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:].removesuffix(" at").rstrip(": ")
        message = f"The line is not valid JSON: {reason}, at column {error.pos + 1}."
        raise _Bad("json.invalid", message, _json_fix(text, error)) from None
    except RecursionError:
        message = "Arrays or objects are nested too deeply to be read."
        raise _Bad("json.too_deep", message, "Flatten or remove the nested value.") from None
    except ValueError:  # Python refuses to convert integers of more than 4,300 digits
        raise _not_finite("A number with thousands of digits is too large to hold.") from None
    return value


def _json_fix(text: str, error: json.JSONDecodeError) -> str:
    at = text[error.pos : error.pos + 1]
    if at == "\ufeff":
        return "Remove the byte order mark (U+FEFF); it may stand only at the start of the file."
    if error.msg.startswith("Extra data"):
        return "Put each object on its own line, with nothing before or after it."
    if at == "'":
        return 'Use double quotes (") around keys and text; json.dumps in Python writes them.'
    if text.strip() in ("[", "{", "]", "}", "},"):
        return "Write each row on a single line, with no array around the rows."
    return "Correct the line at that column, or write the file again with a JSON library."


def _unique(pairs: list[tuple[str, object]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                message = f"The key {shown(key)} occurs twice in one object."
                raise _Bad("json.duplicate_key", message, "Keep one of them, or rename the other.")
            seen.add(key)
    return record


def _not_finite(message: str) -> _Bad:
    fix = "Write null or a finite number, or remove the field."
    return _Bad("json.not_finite", message, fix)


def _constant(literal: str) -> object:
    raise _not_finite(f"{literal} is not a number in JSON.")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise _not_finite(f"The number {shown(literal)} is too large to hold.")
    return value


def _refuse_surrogates(record: Record) -> None:
    for field, content in record.items():
        stack: list[object] = [field, content]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += value.keys()
                stack += value.values()
            elif isinstance(value, list):
                stack += value
            elif isinstance(value, str) and (found := _LONE_SURROGATE.search(value)):
                code = f"\\u{ord(found.group()):04x}"
                message = f"Field {shown(field)} holds {code}, which is half of a character."
                fix = "Write the whole character; text cut in the middle of an emoji does this."
                raise _Bad("encoding.surrogate", message, fix)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
)
