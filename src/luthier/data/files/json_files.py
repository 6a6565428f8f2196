"""Reader for a JSON array of rows, concatenated JSON objects, or one object with nested rows.

The file is read as a whole and decoded row by row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from luthier.data.files import parsing
from luthier.data.files.containers import empty_file_error
from luthier.data.files.nested import rows_inside, unfold
from luthier.data.files.parsing import DECODER, Record, decode, json_kind
from luthier.errors import Location, Problem, RowNumber, RowRefused

_WHITE = " \t\r\n"
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def read_document(
    stream: BinaryIO, file: str, problems: list[Problem], warnings: list[Problem] | None = None
) -> Iterator[tuple[int, Record]]:
    """Yield ``(line, record)`` for the elements of an array, or for the objects of a file.

    If the first two rows share a line, or are inside of a file's only object
    (:mod:`luthier.data.files.nested`), rows have a :class:`~luthier.errors.RowNumber` instead.

    Text after invalid JSON cannot be read; other mistakes cost one element.
    """
    text = _Text(decode(stream.read(), 1).removeprefix("\ufeff"))
    array = text.next_character() == "["
    text.place += array
    count, share_line = 0, False
    while (start := text.next_character()) not in ("", "]"):
        if count and array:
            if start != ",":
                raise text.invalid("expected a comma between array elements", text.place)
            text.place += 1
            text.next_character()
        count += 1
        begin, line = text.place, text.line
        bad: RowRefused | None = None
        try:
            record = text.record()
        except RowRefused as error:
            if error.problem.line:
                raise
            bad = error
        if count == 1:
            share_line = not text.line_ends_after(begin)
        if share_line:
            line = RowNumber(count)
        if bad is not None:
            problems.append(bad.at(file, line))
            continue
        is_only = not array and count == 1 and not text.next_character()
        rows = unfold(record, file, warnings) if is_only else None
        if rows is None:
            yield line, record
        else:
            yield from ((RowNumber(number), row) for number, row in enumerate(rows, 1))
    if start != ("]" if array else ""):
        raise text.invalid(
            "the array is not closed" if array else "unexpected closing bracket", text.place
        )
    if array:
        text.place += 1
        if text.next_character():
            raise text.invalid("unexpected text after the array", text.place)
    if not count:
        raise empty_file_error("has no rows")


class _Text:
    """The text of a file and the current place in the text."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.line, self._counted = 1, 0

    def next_character(self) -> str:
        """Skip white space and return the next character; empty at the end of the file."""
        while self.text[self.place : self.place + 1] in _WHITE and self.place < len(self.text):
            self.place += 1
        self.line += self.text.count("\n", self._counted, self.place)
        self._counted = self.place
        return self.text[self.place : self.place + 1]

    def line_ends_after(self, start: int) -> bool:
        """Return whether a line ends between ``start`` and the element after the current place."""
        white = _BETWEEN.match(self.text, self.place)
        return "\n" in self.text[start : white.end() if white else self.place]

    def record(self) -> Record:
        """Decode the object at the current place. Errors with a line cannot be read past."""
        start = self.place
        try:
            value, self.place = DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            raise self.invalid(error.msg, error.pos) from None
        except RecursionError:
            raise parsing.too_deep(self.line) from None
        except (RowRefused, ValueError) as error:  # a problem of one value, so skip the value
            self.place = self._end(start)
            if isinstance(error, RowRefused):
                raise
            raise parsing.too_many_digits() from None
        is_long = self.place - start > parsing.MAX_LINE_BYTES
        if is_long and (not isinstance(value, dict) or rows_inside(value) is None):
            message = f"The row has more than {parsing.MAX_LINE_BYTES:,} characters."
            raise RowRefused("line.too_long", message, "Split the row into shorter rows.")
        if not isinstance(value, dict):
            message = f"The element is {json_kind(value)}; a row must be an object."
            fix = 'Write each row as an object, for example [{"text": "..."}].'
            raise RowRefused("json.not_object", message, fix)
        if parsing.may_hold_surrogates(self.text[start : self.place]):
            parsing.reject_surrogates(value)
        return value

    def _end(self, start: int) -> int:
        """Return the end of a value whose mistake is not a syntax error."""
        try:
            return json.JSONDecoder(parse_int=str).raw_decode(self.text, start)[1]
        except json.JSONDecodeError as error:
            raise self.invalid(error.msg, error.pos) from None

    def invalid(self, reason: str, place: int) -> RowRefused:
        """Return the error for a syntax error at ``place``."""
        line = self.text.count("\n", 0, place) + 1
        column = place - self.text.rfind("\n", 0, place)
        message = f"Invalid JSON: {parsing.json_reason(reason)}, at column {column}."
        fix = "Correct the file at this position, or write the file with a JSON library."
        return RowRefused("json.invalid", message, fix, Location(line=line))
