"""``/batches``, and the thread that works on them, which goes on where a killed server stopped."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy.orm import Session

from luthier.errors import QuotaExceeded
from luthier.files import numbered_lines
from luthier.inference.inference import meter
from luthier.inference.scheduler import working_for
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.server.background import BackgroundRunner, caller_fields
from luthier.server.http.messages import Caller, Fault, Request, Response, parse_json
from luthier.server.http.routing import Operation
from luthier.server.openai.protocol import (
    Body,
    Metadata,
    Recorder,
    absent,
    body,
    error_of,
    invalid,
    page,
    page_query,
    seconds,
    shape_of,
)
from luthier.server.tables import batches as store
from luthier.server.tables import storage
from luthier.server.tables.batches import Batch
from luthier.server.tables.database import Database, now
from luthier.server.tables.uploaded_files import UploadedFiles
from luthier.server.tables.usage import CountUsage, Usage

Answers = Callable[[Caller, Mapping[str, Any]], dict[str, Any]]
"""Answers a body of an endpoint with the rights of a caller."""

Answered = tuple[bool, dict[str, Any]]
"""Whether a line failed, and its line of the file."""

AT_ONCE = 8
"""Lines of a batch that are answered side by side."""
MOST_LINES = 50_000
LONGEST_LINE = BODY_BYTES
MOST_ERRORS = 50
"""What is wrong with more lines is not told."""
_log = logging.getLogger("luthier.server")
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
    """Answers the lines of batches. Start it with the server; several servers may share a database."""

    kind, at_once, working = Batch, AT_ONCE, store.IN_PROGRESS
    action = "luthier:openai.batches.create"

    def __init__(
        self,
        database: Database,
        files: UploadedFiles,
        endpoints: Mapping[str, Answers],
        count: CountUsage = lambda account, model, used: None,
        limits: ServerLimits | None = None,
    ) -> None:
        """``count`` is told what an account used, of which model."""
        super().__init__(database, count)
        self.limits, self.files, self.endpoints = limits or ServerLimits(), files, endpoints

    def sweep(self) -> None:
        """Remove files whose time is over."""
        self.files.remove_expired()

    def work(self, batch: Batch) -> None:
        """Look at its lines, answer those that are not answered, and write the files."""
        row = self.files.get(batch.account, batch.input_file)
        if row is None:
            self._fail(batch, [_error("file_not_found", "The input file is gone.", None)])
            return
        if batch.status == store.VALIDATING:
            total, errors = self._problems(
                numbered_lines(self.files.read(row), LONGEST_LINE), batch.endpoint
            )
            if errors:
                self._fail(batch, errors)
                return
            with self.database.write() as session:
                held = self.lock_held(session, batch)
                if held is not None and held.status == store.VALIDATING:
                    held.total = total
                    store.enter(held, store.IN_PROGRESS)
        with self.database.read() as session:
            done = store.done_lines(session, batch.id)
        # Read again, and line by line: files are larger than what should lie in memory.
        left = (
            each
            for each in numbered_lines(self.files.read(row), LONGEST_LINE)
            if each[0] not in done
        )
        if self.work_through(batch, left, partial(self._answer, batch)):
            self._finish(batch)

    def record(self, session: Session, batch: Batch, number: int, answered: Answered) -> None:
        """Write an answer down by its line."""
        store.record(session, batch.id, number, *answered)

    def state(self, batch: Batch) -> str:
        """Its status; expired, once its time is over."""
        return store.EXPIRED if now() > batch.expires else batch.status

    def fail(self, batch: Batch, code: str, message: str) -> None:
        """End it with an error that is of no line."""
        self._fail(batch, [_error(code, message, None)])

    def _problems(
        self, lines: Iterable[tuple[int, bytes]], endpoint: str
    ) -> tuple[int, list[dict[str, Any]]]:
        """How many lines an input file has, and what is wrong with them."""
        count, found = 0, list[dict[str, Any]]()
        first: dict[str, int] = {}
        for number, line in lines:
            count += 1
            if count > MOST_LINES:
                text = f"A batch has at most {MOST_LINES:,} lines."
                return count, [_error("too_many_lines", text, None)]
            if len(line) > LONGEST_LINE:
                text = f"A line has at most {LONGEST_LINE:,} bytes."
                found.append(_error("line_too_large", text, number))
                continue
            if len(found) > MOST_ERRORS:
                continue
            try:
                line_body = parse_json(line)
            except Fault as fault:
                found.append(_error("line_too_large", fault.message, number))
                continue
            except ValueError as error:
                text = f"The line is no JSON: {error}."
                found.append(_error("invalid_json_line", text, number))
                continue
            code, text, param = _problem(line_body, endpoint, first, number)
            if code:
                found.append(_error(code, text, number, param))
        if not count:
            found.append(_error("empty_file", "The input file has no lines.", None))
        return count, found

    def _answer(self, batch: Batch, line: bytes) -> tuple[bool, dict[str, Any]]:
        members = json.loads(line)
        refused: Fault | None = None
        try:
            caller = self.caller_of(batch)
            self.count(batch.account, "", Usage(requests=1))
            count = partial(self.count_tokens, batch.account)
            with meter(count), working_for(batch.account, background=True):
                answer = self.endpoints[batch.endpoint](caller, members["body"])
        except Fault as fault:
            refused = fault
        except Exception as error:
            _log.exception("a line of %s failed", batch.id)
            refused = Fault("InternalServer", f"The request failed: {type(error).__name__}.")
        if refused is None:
            status = 200
        else:
            status, answer = shape_of(refused).status, {"error": error_of(refused)}
        response = {"status_code": status, "request_id": secrets.token_hex(12), "body": answer}
        return refused is not None, {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": members["custom_id"],
            "response": response,
            "error": None,
        }

    def _finish(self, batch: Batch) -> None:
        """Write the files, then say so: whoever reads ``completed`` can read them."""
        with self.database.write() as session:
            held = self.lock_held(session, batch)
            if held is None:
                return
            counts = store.counts(session, held)
            missing = held.total > sum(counts)
            end = store.EXPIRED if missing else store.COMPLETED
            if held.status == store.CANCELLING:
                end = store.CANCELLED
            elif held.status == store.IN_PROGRESS:
                store.enter(held, store.FINALIZING)
        files: dict[str, str] = {}
        for failed, column in ((False, "output_file"), (True, "error_file")):
            if counts[failed]:
                # By an id that follows from the batch's: written again after a crash, it is one file.
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
                    # A batch that fails has no files: one without the other would be half an answer.
                    for written in files.values():
                        self.files.delete(batch.account, written)
                    raise
                files[column] = file_id
        with self.database.write() as session:
            held = self.lock_held(session, batch)
            if held is not None:
                for column, file_id in files.items():
                    setattr(held, column, file_id)
                store.end(session, held, end)

    def _result_lines(self, batch: Batch, failed: bool) -> Iterator[bytes]:
        """Lines of one of the files; each of a page of them is read by itself."""
        after = 0
        while True:
            with self.database.read() as session:
                found = store.results(session, batch.id, failed, after)
            if not found:
                return
            for _, result in found:
                yield json.dumps(result, ensure_ascii=False).encode() + b"\n"
            after = found[-1][0]

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        with self.database.write() as session:
            held = self.lock_held(session, batch)
            if held is not None and held.status not in store.ENDED:
                held.errors = errors[:MOST_ERRORS]
                store.end(session, held, store.FAILED)


def _problem(
    asked: Any, endpoint: str, first: dict[str, int], number: int
) -> tuple[str, str, str | None]:
    """Code, text and member of what is wrong with one line; empty where nothing is."""
    if not isinstance(asked, dict):
        return "invalid_json_line", "The line is no JSON object.", None
    custom_id = asked.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "A line needs its 'custom_id'.", "custom_id"
    if first.setdefault(custom_id, number) != number:
        text = f"The custom_id {custom_id!r} stands on line {first[custom_id]} already."
        return "duplicate_custom_id", text, "custom_id"
    if asked.get("method") != "POST":
        return "invalid_method", "The method of a line is POST.", "method"
    if asked.get("url") != endpoint:
        return "mismatched_url", f"The url of a line is the batch's, {endpoint}.", "url"
    if not isinstance(asked.get("body"), dict):
        return "missing_required_parameter", "A line needs its 'body', an object.", "body"
    if asked["body"].get("stream"):
        return "invalid_request", "Lines of a batch are not streamed.", "body.stream"
    return "", "", None


def _error(code: str, text: str, line: int | None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": text, "param": param, "line": line}


class CreateBatch(Body):
    """The body of a new batch."""

    input_file_id: Annotated[str, Field(min_length=1)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata = None


class Batches:
    """The resource."""

    def __init__(
        self, database: Database, files: UploadedFiles, recorder: Recorder, runner: BatchRunner
    ) -> None:
        self.database, self.files, self.recorder, self.runner = database, files, recorder, runner

    def operations(self) -> Iterable[Operation]:
        """What can be done with batches."""
        return (
            Operation("batches.create", "POST", "batches", self.create),
            Operation("batches.list", "GET", "batches", self.list),
            Operation("batches.retrieve", "GET", "batches/{batch}", self.retrieve),
            Operation("batches.cancel", "POST", "batches/{batch}/cancel", self.cancel),
        )

    def create(self, request: Request) -> Response:
        """Take a batch; its lines are looked at in the background."""
        parameters = body(request, CreateBatch)
        self.recorder.record(request, "batches.create", "batch")
        account = request.caller.account
        found = self.files.get(account, parameters.input_file_id)
        if found is None:
            text = f"No such file: {parameters.input_file_id}."
            raise invalid(text, "input_file_id", "file_not_found")
        if found.purpose != "batch":
            text = f"File {found.id} was uploaded for '{found.purpose}' and not for 'batch'."
            raise invalid(text, "input_file_id", "invalid_file_purpose")
        with self.database.write() as session:
            quotas = self.files.objects.quotas(session, account)
            # What is answered becomes files: whoever has no room for any learns it before the work.
            storage.check(session, account, quotas, stored_bytes=1)
            batch = store.create(
                session,
                account,
                caller_fields(request.caller),
                parameters.endpoint,
                parameters.completion_window,
                parameters.input_file_id,
                dict(parameters.metadata or {}),
            )
        self.runner.wake()
        return Response.json(batch_object(batch, (0, 0)))

    def list(self, request: Request) -> Response:
        """A page of batches, the newest first."""
        self.recorder.record(request, "batches.list")
        limit, after = page_query(request)
        account = request.caller.account
        with self.database.read() as session:
            position = None
            if after is not None:
                place = store.get(session, account, after)
                if place is None:
                    raise invalid(f"No such batch: {after}.", "after")
                position = place.seq
            found = store.list_batches(session, account, limit + 1, position)
            seen = [_view(session, batch) for batch in found]
        return page(seen, limit, dict)

    def retrieve(self, request: Request) -> Response:
        """One batch."""
        batch_id = request.params["batch"]
        self.recorder.record(request, "batches.retrieve", "batch", batch_id)
        with self.database.read() as session:
            batch = store.get(session, request.caller.account, batch_id)
            if batch is None:
                raise absent("batch", batch_id, "id")
            return Response.json(_view(session, batch))

    def cancel(self, request: Request) -> Response:
        """Answer no further lines; those that are answered are in the files."""
        batch_id = request.params["batch"]
        self.recorder.record(request, "batches.cancel", "batch", batch_id)
        with self.database.write() as session:
            batch = store.get(session, request.caller.account, batch_id, lock=True)
            if batch is None:
                raise absent("batch", batch_id, "id")
            if not store.cancel(batch):
                text = f"The batch is {batch.status}; it cannot be cancelled any more."
                raise invalid(text, reason="invalid_state")
            answer = Response.json(_view(session, batch))
        self.runner.wake()
        return answer


def _view(session: Session, batch: Batch) -> dict[str, Any]:
    return batch_object(batch, store.counts(session, batch))


def batch_object(batch: Batch, counts: tuple[int, int]) -> dict[str, Any]:
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
