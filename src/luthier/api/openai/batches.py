"""``/batches``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy.orm import Session

from luthier.api.openai.batch_runner import BatchRunner
from luthier.api.openai.errors import absent, invalid
from luthier.api.openai.requests import (
    Access,
    Body,
    Metadata,
    body,
    number_of,
    page,
    seconds,
    text_of,
)
from luthier.api.openai.routing import Operation
from luthier.api.wire import Answer, Call, Caller
from luthier.errors import QuotaExceeded
from luthier.store import batches as store
from luthier.store import storage
from luthier.store.batches import Batch
from luthier.store.database import Database
from luthier.store.uploaded_files import UploadedFiles

MOST = 100
_MOMENTS = {
    "in_progress_at": store.IN_PROGRESS,
    "finalizing_at": store.FINALIZING,
    "completed_at": store.COMPLETED,
    "failed_at": store.FAILED,
    "expired_at": store.EXPIRED,
    "cancelling_at": store.CANCELLING,
    "cancelled_at": store.CANCELLED,
}


class CreateBatch(Body):
    """The body of a new batch."""

    input_file_id: Annotated[str, Field(min_length=1)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata = None


class Batches:
    """The resource."""

    def __init__(
        self, database: Database, files: UploadedFiles, access: Access, runner: BatchRunner
    ) -> None:
        self.database, self.files, self.access, self.runner = database, files, access, runner

    def operations(self) -> Iterable[Operation]:
        """What can be done with batches."""
        return (
            Operation("POST", "batches", "batches.create", self.create),
            Operation("GET", "batches", "batches.list", self.list),
            Operation("GET", "batches/{batch}", "batches.retrieve", self.retrieve),
            Operation("POST", "batches/{batch}/cancel", "batches.cancel", self.cancel),
        )

    def create(self, call: Call) -> Answer:
        """Take a batch; its lines are looked at in the background."""
        asked = body(call, CreateBatch)
        self.access.to(call, "batches.create", "batch")
        account = call.caller.account
        found = self.files.get(account, asked.input_file_id)
        if found is None:
            text = f"No such file: {asked.input_file_id}."
            raise invalid(text, "input_file_id", "file_not_found")
        if found.purpose != "batch":
            text = f"File {found.id} was uploaded for '{found.purpose}' and not for 'batch'."
            raise invalid(text, "input_file_id", "invalid_file_purpose")
        with self.database.write() as session:
            quotas = self.files.objects.quotas(session, account)
            # What is answered becomes files: whoever has no room for any learns it before the work.
            storage.check(session, account, quotas, stored_bytes=1, objects=1, files=1)
            # Its lock keeps others of the account from counting before this batch is there.
            storage.lock(session, account)
            if store.in_flight(session, account) >= quotas.batches_in_flight:
                raise QuotaExceeded(
                    f"The account has {quotas.batches_in_flight:,} batches that have not ended (quota "
                    "batches_in_flight). Wait for some of them, or cancel them.",
                    "batches_in_flight",
                )
            batch = store.create(
                session,
                account,
                caller_fields(call.caller),
                asked.endpoint,
                asked.completion_window,
                asked.input_file_id,
                dict(asked.metadata or {}),
            )
        self.runner.wake()
        return Answer.of(shown(batch, (0, 0)))

    def list(self, call: Call) -> Answer:
        """A page of batches, the newest first."""
        self.access.to(call, "batches.list")
        limit, after = number_of(call, "limit", 20, MOST), text_of(call, "after")
        account = call.caller.account
        with self.database.read() as session:
            position = None
            if after is not None:
                place = store.get(session, account, after)
                if place is None:
                    raise invalid(f"No such batch: {after}.", "after")
                position = place.seq
            found = store.list_batches(session, account, limit + 1, position)
            seen = [_seen(session, batch) for batch in found]
        return page(seen, limit, dict)

    def retrieve(self, call: Call) -> Answer:
        """One batch."""
        batch_id = call.params["batch"]
        self.access.to(call, "batches.retrieve", "batch", batch_id)
        with self.database.read() as session:
            batch = store.get(session, call.caller.account, batch_id)
            if batch is None:
                raise absent("batch", batch_id, "id")
            return Answer.of(_seen(session, batch))

    def cancel(self, call: Call) -> Answer:
        """Answer no further lines; those that are answered are in the files."""
        batch_id = call.params["batch"]
        self.access.to(call, "batches.cancel", "batch", batch_id)
        with self.database.write() as session:
            batch = store.get(session, call.caller.account, batch_id, lock=True)
            if batch is None:
                raise absent("batch", batch_id, "id")
            if not store.cancel(batch):
                text = f"The batch is {batch.status}; it cannot be cancelled any more."
                raise invalid(text, reason="invalid_state")
            answer = Answer.of(_seen(session, batch))
        self.runner.wake()
        return answer


def caller_fields(caller: Caller) -> dict[str, Any]:
    """A caller as it is kept with a batch: without policies, which may be others tomorrow.

    A session's own policy is kept: it binds what was begun in the session, for good.
    """
    session = caller.session
    return {
        "account": caller.account,
        "user": caller.user,
        "bearer": caller.bearer,
        "session": session.model_dump(mode="json") if session else None,
    }


def _seen(session: Session, batch: Batch) -> dict[str, Any]:
    return shown(batch, store.counts(session, batch))


def shown(batch: Batch, counts: tuple[int, int]) -> dict[str, Any]:
    """A batch as clients see it."""
    errors = {"object": "list", "data": batch.errors} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": seconds(batch.created),
        "expires_at": seconds(batch.expires),
        **{name: batch.moments.get(status) for name, status in _MOMENTS.items()},
        "request_counts": {
            "total": batch.total,
            "completed": counts[0],
            "failed": counts[1],
        },
        "metadata": batch.user_metadata,
    }
