"""``/files``: uploaded files, and result files of jobs and batches."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from typing import Annotated, Literal

from fastapi import Form, Query, UploadFile

from luthier.errors import ObjectRefused
from luthier.limits import MIB
from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.http.streams import StreamedResponse
from luthier.server.openai.operations import (
    Call,
    OpenAICall,
    OpenAIRoute,
    Order,
    openai_router,
    page,
)
from luthier.server.openai.protocol import JsonObject, absent, existing, invalid, seconds
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables import jobs
from luthier.server.tables.openai import vector_stores
from luthier.server.tables.openai.uploaded_files import UploadedFile
from luthier.server.tables.text import check_storable

FILE_BYTES = 512_000_000
"""Maximum size of an uploaded file in bytes."""
Purpose = Literal["fine-tune", "batch", "evals", "user_data", "assistants", "vision"]
SHORTEST, LONGEST = 3600, 30 * 86400
"""Range of the lifetime of a file in seconds."""
MOST = 10_000
"""Maximum number of files of a page."""


class UploadRoute(OpenAIRoute):
    """Route for uploads. A multipart form is larger than the uploaded file."""

    body_limit = FILE_BYTES + MIB


router, uploads = openai_router(), openai_router(UploadRoute)


@uploads.post("/files", name="files.create")
def create(
    call: OpenAICall,
    file: UploadFile,
    purpose: Annotated[Purpose, Form()],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    lifetime: Annotated[
        int | None, Form(alias="expires_after[seconds]", ge=SHORTEST, le=LONGEST)
    ] = None,
) -> JsonObject:
    """Store an uploaded file."""
    call.record("file")
    if (anchor is None) != (lifetime is None):
        missing_part = "anchor" if anchor is None else "seconds"
        text = "'expires_after' needs an anchor and seconds."
        raise invalid(text, f"expires_after[{missing_part}]")
    if not file.size:
        raise invalid("The file is empty.", "file", "empty_file")
    name = file.filename or "upload"
    try:
        check_storable(name)
    except ValueError as error:
        raise invalid(f"The file name is invalid: {error}.", "file") from None
    pieces = iter(partial(file.file.read, MIB), b"")
    lives = None if lifetime is None else timedelta(seconds=lifetime)
    stored = call.context.files.add(call.account, pieces, name, purpose, lives)
    call.record_created("file", stored.id)
    return file_object(stored)


@router.get("/files", name="files.list")
def list_files(
    call: OpenAICall,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    after: str | None = None,
    purpose: str | None = None,
    order: Order = "desc",
) -> JsonObject:
    """List files, newest first."""
    files = call.context.files.list(
        call.account, limit + 1, after=after, purpose=purpose, ascending=order == "asc"
    )
    if files is None:
        raise invalid(f"No such file: {after}.", "after")
    return page(files, limit, file_object)


@router.get("/files/{file}", name="files.retrieve")
def retrieve(call: OpenAICall, file: Name) -> JsonObject:
    """Return the metadata of a file."""
    return file_object(_find(call, file))


@router.delete("/files/{file}", name="files.delete")
def delete(call: OpenAICall, file: Name) -> JsonObject:
    """Delete a file and the file's content, and remove the file from all vector stores. A file of a
    waiting or running job is not deleted."""
    call.record("file", file)
    with call.context.database.read() as session:
        if job := jobs.job_with_data(session, call.account, file_address(file)):
            text = f"The file {file} is in use by the job {job.name}. Wait, or cancel the job."
            raise Fault("Conflict", text, parameter="id")
        stores = vector_stores.stores_of(session, file)
    if not call.context.files.delete(call.account, file):
        raise absent("File object", file, "id")
    for store in stores:
        call.context.indexes.prune(call.account, store)
    return {"id": file, "object": "file", "deleted": True}


@router.get("/files/{file}/content", name="files.content", response_model=None)
def content(call: OpenAICall, file: Name) -> StreamedResponse:
    """Return the content of a file, byte for byte."""
    row = _find(call, file)
    try:
        pieces = call.context.files.read(row)
    except ObjectRefused as gone:  # deleted through the S3 API
        raise absent("File object", file, "id") from gone
    name = re.sub(r"[^A-Za-z0-9._-]", "_", row.name)
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(row.size),
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    return StreamedResponse(pieces, headers)


def _find(call: Call, file_id: str) -> UploadedFile:
    found = call.context.files.get(call.account, file_id)
    return existing(found, "File object", file_id, "id")


def file_object(row: UploadedFile) -> JsonObject:
    """Return a file as OpenAI's object."""
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
