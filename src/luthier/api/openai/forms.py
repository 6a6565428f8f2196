"""Bodies of uploads: ``multipart/form-data`` as it comes, taken apart by python-multipart.

The file of a form goes straight to where the store keeps it, encrypted where that is: it is never held
in memory, and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from luthier.api.openai.errors import invalid
from luthier.store.object_files import Writing
from luthier.store.text import check_storable

FILE = "file"
"""Name of the part that is kept as a file; other files in a form are passed over."""
MOST_FIELDS = 64
MOST_FIELD_BYTES = 1 << 16


class Form:
    """A form with one file; use it in a ``with``, at whose end a file that nobody took is gone."""

    def __init__(self, content_type: str, begin: Callable[[], Writing], limit: int) -> None:
        """``begin`` makes a place for the file, which has ``limit`` bytes at most.

        Raises:
            Fault: 400 for a body that is no form.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise invalid("The body of an upload must be multipart/form-data.")
        self.fields: dict[str, str] = {}
        self.name: str | None = None
        """Of the file, as the client calls it; ``None`` where the form has none."""
        self.size = 0
        """Bytes of the file that have come."""
        self._begin, self._limit = begin, limit
        self._writing: Writing | None = None
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._part, self._is_file, self._parts = "", False, 0
        self._text = bytearray()
        self._ended = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._on_part,
                    "on_header_field": self._on_header,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _unreadable(error) from error

    def __enter__(self) -> Form:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writing is not None:
            self._writing.__exit__(kind, error, trace)

    def write(self, data: bytes) -> int:
        """Take the next bytes of the body.

        Raises:
            Fault: 400 for what is no form, or has a file that is too large.
            DoesNotFit: where the disk is full.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _unreadable(error) from error
        return len(data)

    def file(self) -> Writing:
        """Where the file is, once the body has come to its end: whole, and not finished yet.

        Raises:
            Fault: 400 where the form was cut, or has no file.
        """
        if not self._ended:
            raise invalid("The form cannot be read: it does not come to its end.")
        if self._writing is None:
            raise invalid("'file' is a required property.", FILE)
        return self._writing

    def _on_part(self) -> None:
        self._headers, self._text = {}, bytearray()
        self._parts += 1
        if self._parts > MOST_FIELDS:
            raise invalid(f"A form has at most {MOST_FIELDS} parts.")

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers(self) -> None:
        """What kind of part begins (RFC 7578, section 4.2)."""
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise invalid("A part of the form has no name.")
        coding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if coding not in (b"binary", b"8bit", b"7bit"):
            # Section 4.7: forms no longer have any. To pass over it would be to keep other bytes.
            raise invalid(
                "Parts of a form are sent as they are, without a Content-Transfer-Encoding."
            )
        self._part = _text(options[b"name"])
        self._is_file = b"filename" in options
        if self._is_file and self._part == FILE:
            if self._writing is not None:
                raise invalid("A form has one file.", FILE)
            self.name = _text(options[b"filename"], FILE)
            self._writing = self._begin()

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            if len(self._text) + end - start > MOST_FIELD_BYTES:
                raise invalid(f"A field has at most {MOST_FIELD_BYTES} bytes.", self._part)
            self._text += data[start:end]
        elif self._part == FILE and self._writing is not None:
            self.size += end - start
            if self.size > self._limit:
                raise invalid(f"The file has more than {self._limit:,} bytes.", FILE)
            self._writing.write(data[start:end])

    def _on_part_end(self) -> None:
        if not self._is_file:
            self.fields[self._part] = _text(self._text, self._part)

    def _on_end(self) -> None:
        self._ended = True


def _text(data: bytes | bytearray, parameter: str | None = None) -> str:
    """A name or a value of the form; 400 where it is no text that can be kept."""
    try:
        text = data.decode()
        check_storable(text)
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise invalid(
            f"The form cannot be read, one of its names or values: {why}.", parameter
        ) from None
    return text


def _unreadable(error: Exception) -> Exception:
    return invalid(f"The form cannot be read: {error}.")
