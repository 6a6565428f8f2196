"""``/batches``, and the thread that works on them, which goes on where a killed server stopped."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from luthier.api.http.messages import Caller, Fault, Request, Response, parse_json
from luthier.api.http.routing import Operation
from luthier.api.openai.protocol import (
    Access,
    Body,
    Metadata,
    absent,
    body,
    error_of,
    invalid,
    number_of,
    page,
    seconds,
    status_of,
    text_of,
)
from luthier.errors import DoesNotFit, LeaseLost, LuthierError, QuotaExceeded
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.serving.inference import meter
from luthier.serving.prompts import on_prompt_tokenized
from luthier.serving.scheduler import working_for
from luthier.store import batches as store
from luthier.store import queue, storage
from luthier.store.batches import Batch
from luthier.store.database import Database, now
from luthier.store.principals import active_policies
from luthier.store.queue import LeaseWatch
from luthier.store.sessions import TemporarySession, session_principal
from luthier.store.uploaded_files import UploadedFiles
from luthier.store.usage import CountUsage, Usage

Answers = Callable[[Caller, Mapping[str, Any]], dict[str, Any]]
"""Answers a body of an endpoint with the rights of a caller."""

_Answered = Future[tuple[bool, dict[str, Any]]]

AT_ONCE = 8
"""Lines of a batch that are answered side by side."""
MOST_LINES = 50_000
LONGEST_LINE = BODY_BYTES
MOST_ERRORS = 50
"""What is wrong with more lines is not told."""
RENEWED = Batch.lease_time.total_seconds() / 3
"""Seconds after which the lease is renewed where no line is done."""
IDLE = 2.0
"""Seconds between two looks for batches of other servers that fell silent."""
_SWEEP = 600.0
"""Seconds between two looks for files whose time is over."""
_log = logging.getLogger("luthier.api")
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


class BatchRunner:
    """Answers the lines of batches. Start it with the server; several servers may share a database."""

    def __init__(
        self,
        database: Database,
        files: UploadedFiles,
        endpoints: Mapping[str, Answers],
        count: CountUsage = lambda account, model, used: None,
        limits: ServerLimits | None = None,
    ) -> None:
        """``count`` is told what an account used, of which model."""
        self.count, self.limits = count, limits or ServerLimits()
        self.database, self.files, self.endpoints = database, files, endpoints
        # A large line is parsed and tokenized when no other one is, of any batch of this server.
        self._large_line = threading.Lock()
        self._token = secrets.token_hex(8)
        self.watch = LeaseWatch(Batch.lease_time.total_seconds())
        """Tells which servers fell silent."""
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def close(self) -> None:
        """Stop after the lines in hand; the batch can go on anywhere."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def run_once(self) -> bool:
        """Work on one batch as far as possible; whether there was one."""
        batch = self._claim()
        if batch is None:
            return False
        try:
            self._work(batch)
        except QuotaExceeded as error:
            self._fail(batch, [_error("insufficient_quota", str(error), None)])
        except Fault as fault:
            self._fail(batch, [_error("server_error", fault.message, None)])
        except (DoesNotFit, SQLAlchemyError):
            # A full disk or a database that is away pass: the batch keeps what is answered, and waits.
            raise
        except LuthierError as error:
            self._fail(batch, [_error("invalid_file", str(error), None)])
        except Exception as error:
            # Tried again it would fail again, and all batches after it would wait for ever.
            _log.exception("%s failed", batch.id)
            text = f"The batch failed: {type(error).__name__}."
            self._fail(batch, [_error("server_error", text, None)])
        finally:
            with suppress(LeaseLost), self.database.write() as session:
                queue.release(session, Batch, batch.id, self._token)
        return True

    def _run(self) -> None:
        swept = -_SWEEP
        while not self._closed.is_set():
            try:
                if time.monotonic() - swept > _SWEEP:
                    swept = time.monotonic()
                    self.files.remove_expired()
                while not self._closed.is_set() and self.run_once():
                    pass
            except Exception:
                # The database may be away, or the disk full; the batch is found again.
                _log.exception("a batch could not be worked on")
            self._wake.wait(IDLE)
            self._wake.clear()

    def _claim(self) -> Batch | None:
        with self.database.write() as session:
            held = store.leased_batches(session)
            silent = [each for each in held if self.watch.silent(*each)]
            self.watch.forget_others({batch_id for batch_id, _ in held})
            return store.claim(session, self._token, silent)

    def _work(self, batch: Batch) -> None:
        row = self.files.get(batch.account, batch.input_file)
        if row is None:
            self._fail(batch, [_error("file_not_found", "The input file is gone.", None)])
            return
        if batch.status == store.VALIDATING:
            total, errors = self._problems(_lines(self.files.read(row)), batch.endpoint)
            if errors:
                self._fail(batch, errors)
                return
            with self.database.write() as session:
                held = store.get(session, batch.account, batch.id, lock=True)
                if held is not None and held.status == store.VALIDATING:
                    held.total = total
                    store.enter(held, store.IN_PROGRESS)
        # Read again, and line by line: files are larger than what should lie in memory.
        if self._answer_all(batch, _lines(self.files.read(row))):
            self._finish(batch)

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
                with (
                    self._large_line if len(line) > self.limits.large_body_bytes else nullcontext()
                ):
                    line_body = parse_json(line, self.limits.json_values)
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

    def _answer_all(self, batch: Batch, lines: Iterable[tuple[int, bytes]]) -> bool:
        """Answer what is not answered; whether the batch is through, and not only this server."""
        with self.database.read() as session:
            done = store.done_lines(session, batch.id)
        left = (each for each in lines if each[0] not in done)
        running: dict[_Answered, int] = {}
        with ThreadPoolExecutor(AT_ONCE, "batch") as threads:
            status = self._keep(batch, {})
            while status is not None:
                if status == store.IN_PROGRESS and not self._closed.is_set():
                    for number, line in islice(left, AT_ONCE - len(running)):
                        running[threads.submit(self._answer, batch, line)] = number
                if not running:
                    return not self._closed.is_set()
                ended, _ = wait(running, RENEWED, FIRST_COMPLETED)
                status = self._keep(batch, {running.pop(each): each for each in ended})
        return False

    def _keep(self, batch: Batch, answered: Mapping[int, _Answered]) -> str | None:
        """Go on holding the batch and write answers down by their lines.

        Gives where the batch stands now; ``None`` where another server works on it.
        """
        with self.database.write() as session:
            # Written only by who still holds the batch: no line is answered twice.
            try:
                held = queue.renew(session, Batch, batch.id, self._token)
            except LeaseLost:
                return None
            for number, answer in answered.items():
                store.record(session, batch.id, number, *answer.result())
            return store.EXPIRED if now() > held.expires else held.status

    def _caller(self, batch: Batch) -> Caller:
        """Who asked for a batch, with the rights of this moment."""
        account, user = batch.caller["account"], batch.caller["user"]
        fields, temporary = batch.caller.get("session"), None
        with self.database.read() as session:
            if fields is None:
                policies = active_policies(session, account, user)
            else:
                # Its credentials may have expired since: the batch was let in before. With the access
                # key that they were begun with it ends, as every session does.
                temporary = TemporarySession.model_validate(fields)
                principal = session_principal(session, temporary)
                policies = principal.policies if principal else None
        caller = Caller(account, user, policies or (), batch.caller["bearer"], session=temporary)
        if policies is None:
            what = "or the access key of its session is" if temporary else "is"
            text = (
                f"User: {caller.arn} {what} disabled or gone; its batches are answered no further."
            )
            raise Fault("AccessDenied", text)
        return caller

    def _count_tokens(self, account: str, model: str, read: int, written: int) -> None:
        self.count(account, model, Usage(prompt_tokens=read, generated_tokens=written))

    def _answer(self, batch: Batch, line: bytes) -> tuple[bool, dict[str, Any]]:
        with ExitStack() as turn:
            if len(line) > self.limits.large_body_bytes:
                turn.enter_context(self._large_line)
                turn.enter_context(on_prompt_tokenized(turn.close))
            return self._answer_parsed(batch, json.loads(line))

    def _answer_parsed(
        self, batch: Batch, members: Mapping[str, Any]
    ) -> tuple[bool, dict[str, Any]]:
        try:
            caller = self._caller(batch)
            self.count(batch.account, "", Usage(requests=1))
            count = partial(self._count_tokens, batch.account)
            with meter(count), working_for(batch.account):
                answer = self.endpoints[batch.endpoint](caller, members["body"])
            status = 200
        except Fault as fault:
            status, answer = status_of(fault), {"error": error_of(fault)}
        except Exception as error:
            _log.exception("a line of %s failed", batch.id)
            failure = Fault("InternalServer", f"The request failed: {type(error).__name__}.")
            status, answer = status_of(failure), {"error": error_of(failure)}
        response = {"status_code": status, "request_id": secrets.token_hex(12), "body": answer}
        return status != 200, {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": members["custom_id"],
            "response": response,
            "error": None,
        }

    def _finish(self, batch: Batch) -> None:
        """Write the files, then say so: whoever reads ``completed`` can read them."""
        with self.database.write() as session:
            held = store.get(session, batch.account, batch.id, lock=True)
            if held is None or held.lease != self._token:
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
            held = store.get(session, batch.account, batch.id, lock=True)
            if held is not None and held.lease == self._token:
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
            held = store.get(session, batch.account, batch.id, lock=True)
            if held is not None and held.lease == self._token and held.status not in store.ENDED:
                held.errors = errors[:MOST_ERRORS]
                store.end(session, held, store.FAILED)


def _lines(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; they end at ``\\n`` and nowhere else.

    One that is longer than :data:`LONGEST_LINE` is cut off there, and is the last.
    """
    rest, number = b"", 0
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > LONGEST_LINE:
            break
    if rest.strip():
        yield number + 1, rest


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
        self, database: Database, files: UploadedFiles, access: Access, runner: BatchRunner
    ) -> None:
        self.database, self.files, self.access, self.runner = database, files, access, runner

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
        self.access.to(request, "batches.create", "batch")
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
        self.access.to(request, "batches.list")
        limit, after = number_of(request, "limit", 20, MOST), text_of(request, "after")
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
        self.access.to(request, "batches.retrieve", "batch", batch_id)
        with self.database.read() as session:
            batch = store.get(session, request.caller.account, batch_id)
            if batch is None:
                raise absent("batch", batch_id, "id")
            return Response.json(_view(session, batch))

    def cancel(self, request: Request) -> Response:
        """Answer no further lines; those that are answered are in the files."""
        batch_id = request.params["batch"]
        self.access.to(request, "batches.cancel", "batch", batch_id)
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
