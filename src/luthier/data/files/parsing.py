"""JSON parsing of single values, with precise error messages.

The fast path is jiter, which also rejects repeated keys, NaN, invalid UTF-8 and lone surrogates.
Values that jiter rejects are parsed again by a strict parser, whose messages name location and fix.
Numbers too large for float64 pass jiter and are checked afterwards.
"""

from __future__ import annotations

import ast
import codecs
import json
import math
import re
from typing import BinaryIO

import jiter

from luthier.errors import Location, RowRefused

Record = dict[str, object]

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Most bytes of a line. A longer line is rejected and skipped with constant memory."""

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
"""A number in a cell of a table."""
_PIECE_BYTES = 64 * 1024
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def json_kind(value: object) -> str:
    """Name the type of a decoded JSON value in JSON's own words, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def quote(text: str) -> str:
    """Quote text from the data for a message: short, on one line, printable."""
    # Escape codes would reach the terminal, and a lone surrogate cannot be encoded.
    clipped = text if len(text) <= 40 else text[:39] + "…"
    return f'"{repr(clipped)[1:-1]}"'


def text_length(value: object) -> int:
    """Return the total length of all strings in a value, in characters."""
    if isinstance(value, str):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(text_length, inside))


def read_line(stream: BinaryIO, fix: str) -> bytes:
    """Return the next line with its line end; empty at the end of ``stream``.

    Raises:
        RowRefused: for a line of more than :data:`MAX_LINE_BYTES`, with the advice ``fix``. The
            stream is then at the next line.
    """
    raw = stream.readline(MAX_LINE_BYTES + 1)
    if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
        return raw
    size = len(raw)
    while piece := stream.readline(_PIECE_BYTES):
        size += len(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
    message = f"The line has {size:,} bytes; the limit is {MAX_LINE_BYTES:,}."
    raise RowRefused("line.too_long", message, f"Split the row into shorter rows; {fix}.")


def decode(data: bytes, line: int) -> str:
    """Decode UTF-8 text that starts on ``line``; :class:`RowRefused` names the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        number = line + data.count(b"\n", 0, error.start)
        byte = f"0x{data[error.start]:02X}"
        message = f"Byte {error.start - start + 1} of the line ({byte}) is not valid UTF-8."
        fix = "Save the file as UTF-8; from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
        raise RowRefused("encoding.utf8", message, fix, Location(line=number)) from None


class PieceDecoder:
    """Incremental UTF-8 decoder without the byte order mark; errors name the line."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1
        self._begun = False

    def decode(self, data: bytes, last: bool = False) -> str:
        """Return the text of the next piece; an incomplete last character moves to the next piece.

        Raises:
            RowRefused: for invalid UTF-8, or an incomplete character at the end of the ``last``
                piece.
        """
        before = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, last)
        except UnicodeDecodeError:
            decode(before + data, self._line)  # raises with the position
            raise
        self._line += data.count(b"\n")
        if text and not self._begun:
            self._begun = True
            return text.removeprefix("\ufeff")
        return text


def parse_line(raw: bytes, number: int) -> Record | None:
    """Parse and check one line; ``None`` for a blank line."""
    try:
        value: object = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError:
        return _strict(raw, number)
    return value if isinstance(value, dict) and _all_finite(value) else _strict(raw, number)


def _all_finite(value: Record) -> bool:
    """Return whether all numbers in ``value`` fit into float64."""
    for one in value.values():
        if type(one) is not str:
            break
    else:
        return True  # most rows have no float
    stack = list(value.values())
    while stack:
        one = stack.pop()
        if type(one) is str:
            continue
        if type(one) is dict:
            stack += one.values()
        elif type(one) is list:
            stack += one
        elif type(one) is float and math.isinf(one):
            return False
    return True


def _strict(raw: bytes, number: int) -> Record | None:
    """Parse one line like :func:`parse_line`, with the exact location in error messages."""
    text = decode(raw, number).rstrip("\r\n")  # otherwise a column number could point past the line
    if number == 1:
        text = text.removeprefix("\ufeff")
    if not text.strip(" \t\r\n"):
        return None
    value = loads(text)
    if not isinstance(value, dict):
        message = f"The line is {json_kind(value)}; a row must be an object."
        fix = 'Write each row as one object on its own line, for example {"text": "..."}.'
        raise RowRefused("json.not_object", message, fix)
    if may_hold_surrogates(text):
        reject_surrogates(value)
    return value


def may_hold_surrogates(text: str) -> bool:
    """Return whether a JSON text may have surrogates: valid UTF-8 has none, only escapes do."""
    return "\\u" in text and _SURROGATE_ESCAPE.search(text) is not None


def loads(text: str) -> object:
    """Parse a JSON value on a line; :class:`RowRefused` for invalid JSON or huge values."""
    try:
        value: object = DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = json_reason(error.msg)
        message = f"Invalid JSON: {reason}, at column {error.pos + 1}."
        raise RowRefused("json.invalid", message, _json_fix(text, error)) from None
    except RecursionError:
        raise too_deep() from None
    except ValueError:  # Python limits integers to 4,300 digits
        raise too_many_digits() from None
    return value


def json_reason(message: str) -> str:
    """Return a JSON parser's message in lower case, as part of a sentence."""
    return message[:1].lower() + message[1:].removesuffix(" at").rstrip(": ")


def _json_fix(text: str, error: json.JSONDecodeError) -> str:
    at = text[error.pos : error.pos + 1]
    if at == "\ufeff":
        return (
            "Remove the byte order mark (U+FEFF), which is only allowed at the start of the file."
        )
    if error.msg.startswith("Extra data"):
        return "Write each object on its own line, without other text."
    if at == "'":
        return "Use double quotes (\") around keys and text, as Python's json.dumps."
    if text.strip() in ("[", "{", "]", "}", "},"):
        return "Write each row on a single line, without an array around the rows."
    return "Correct the line at this column, or write the file with a JSON library."


def _unique(pairs: list[tuple[str, object]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                message = f"The key {quote(key)} occurs twice in one object."
                raise RowRefused("json.duplicate_key", message, "Remove or rename one of the keys.")
            seen.add(key)
    return record


def too_deep(line: int = 0) -> RowRefused:
    """Return the error for values nested too deeply."""
    message = "Arrays or objects are nested too deeply."
    return RowRefused(
        "json.too_deep", message, "Flatten or remove the nested value.", Location(line=line)
    )


def too_many_digits() -> RowRefused:
    """Return the error for an integer with more digits than Python converts."""
    return _not_finite("A number with thousands of digits is too large.")


def _not_finite(message: str) -> RowRefused:
    fix = "Write null or a finite number, or remove the field."
    return RowRefused("json.not_finite", message, fix)


def _constant(literal: str) -> object:
    raise _not_finite(f"{literal} is not valid in JSON.")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise _not_finite(f"The number {quote(literal)} is too large.")
    return value


def reject_surrogates(record: Record) -> None:
    """Raise :class:`RowRefused` if a string has a lone surrogate."""
    for field, content in record.items():
        stack: list[object] = [field, content]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += value.keys()
                stack += value.values()
            elif isinstance(value, list):
                stack += value
            elif isinstance(value, str) and (surrogate := _LONE_SURROGATE.search(value)):
                code = f"\\u{ord(surrogate.group()):04x}"
                message = f"Field {quote(field)} has {code}, which is half of a character."
                fix = "Write the whole character; probably text was cut inside an emoji."
                raise RowRefused("encoding.surrogate", message, fix)


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
_EMBEDDED = json.JSONDecoder(parse_constant=_constant, parse_float=_finite)
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def parse_embedded(text: str) -> object:
    """Parse JSON inside a string, such as the arguments of a tool call.

    Raises:
        ValueError: for invalid JSON, NaN, numbers beyond float64 and lone surrogates.
    """
    value, end = decode_embedded(text)
    if _WHITE_SPACE.fullmatch(text, end) is None:
        raise ValueError("unexpected text after the JSON value")
    return value


def parse_python(text: str) -> object:
    """Parse a value as pandas writes arrays and objects into a table: in Python's notation.

    Example: ``{'text': array(['Ghent'], dtype=object), 'answer_start': array([14])}``.

    Raises:
        ValueError: for anything but literals and arrays, and for values without a place in JSON.
    """
    try:
        return python_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no literal: {error}") from None


def python_value(node: ast.expr) -> object:
    """Return a literal in JSON's types; ``ValueError`` or ``TypeError`` for others, such as bytes."""
    value = ast.literal_eval(_OtherNotations().visit(node))
    return decode_embedded(json.dumps(value, allow_nan=False))[0]


class _OtherNotations(ast.NodeTransformer):
    """Conversion of numpy's ``array([…], dtype=…)`` to the list, and of JSON's ``true``, ``false``
    and ``null``, which templates write in Python."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array" and node.args
        inner: ast.AST = self.visit(node.args[0]) if is_array else node
        return inner

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def decode_embedded(text: str, at: int = 0) -> tuple[object, int]:
    """Return the JSON value at position ``at`` (after white space), and the end of the value.

    Raises:
        ValueError: see :func:`parse_embedded`.
    """
    matched = _WHITE_SPACE.match(text, at)
    start = matched.end() if matched else at
    try:
        value, end = _EMBEDDED.raw_decode(text, start)
        if may_hold_surrogates(text[start:end]):  # surrogate escapes in an embedded string
            reject_surrogates({"": value})
    except RowRefused as bad:
        raise ValueError(bad.problem.message) from None
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None
    return value, end
