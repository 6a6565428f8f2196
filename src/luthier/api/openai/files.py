"""``/files``: what clients upload, and what jobs and batches wrote for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from luthier.api.openai.errors import absent, invalid
from luthier.api.openai.forms import Form
from luthier.api.openai.requests import Access, number_of, one_of, page, seconds, text_of
from luthier.api.openai.routing import Operation
from luthier.api.wire import Answer, Call
from luthier.errors import ObjectRefused
from luthier.store.uploaded_files import UploadedFile, UploadedFiles

PURPOSES = ("fine-tune", "batch", "evals", "user_data", "assistants", "vision")
"""What clients may upload for."""
SHORTEST, LONGEST = 3600, 30 * 86400
"""Seconds that a file may be told to live."""
MOST = 10_000
_FORM_BYTES = 1 << 20
"""Room for the form around a file."""


class Files:
    """The resource."""

    def __init__(self, store: UploadedFiles, access: Access, limit: int) -> None:
        """``limit`` is the size of a file at most, in bytes."""
        self.store, self.access, self.limit = store, access, limit

    def operations(self) -> Iterable[Operation]:
        """What can be done with files."""
        limit = self.limit + _FORM_BYTES
        return (
            Operation("POST", "files", "files.create", self.create, limit, sink=self.form),
            Operation("GET", "files", "files.list", self.list),
            Operation("GET", "files/{file}", "files.retrieve", self.retrieve),
            Operation("DELETE", "files/{file}", "files.delete", self.delete),
            Operation("GET", "files/{file}/content", "files.content", self.content),
        )

    def form(self, call: Call) -> Form:
        """What takes an upload as it comes: nothing of one is read that is not allowed."""
        self.access.to(call, "files.create", "file")
        kind, account = call.headers.get("content-type", ""), call.caller.account
        told = call.headers.get("content-length", "")
        # The form around the file is small: what is told of the body is nearly told of the file.
        least = int(told) - _FORM_BYTES if told.isascii() and told.isdigit() else 1
        self.store.objects.check(account, stored_bytes=max(1, least), objects=1, files=1)
        return Form(kind, lambda: self.store.begin(account), self.limit)

    def create(self, call: Call) -> Answer:
        """Keep what was uploaded: on disk first, then known."""
        form: Form = call.sink
        file = form.file()
        purpose = form.fields.get("purpose")
        if purpose is None:
            raise invalid("'purpose' is a required property.", "purpose")
        one_of("purpose", purpose, PURPOSES)
        lives = _lifetime(form.fields)
        if form.size == 0:
            raise invalid("The file is empty.", "file", "empty_file")
        name = form.name or "upload"
        row = self.store.keep(call.caller.account, file.finish(), name, purpose, lives)
        return Answer.of(shown(row))

    def list(self, call: Call) -> Answer:
        """A page of files, the newest first unless asked otherwise."""
        self.access.to(call, "files.list")
        limit, after = number_of(call, "limit", MOST, MOST), text_of(call, "after")
        order = one_of("order", text_of(call, "order") or "desc", ("asc", "desc"))
        found = self.store.list(
            call.caller.account,
            limit + 1,
            after=after,
            purpose=text_of(call, "purpose"),
            ascending=order == "asc",
        )
        if found is None:
            raise invalid(f"No such file: {after}.", "after")
        return page(found, limit, shown)

    def retrieve(self, call: Call) -> Answer:
        """One file."""
        return Answer.of(shown(self._found(call, "files.retrieve")))

    def delete(self, call: Call) -> Answer:
        """Forget a file and its bytes; jobs that have read it go on."""
        file_id = call.params["file"]
        self.access.to(call, "files.delete", "file", file_id)
        if not self.store.delete(call.caller.account, file_id):
            raise absent("File object", file_id, "id")
        return Answer.of({"id": file_id, "object": "file", "deleted": True})

    def content(self, call: Call) -> Answer:
        """The exact bytes."""
        row = self._found(call, "files.content")
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
        return Answer(200, pieces, headers)

    def _found(self, call: Call, action: str) -> UploadedFile:
        file_id = call.params["file"]
        self.access.to(call, action, "file", file_id)
        row = self.store.get(call.caller.account, file_id)
        if row is None:
            raise absent("File object", file_id, "id")
        return row


def shown(row: UploadedFile) -> dict[str, Any]:
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
    if after is None or not re.fullmatch("[0-9]{1,9}", after):
        raise invalid("Seconds must be a whole number.", "expires_after[seconds]")
    if not SHORTEST <= int(after) <= LONGEST:
        text = f"Seconds must be from {SHORTEST} to {LONGEST}."
        raise invalid(text, "expires_after[seconds]")
    return timedelta(seconds=int(after))
