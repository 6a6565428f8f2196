"""A JSON array of rows, or one object, read element by element: the file may exceed the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from luthier.data import parsing
from luthier.data.containers import empty_refusal
from luthier.data.parsing import DECODER, PieceDecoder, Record, Unreadable, json_kind
from luthier.errors import Problem

_CHUNK_BYTES = 1 << 18
_WHITE = " \t\r\n"
# An error so near to the end of what was read may only mean that there is more.
_MARGIN = 16


def read_document(
    stream: BinaryIO, file: str, problems: list[Problem]
) -> Iterator[tuple[int, Record]]:
    """Yield ``(line, record)`` for the elements of an array, or for the objects that a file is.

    Where the text is no JSON, nothing behind the place can be read; other mistakes cost one element.
    """
    text = _Text(stream)
    array = text.next_character() == "["
    if array:
        text.take(1)
    count = 0
    while (start := text.next_character()) not in ("", "]"):
        if count and array:
            if start != ",":
                raise text.invalid("an array goes on with a comma", text.place)
            text.take(1)
            text.next_character()
        count += 1
        line = text.line
        try:
            yield line, _record(text)
        except Unreadable as bad:
            if bad.line:
                raise
            problems.append(bad.at(file, line))
    if start != ("]" if array else ""):
        raise text.invalid(
            "the array has no end" if array else "there is no array to end", text.place
        )
    if array:
        text.take(1)
        if text.next_character():
            raise text.invalid("something follows the array", text.place)
    if not count:
        raise empty_refusal("holds no rows")


def _record(text: _Text) -> Record:
    """The object at the place in hand. Errors with a line cannot be read past."""
    value, source = text.value()
    if not isinstance(value, dict):
        message = f"The element is {json_kind(value)}; a row is an object, like {{...}}."
        fix = 'Write each row as an object, for example [{"text": "..."}].'
        raise Unreadable("json.not_object", message, fix)
    if parsing.may_hold_surrogates(source):
        parsing.refuse_surrogates(value)
    return value


class _Text:
    """The text of a file, of which a part is in memory; ``place`` is what comes next in it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.decoder = PieceDecoder()
        self.text = ""
        self.place = 0
        self.line = 1
        self.column = 1
        self.more()

    def more(self, size: int = _CHUNK_BYTES) -> bool:
        """Read on; whether there was anything."""
        data = self.stream.read(size)
        self.text = self.text[self.place :] + self.decoder.decode(data, last=not data)
        self.place = 0
        return bool(data)

    def next_character(self) -> str:
        """Go to what is no white space; the empty text at the end of the file."""
        while True:
            rest = self.place
            while rest < len(self.text) and self.text[rest] in _WHITE:
                rest += 1
            self.take(rest - self.place)
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]

    def take(self, count: int) -> None:
        """Go on by so many characters."""
        self.line, self.column = self.where(self.place + count)
        self.place += count

    def where(self, place: int) -> tuple[int, int]:
        """Line and column of what is at ``place`` or behind the place in hand."""
        lines = self.text.count("\n", self.place, place)
        if not lines:
            return self.line, self.column + place - self.place
        return self.line + lines, place - self.text.rfind("\n", 0, place)

    def value(self) -> tuple[object, str]:
        """The value in hand and its text; what comes next is behind it, also after most errors."""
        size = _CHUNK_BYTES
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except Unreadable:  # of the value, not of the text: go past it, then say so
                end = self.end(size)
                self.take(end - self.place)
                raise
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos + _MARGIN > len(self.text)
                if not cut:
                    raise self.invalid(error.msg, error.pos) from None
                self.grow(size, error)
                size *= 2
                continue
            except RecursionError:
                raise parsing.too_deep(self.line) from None
            except ValueError:
                self.take(self.end(size) - self.place)
                raise parsing.too_many_digits() from None
            source = self.text[self.place : end]
            self.take(end - self.place)
            return value, source

    def end(self, size: int) -> int:
        """Where the value in hand ends, whatever it holds."""
        lenient = json.JSONDecoder(parse_int=str)
        while True:
            try:
                return lenient.raw_decode(self.text, self.place)[1]
            except json.JSONDecodeError as error:
                self.grow(size, error)
                size *= 2

    def grow(self, size: int, error: json.JSONDecodeError) -> None:
        """Read on, as a value is cut off; refuse where nothing comes or it is too long."""
        if len(self.text) - self.place > parsing.MAX_LINE_BYTES:
            message = f"The row has more than {parsing.MAX_LINE_BYTES:,} characters."
            raise Unreadable(
                "line.too_long", message, "Split the row into shorter ones.", self.line
            )
        behind = error.pos - self.place  # more() lets go of what is behind the place
        if not self.more(size):
            raise self.invalid(error.msg, self.place + behind)

    def invalid(self, reason: str, place: int) -> Unreadable:
        """What is no JSON, at ``place``."""
        line, column = self.where(place)
        message = f"The file is not valid JSON: {parsing.json_reason(reason)}, at column {column}."
        fix = "Correct that place, or write the file again with a JSON library."
        return Unreadable("json.invalid", message, fix, line)
