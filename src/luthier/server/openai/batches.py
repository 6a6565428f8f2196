"""``/batches``, and the thread that runs batches and resumes the batches of a killed server."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy.orm import Session

from luthier.errors import QuotaExceeded
from luthier.files import numbered_lines
from luthier.limits import BODY_BYTES
from luthier.server.background import BackgroundRunner, caller_fields
from luthier.server.http.exchanges import Recorder, RequestObservation
from luthier.server.http.messages import Fault, parse_json
from luthier.server.http.metrics import RequestRecord
from luthier.server.http.routes import Name
from luthier.server.openai.generation import Answers
from luthier.server.openai.operations import Limit, OpenAICall, openai_router, page, row_before
from luthier.server.openai.protocol import (
    Body,
    JsonObject,
    Metadata,
    error_of,
    existing,
    invalid,
    seconds,
    shape_of,
)
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables import storage
from luthier.server.tables.database import Database, now
from luthier.server.tables.openai import batches as store
from luthier.server.tables.openai.batches import Batch
from luthier.server.tables.usage import CountUsage

Answered = tuple[bool, JsonObject]
"""Result of one line: True if the request failed, and the line of the result file."""

AT_ONCE = 8
"""Number of lines of a batch that run at the same time."""
MOST_LINES = 50_000
LONGEST_LINE = BODY_BYTES
MOST_ERRORS = 50
"""Maximum number of errors that a batch reports."""
router = openai_router()
_MOMENTS = {
    "in_progress_at": store.IN_PROGRESS,
    "finalizing_at": store.FINALIZING,
    "completed_at": store.COMPLETED,
    "failed_at": store.FAILED,
    "expired_at": store.EXPIRED,
    "cancelling_at": store.CANCELLING,
    "cancelled_at": store.CANCELLED,
}


class BatchRunner(BackgroundRunner[Batch, Answered]):
    """Thread that runs batches. Several servers may share a database."""

    kind, at_once, working = Batch, AT_ONCE, store.IN_PROGRESS
    action = "luthier:openai.batches.create"

    def __init__(
        self,
        database: Database,
        files: UploadedFiles,
        endpoints: Mapping[str, Answers],
        count: CountUsage = lambda account, user, model, used: None,
        recorder: Recorder | None = None,
    ) -> None:
        """Create the runner; ``count`` records the usage of accounts, ``recorder`` captures lines."""
        super().__init__(database, count)
        self.files, self.endpoints, self.recorder = files, endpoints, recorder

    def sweep(self) -> None:
        """Remove expired files."""
        self.files.remove_expired()

    def work(self, batch: Batch) -> None:
        """Check the lines of ``batch``, run each line without a result, and write the result files."""
        row = self.files.get(batch.account, batch.input_file)
        if row is None:
            self._fail(batch, [_error("file_not_found", "The input file is deleted.", None)])
            return
        # Checked as a whole before the first line runs, because a line costs work and the client
        # expects all or nothing.
        if batch.status == store.VALIDATING:
            total, errors = self._problems(
                numbered_lines(self.files.read(row), LONGEST_LINE), batch.endpoint
            )
            if errors:
                self._fail(batch, errors)
                return
            with self.database.write() as session:
                locked = self.lock_held(session, batch)
                # The client may have cancelled the batch during the check.
                if locked is not None and locked.status == store.VALIDATING:
                    locked.total = total
                    store.enter(locked, store.IN_PROGRESS)
        with self.database.read() as session:
            # Lines that an earlier server answered are not queried again.
            done = store.done_lines(session, batch.id)
        # The file is read again line by line, because it may be larger than the memory.
        left = (
            each
            for each in numbered_lines(self.files.read(row), LONGEST_LINE)
            if each[0] not in done
        )
        if self.work_through(batch, left, partial(self._answer, batch)):
            self._finish(batch)

    def record(self, session: Session, batch: Batch, number: int, answered: Answered) -> None:
        """Store the result of a line."""
        store.record(session, batch.id, number, *answered)

    def state(self, batch: Batch) -> str:
        """Return the status of ``batch``, or ``expired`` after the time limit."""
        return store.EXPIRED if now() > batch.expires else batch.status

    def fail(self, batch: Batch, code: str, message: str) -> None:
        """End ``batch`` with an error that belongs to no line."""
        self._fail(batch, [_error(code, message, None)])

    def _problems(
        self, lines: Iterable[tuple[int, bytes]], endpoint: str
    ) -> tuple[int, list[JsonObject]]:
        """Return the number of lines of an input file, and their errors."""
        count, errors = 0, list[JsonObject]()
        first: dict[str, int] = {}
        for number, line in lines:
            count += 1
            if count > MOST_LINES:
                text = f"A batch has at most {MOST_LINES:,} lines."
                return count, [_error("too_many_lines", text, None)]
            if len(line) > LONGEST_LINE:
                text = f"A line has at most {LONGEST_LINE:,} bytes."
                errors.append(_error("line_too_large", text, number))
                continue
            # Lines are still counted, because the limit of lines is the more useful error.
            if len(errors) > MOST_ERRORS:
                continue
            try:
                line_body = parse_json(line)
            except Fault as fault:
                errors.append(_error("line_too_large", fault.message, number))
                continue
            except ValueError as error:
                text = f"The line is not valid JSON: {error}."
                errors.append(_error("invalid_json_line", text, number))
                continue
            code, text, param = _problem(line_body, endpoint, first, number)
            if code:
                errors.append(_error(code, text, number, param))
        if not count:
            errors.append(_error("empty_file", "The input file has no lines.", None))
        return count, errors

    def _answer(self, batch: Batch, line: bytes) -> tuple[bool, JsonObject]:
        members = json.loads(line)
        endpoint, status = self.endpoints[batch.endpoint], 200
        operation = f"openai.{batch.endpoint.removeprefix('/v1/').replace('/', '.')}.create"
        record = RequestRecord(secrets.token_hex(12), "POST", "", operation=operation)
        observed = self.recorder and RequestObservation(self.recorder, record, time.perf_counter())

        def count(model: str, read: int, written: int) -> None:
            self.count_tokens(batch, model, read, written)
            record.add_model(model)
            record.add_tokens(model, read, written)

        try:
            # For each line: a user who lost the right during the batch gets no more replies.
            caller = self.caller_of(batch)
            if observed:
                observed.begin(caller, members["body"])
            answer = self.attempt(batch, partial(endpoint, caller.account, members["body"]), count)
        except Fault as fault:
            record.error = fault.code
            status, answer = shape_of(fault).status, {"error": error_of(fault)}
        if observed and observed.exchange:
            observed.exchange.pieces = [json.dumps(answer).encode()]
            record.bytes_in, record.bytes_out = len(line), len(observed.exchange.pieces[0])
            observed.end()
        response = {"status_code": status, "request_id": record.request_id, "body": answer}
        return status != 200, {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": members["custom_id"],
            "response": response,
            "error": None,
        }

    def _finish(self, batch: Batch) -> None:
        """Write the result files, then set the status: the files of a completed batch always exist."""
        with self.database.write() as session:
            locked = self.lock_held(session, batch)
            if locked is None:
                return
            counts = store.counts(session, locked)
            missing = locked.total > sum(counts)
            end = store.EXPIRED if missing else store.COMPLETED
            if locked.status == store.CANCELLING:
                end = store.CANCELLED
            elif locked.status == store.IN_PROGRESS:
                store.enter(locked, store.FINALIZING)
        files: dict[str, str] = {}
        for failed, column in ((False, "output_file"), (True, "error_file")):
            if counts[failed]:
                # The id depends on the batch only: after a crash, the file is not written twice.
                name = f"{batch.id}_{'error' if failed else 'output'}"
                file_id = f"file-{name.replace('_', '')}"
                try:
                    self.files.add(
                        batch.account,
                        self._result_lines(batch, failed),
                        f"{name}.jsonl",
                        "batch_output",
                        file_id=file_id,
                    )
                except QuotaExceeded:
                    # A failed batch has no files: clients could mistake one file for the whole result.
                    for written in files.values():
                        self.files.delete(batch.account, written)
                    raise
                files[column] = file_id
        with self.database.write() as session:
            locked = self.lock_held(session, batch)
            if locked is not None:
                for column, file_id in files.items():
                    setattr(locked, column, file_id)
                store.end(session, locked, end)

    def _result_lines(self, batch: Batch, failed: bool) -> Iterator[bytes]:
        """Yield the lines of the output file, or of the error file if ``failed``, page by page."""
        after = 0
        while True:
            with self.database.read() as session:
                results = store.results(session, batch.id, failed, after)
            if not results:
                return
            for _, result in results:
                yield json.dumps(result, ensure_ascii=False).encode() + b"\n"
            after = results[-1][0]

    def _fail(self, batch: Batch, errors: list[JsonObject]) -> None:
        with self.database.write() as session:
            locked = self.lock_held(session, batch)
            if locked is not None and locked.status not in store.ENDED:
                locked.errors = errors[:MOST_ERRORS]
                store.end(session, locked, store.FAILED)


def _problem(
    line: Any, endpoint: str, first: dict[str, int], number: int
) -> tuple[str, str, str | None]:
    """Return code, message and parameter of the first error of a line. The code is empty if the
    line is valid."""
    if not isinstance(line, dict):
        return "invalid_json_line", "The line is not a JSON object.", None
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "The line has no 'custom_id'.", "custom_id"
    if first.setdefault(custom_id, number) != number:
        text = f"Line {first[custom_id]} has the same custom_id {custom_id!r}."
        return "duplicate_custom_id", text, "custom_id"
    if line.get("method") != "POST":
        return "invalid_method", "The method is not POST.", "method"
    if line.get("url") != endpoint:
        return "mismatched_url", f"The url is not the batch's endpoint {endpoint}.", "url"
    if not isinstance(line.get("body"), dict):
        return "missing_required_parameter", "The 'body' is missing or not an object.", "body"
    if line["body"].get("stream"):
        return "invalid_request", "Batches do not support streams.", "body.stream"
    return "", "", None


def _error(code: str, text: str, line: int | None, param: str | None = None) -> JsonObject:
    return {"code": code, "message": text, "param": param, "line": line}


class CreateBatch(Body):
    """Body of a request for a new batch."""

    input_file_id: Annotated[str, Field(min_length=1)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata = None


@router.post("/batches", name="batches.create")
def create(call: OpenAICall, body: CreateBatch) -> JsonObject:
    """Create a batch. The server runs the lines in the background."""
    call.record("batch")
    context, account = call.context, call.account
    file = context.files.get(account, body.input_file_id)
    if file is None:
        text = f"No such file: {body.input_file_id}."
        raise invalid(text, "input_file_id", "file_not_found")
    if file.purpose != "batch":
        text = f"The purpose of file {file.id} is '{file.purpose}', not 'batch'."
        raise invalid(text, "input_file_id", "invalid_file_purpose")
    with context.database.write() as session:
        quotas = context.files.objects.quotas(session, account)
        # Results become files: reject accounts without space before the work.
        storage.check(session, account, quotas, stored_bytes=1)
        batch = store.create(
            session,
            account,
            caller_fields(call.caller),
            body.endpoint,
            body.completion_window,
            body.input_file_id,
            dict(body.metadata or {}),
        )
    call.record_created("batch", batch.id)
    context.batches.wake()
    return batch_object(batch, (0, 0))


@router.get("/batches", name="batches.list")
def list_batches(call: OpenAICall, limit: Limit = 20, after: str | None = None) -> JsonObject:
    """List batches, newest first."""
    with call.context.database.read() as session:
        previous = row_before(after, "batch", partial(store.get, session, call.account))
        position = None if previous is None else previous.seq
        batches = store.list_batches(session, call.account, limit + 1, position)
        return page([_view(session, batch) for batch in batches], limit)


@router.get("/batches/{batch}", name="batches.retrieve")
def retrieve(call: OpenAICall, batch: Name) -> JsonObject:
    """Return a batch."""
    with call.context.database.read() as session:
        row = existing(store.get(session, call.account, batch), "batch", batch, "id")
        return _view(session, row)


@router.post("/batches/{batch}/cancel", name="batches.cancel")
def cancel(call: OpenAICall, batch: Name) -> JsonObject:
    """Cancel a batch; the files contain the results of completed lines."""
    call.record("batch", batch)
    with call.context.database.write() as session:
        row = existing(store.get(session, call.account, batch, lock=True), "batch", batch, "id")
        if not store.cancel(row):
            text = f"The batch is {row.status} and cannot be cancelled."
            raise invalid(text, reason="invalid_state")
        view = _view(session, row)
    call.context.batches.wake()
    return view


def _view(session: Session, batch: Batch) -> JsonObject:
    return batch_object(batch, store.counts(session, batch))


def batch_object(batch: Batch, counts: tuple[int, int]) -> JsonObject:
    """Return a batch as OpenAI's object."""
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
