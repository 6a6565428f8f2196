"""``/files``: what clients upload, and what jobs and batches wrote for them.

The server writes the file of a form straight to the store, once, and never holds the file in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from luthier.errors import ObjectRefused
from luthier.server.http.messages import Request, Response, parse_digits
from luthier.server.http.routing import Operation
from luthier.server.http.streams import RequestBody, Run
from luthier.server.openai.protocol import (
    Recorder,
    absent,
    invalid,
    is_ascending,
    one_of,
    page,
    page_query,
    seconds,
    text_of,
)
from luthier.server.tables.object_files import FileWriter
from luthier.server.tables.text import decode_storable
from luthier.server.tables.uploaded_files import UploadedFile, UploadedFiles

FILE = "file"
"""Name of the part that is kept as a file; other files in a form are passed over."""
MOST_FIELDS = 64
MOST_FIELD_BYTES = 1 << 16
PURPOSES = ("fine-tune", "batch", "evals", "user_data", "assistants", "vision")
"""What clients may upload for."""
SHORTEST, LONGEST = 3600, 30 * 86400
"""Seconds that a file may be told to live."""
MOST = 10_000
_FORM_BYTES = 1 << 20
"""Room for the form around a file."""


class UploadForm:
    """A form with one file; use it in a ``with``, at whose end a file that nobody took is gone."""

    def __init__(self, content_type: str, begin: Callable[[], FileWriter], limit: int) -> None:
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
        self._writing: FileWriter | None = None
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

    def __enter__(self) -> UploadForm:
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

    def file(self) -> FileWriter:
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
            self.fields[self._part] = _text(bytes(self._text), self._part)

    def _on_end(self) -> None:
        self._ended = True


def _text(data: bytes, parameter: str | None = None) -> str:
    """A name or a value of the form; 400 where it is no text that can be kept."""
    try:
        return decode_storable(data)
    except ValueError as error:
        text = f"The form cannot be read, one of its names or values: {error}."
        raise invalid(text, parameter) from None


def _unreadable(error: Exception) -> Exception:
    return invalid(f"The form cannot be read: {error}.")


class Files:
    """The resource."""

    def __init__(self, store: UploadedFiles, recorder: Recorder, limit: int) -> None:
        """``limit`` is the size of a file at most, in bytes."""
        self.store, self.recorder, self.limit = store, recorder, limit

    def operations(self) -> Iterable[Operation]:
        """What can be done with files."""
        limit = self.limit + _FORM_BYTES
        return (
            Operation("files.create", "POST", "files", body_limit=limit, stream=self.create),
            Operation("files.list", "GET", "files", self.list),
            Operation("files.retrieve", "GET", "files/{file}", self.retrieve),
            Operation("files.delete", "DELETE", "files/{file}", self.delete),
            Operation("files.content", "GET", "files/{file}/content", self.content),
        )

    async def create(self, request: Request, body: RequestBody, run: Run) -> Response:
        """Keep what is uploaded as it comes: on disk first, then known."""
        with await run(self._form, request) as form:
            await body.write_to(form.write, run)
            made: Response = await run(self._keep, request, form)
            return made

    def _form(self, request: Request) -> UploadForm:
        """What takes an upload: nothing of one is read that is not allowed."""
        self.recorder.record(request, "files.create", "file")
        kind, account = request.headers.get("content-type", ""), request.caller.account
        length = parse_digits(request.headers.get("content-length", "")) or 0
        # The form around the file is small: what is told of the body is nearly told of the file.
        least = max(1, length - _FORM_BYTES)
        self.store.objects.check(account, least)
        return UploadForm(kind, lambda: self.store.begin(account), self.limit)

    def _keep(self, request: Request, form: UploadForm) -> Response:
        file = form.file()
        purpose = form.fields.get("purpose")
        if purpose is None:
            raise invalid("'purpose' is a required property.", "purpose")
        one_of("purpose", purpose, PURPOSES)
        lives = _lifetime(form.fields)
        if form.size == 0:
            raise invalid("The file is empty.", "file", "empty_file")
        name = form.name or "upload"
        row = self.store.keep(request.caller.account, file.finish(), name, purpose, lives)
        return Response.json(file_object(row))

    def list(self, request: Request) -> Response:
        """A page of files, the newest first unless asked otherwise."""
        self.recorder.record(request, "files.list")
        limit, after = page_query(request, MOST, MOST)
        found = self.store.list(
            request.caller.account,
            limit + 1,
            after=after,
            purpose=text_of(request, "purpose"),
            ascending=is_ascending(request, "desc"),
        )
        if found is None:
            raise invalid(f"No such file: {after}.", "after")
        return page(found, limit, file_object)

    def retrieve(self, request: Request) -> Response:
        """One file."""
        return Response.json(file_object(self._find(request, "files.retrieve")))

    def delete(self, request: Request) -> Response:
        """Forget a file and its bytes; jobs that have read it go on."""
        file_id = request.params["file"]
        self.recorder.record(request, "files.delete", "file", file_id)
        if not self.store.delete(request.caller.account, file_id):
            raise absent("File object", file_id, "id")
        return Response.json({"id": file_id, "object": "file", "deleted": True})

    def content(self, request: Request) -> Response:
        """The exact bytes."""
        row = self._find(request, "files.content")
        try:
            pieces = self.store.read(row)
        except ObjectRefused as gone:  # deleted as an object of the account's bucket
            raise absent("File object", row.id, "id") from gone
        name = re.sub(r"[^A-Za-z0-9._-]", "_", row.name)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(row.size),
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return Response(200, pieces, headers)

    def _find(self, request: Request, action: str) -> UploadedFile:
        file_id = request.params["file"]
        self.recorder.record(request, action, "file", file_id)
        row = self.store.get(request.caller.account, file_id)
        if row is None:
            raise absent("File object", file_id, "id")
        return row


def file_object(row: UploadedFile) -> dict[str, Any]:
    """A file as clients see it."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.size,
        "created_at": seconds(row.created),
        "expires_at": seconds(row.expires),
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def _lifetime(fields: Mapping[str, str]) -> timedelta | None:
    """``expires_after``: an anchor, and seconds from it."""
    anchor, after = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and after is None:
        return None
    if anchor != "created_at":
        raise invalid("The anchor must be 'created_at'.", "expires_after[anchor]")
    lives = parse_digits(after or "", 9)
    if lives is None:
        raise invalid("Seconds must be a whole number.", "expires_after[seconds]")
    if not SHORTEST <= lives <= LONGEST:
        text = f"Seconds must be from {SHORTEST} to {LONGEST}."
        raise invalid(text, "expires_after[seconds]")
    return timedelta(seconds=lives)
