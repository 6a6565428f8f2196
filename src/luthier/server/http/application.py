"""The application: reads requests, finds out who sends them, hands them to a face, sends the response.

One port serves every face; which one is meant is known by the head alone, before anything is read.
Nothing is looked up, parsed or changed for a request that has not proved who sent it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sqlalchemy.exc import OperationalError

from luthier.cancellation import cancelled_by
from luthier.errors import ReadOnlyDisk, RefusedInput
from luthier.inference.inference import meter
from luthier.inference.scheduler import working_for
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.server.audit import FAILURES, AuditTrail, record_actions
from luthier.server.authentication import Authenticator
from luthier.server.http.limits import Slots, Threads
from luthier.server.http.messages import (
    Caller,
    Fault,
    Request,
    RequestHead,
    Response,
    Scope,
    Signed,
    address_of,
    check_text,
    head_of,
    inference_faults,
    service_of,
)
from luthier.server.http.metrics import Metrics, RequestRecord
from luthier.server.http.routing import Face, MountedApplication, Operation, Route
from luthier.server.http.streams import (
    ClientDisconnected,
    ConnectionGuard,
    GeneratedPieces,
    Receive,
    RequestBody,
    Run,
    Send,
    close_pieces,
    send_response,
)
from luthier.server.roles import authorize
from luthier.server.tables.database import now

if TYPE_CHECKING:
    from luthier.server.console.routes import Console

OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
"""Answered to everybody: they say nothing of anybody's data."""
CONSOLE_HEADER = "x-luthier-console"
"""Header of GET requests that the console sends."""
SHORT_REQUESTS = 16
"""Threads in addition to those of requests that wait for models."""
UNKNOWN_BODY_BYTES = 64 << 10
"""Size in bytes of a body that the server reads before it looks up the key of the request."""

_log = logging.getLogger("luthier.server")


@dataclass
class _Exchange:
    """One request on its way to its response."""

    face: Face | MountedApplication
    head: RequestHead
    scope: Scope
    receive: Receive
    send: Send
    record: RequestRecord
    until_sent: AsyncExitStack
    """Ends what the response needs until it is sent."""
    run: Run
    """Calls what blocks while the response is sent."""
    route: Route | None = None
    unknown: Fault | None = None
    """Why there is no route: that is told only to those who are let in."""

    @property
    def operation(self) -> Operation | None:
        """What is asked for."""
        return self.route.operation if self.route else None

    def identify(self, signed: Signed) -> None:
        """Who sends it is known."""
        self.record.account, self.record.user = signed.caller.account, signed.caller.user

    def request(self, signed: Signed, route: Route, body: bytes) -> Request:
        """What the face is given."""
        self.record.operation = route.operation.name
        return Request(
            self.record.request_id,
            signed.caller,
            self.head.method,
            self.head.path,
            parse_qs(self.head.query, keep_blank_values=True),
            dict(self.head.headers),
            body,
            now(),
            route.params,
            self.record.address,
            signed,
            self.head.tls,
        )


def _reads_for_console(head: RequestHead) -> bool:
    """Return whether a page of the console reads data through the native API.

    Pages refresh themselves every few seconds, which is no use of the API by the account. The header
    changes the count of requests in usage only: rate limits, logs, metrics and the audit log apply.
    """
    named = any(name == CONSOLE_HEADER for name, _ in head.headers)
    return named and head.method == "GET" and head.path.startswith("/api/")


class Application:
    """An ASGI application."""

    def __init__(
        self,
        faces: Sequence[Face | MountedApplication],
        authenticator: Authenticator,
        admit: Callable[[Caller], None],
        metrics: Metrics,
        trail: AuditTrail,
        ready: Callable[[], str | None],
        limits: ServerLimits | None = None,
        console: Console | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            faces: asked in this order whether a request is for them; the last takes what is left.
            authenticator: finds out who sends a request.
            admit: raises :class:`Fault` for a caller beyond the rate limit.
            metrics: counts and logs requests.
            trail: the audit log.
            ready: says what is missing for the service to do its work.
            limits: of the server.
            console: files for browsers, which everybody may read.
        """
        self.limits = limits = limits or ServerLimits()
        self.faces, self.authenticator, self.admit = tuple(faces), authenticator, admit
        self.metrics, self.trail, self.ready = metrics, trail, ready
        self._console = console
        long_requests = limits.model_requests + limits.grading_requests
        self._run = Threads(long_requests + SHORT_REQUESTS, "request")
        self._wait = Threads(limits.streams + SHORT_REQUESTS, "stream")
        self._transfer = Threads(limits.transfers, "transfer")

        def slots(capacity: int, per_account: int) -> Slots:
            return Slots(capacity, per_account, limits.waiting_requests)

        self._model_slots = slots(limits.model_requests, limits.share_of(limits.model_requests))
        self._grading_slots = slots(limits.grading_requests, max(1, limits.grading_requests // 4))
        self._streams = slots(limits.streams, limits.share_of(limits.streams))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request."""
        head = head_of(scope)
        record = RequestRecord(str(uuid.uuid4()), head.method, address_of(scope))
        began, service = time.perf_counter(), service_of(head)
        receive, send = record.count_bytes(receive, send)
        face = next(each for each in self.faces if each.serves(head, service))
        try:
            async with AsyncExitStack() as until_sent:
                exchange = _Exchange(
                    face, head, scope, receive, send, record, until_sent, self._wait
                )
                response: Response | None
                if head.path in OPEN_PATHS:
                    response = await self._run(self._status, head.path)
                elif self._console is not None and self._console.serves(head, service):
                    record.face = self._console.name
                    response = self._console.respond(head)
                else:
                    record.face = face.name
                    record.of_console = _reads_for_console(head)
                    response = await self._respond_or_refuse(exchange)
                if response is None:
                    return
                if not record.body_requested and any(name == "expect" for name, _ in head.headers):
                    # The client does not send the body, and the server would wait for the body.
                    headers = {**response.headers, "Connection": "close"}
                    response = Response(response.status, response.body, headers)
                record.status = await send_response(send, receive, response, exchange.run)
        except ClientDisconnected:
            record.status, record.error = 499, "ClientDisconnected"
        except asyncio.CancelledError:
            # The server waits no longer: a stream ends where it is.
            record.status = 503
        finally:
            self.metrics.count_request(record, time.perf_counter() - began)

    def _status(self, path: str) -> Response:
        if path == "/metrics":
            return Response(200, *self.metrics.exposition())
        reason = self.ready() if path == "/readyz" else None
        return Response.json({"status": reason or "ok"}, 503 if reason else 200)

    async def _respond_or_refuse(self, exchange: _Exchange) -> Response | None:
        request_id = exchange.record.request_id
        try:
            if isinstance(exchange.face, MountedApplication):
                await self._call_mounted(exchange, exchange.face)
                return None
            response = await self._respond(exchange, exchange.face)
            if isinstance(response.body, GeneratedPieces):
                await self._wait_for_first(exchange, response.body)
        except ClientDisconnected:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if exchange.record.status:
                raise  # a mounted application has begun to respond
            fault = fault_of(error, request_id)
            await self._run(self._audit_refusal, exchange.record, fault.code)
            return self._refusal(exchange, fault)
        headers = {exchange.face.request_id_header: request_id, **response.headers}
        return Response(response.status, response.body, headers)

    def _refusal(self, exchange: _Exchange, fault: Fault) -> Response:
        face, record = exchange.face, exchange.record
        record.error = fault.code
        response = face.refusal(fault, record.request_id)
        headers = {face.request_id_header: record.request_id, **response.headers}
        if "retry_after" in fault.details:
            headers.setdefault("Retry-After", str(fault.details["retry_after"]))
        return Response(response.status, response.body, headers)

    async def _call_mounted(self, exchange: _Exchange, face: MountedApplication) -> None:
        head, record = exchange.head, exchange.record
        check_text(head)
        recognized, body = await self._recognize(exchange, BODY_BYTES)
        data = await body.read()
        signed = await self._run(self._admit_caller, exchange, recognized, data)
        state = {
            "record": record,
            "caller": signed.caller,
            "model_turn": partial(self._model_turn, exchange),
            "stream_turn": partial(self._streams.turn, record.account, 0),
        }
        unread = [{"type": "http.request", "body": data}]

        async def receive() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await exchange.receive()

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                await self._run(self._audit_result, record, message["status"])
                record.status = message["status"]
                name = face.request_id_header.encode()
                headers = [*message["headers"], (name, record.request_id.encode())]
                message = {**message, "headers": headers}
            await exchange.send(message)

        with (
            record_actions() as record.actions,
            meter(record.add_tokens),
            working_for(record.account),
        ):
            # Routes see the raw path: an ARN in it has encoded slashes.
            await face.app({**exchange.scope, "path": head.path, "state": state}, receive, send)

    @asynccontextmanager
    async def _model_turn(self, exchange: _Exchange) -> AsyncIterator[None]:
        turn = self._model_slots.turn(exchange.record.account, self.limits.queue_seconds)
        async with turn, self._guarded(exchange):
            yield

    async def _recognize(
        self, exchange: _Exchange, limit: int
    ) -> tuple[Signed | None, RequestBody]:
        """Return the caller if the head of the request proves it, and the body, which is not read."""
        head, length, signed = exchange.head, exchange.head.body_length, None
        if length is None or length > UNKNOWN_BODY_BYTES:
            # A signature covers the body: a large body is read only if its key is known.
            signed = await self._run(self.authenticator.recognize, head)
            if signed is None:
                limit = min(limit, BODY_BYTES)
        return signed, RequestBody(head, exchange.receive, limit)

    async def _respond(self, exchange: _Exchange, face: Face) -> Response:
        head = exchange.head
        check_text(head)
        try:
            exchange.route = face.route(head)
        except Fault as fault:
            exchange.unknown = fault
        operation = exchange.operation
        limit = operation.body_limit if operation else UNKNOWN_BODY_BYTES
        signed: Signed | None
        if operation is not None and operation.hashed:
            # The body is compared with its signed hash as it is read.
            signed = await self._run(self.authenticator.authenticate, head, None)
            body = RequestBody(head, exchange.receive, limit)
        else:
            signed, body = await self._recognize(exchange, limit)
        if exchange.route is not None and exchange.route.operation.stream is not None:
            return await self._stream(exchange, exchange.route, signed, body)
        data = await body.read()
        if operation is None or not (operation.long or operation.grading):
            # One thread does all of it: to change threads costs as much as to look something up.
            response: Response = await self._run(self._handle, exchange, signed, data)
        else:
            if signed is None:
                signed = await self._run(self.authenticator.authenticate, head, data)
            assert signed is not None
            exchange.identify(signed)
            exchange.record.operation = operation.name
            slots = self._grading_slots if operation.grading else self._model_slots
            turn = slots.turn(signed.caller.account, self.limits.queue_seconds)
            async with turn, self._guarded(exchange):
                response = await self._run(self._handle, exchange, signed, data)
        if not isinstance(response.body, bytes):
            try:
                # The thread that a stream needs until its end.
                turn = self._streams.turn(exchange.record.account, 0)
                await exchange.until_sent.enter_async_context(turn)
            except Fault:
                await self._run(close_pieces, response.body)
                raise
        return response

    def _admit_caller(self, exchange: _Exchange, signed: Signed | None, body: bytes) -> Signed:
        signed = signed or self.authenticator.authenticate(exchange.head, body)
        exchange.identify(signed)
        self.admit(signed.caller)
        return signed

    def _handle(self, exchange: _Exchange, signed: Signed | None, body: bytes) -> Response:
        record = exchange.record
        signed = self._admit_caller(exchange, signed, body)
        route = exchange.route
        if route is None or route.operation.handler is None:
            raise exchange.unknown or Fault("UnknownOperation", "There is no such operation.")
        request = exchange.request(signed, route, body)
        with (
            record_actions() as record.actions,
            meter(record.add_tokens),
            working_for(record.account),
        ):
            authorize(signed.caller, route.operation.action, exchange.head.path)
            response = route.operation.handler(request)
        self._audit(record)
        return response

    @asynccontextmanager
    async def _guarded(self, exchange: _Exchange) -> AsyncIterator[None]:
        """End what models generate in the block when the client hangs up.

        Raises:
            ClientDisconnected: if the client hung up.
        """
        guard = ConnectionGuard(exchange.receive, self._wait)
        try:
            with cancelled_by(guard.take):
                yield
        except Exception as error:
            if await guard.end():
                # It is in the log, and nobody is there to be told.
                fault = fault_of(error, exchange.record.request_id)
                await self._run(self._audit_refusal, exchange.record, fault.code)
                raise ClientDisconnected from error
            raise
        finally:
            gone = await guard.end()
        if gone:
            raise ClientDisconnected

    async def _wait_for_first(self, exchange: _Exchange, pieces: GeneratedPieces) -> None:
        """Send no status before a model has begun to write: what fails until then has its own."""
        guard = ConnectionGuard(exchange.receive, self._wait)
        guard.take(pieces)
        gone = False
        try:
            with inference_faults():
                await self._wait(pieces.wait)
        except BaseException:
            await self._wait(pieces.close)
            raise
        finally:
            gone = await guard.end()
        if gone:
            raise ClientDisconnected

    async def _stream(
        self, exchange: _Exchange, route: Route, signed: Signed | None, body: RequestBody
    ) -> Response:
        """A body that is taken as it comes, from those who may send it."""
        if signed is None:
            data = await body.read()
            signed = await self._run(self.authenticator.authenticate, exchange.head, data)
            assert signed is not None
        exchange.identify(signed)
        request = exchange.request(signed, route, b"")
        await self._run(self.admit, signed.caller)
        exchange.run = self._transfer
        assert route.operation.stream is not None
        with record_actions() as exchange.record.actions:
            if route.operation.action:
                authorize(signed.caller, route.operation.action, exchange.head.path)
            response = await route.operation.stream(request, body, exchange.run)
        await exchange.run(self._audit, exchange.record)
        return response

    def _audit(self, record: RequestRecord, outcome: str = "ok") -> None:
        """Write changes into the audit log before the response is sent."""
        caller = Caller(record.account, record.user, ())
        actions, record.actions = record.actions, []  # each is written once
        for action, resource in actions:
            self.trail.record(caller, action, resource, outcome, record.request_id, record.address)

    def _audit_result(self, record: RequestRecord, status: int) -> None:
        if status < 400 or status == 499:
            self._audit(record)
        else:
            self._audit_refusal(record, record.error)

    def _audit_refusal(self, record: RequestRecord, code: str) -> None:
        record.error = code
        if code not in FAILURES:
            # Only what was asked for last can have been refused.
            record.actions = record.actions[-1:]
        try:
            self._audit(record, code)
        except Exception:
            _log.exception("the audit log could not be written")


def fault_of(error: BaseException, request_id: str) -> Fault:
    """Return the fault that a client is told of an error; log errors of the service."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, RefusedInput):
        return Fault.of(error)
    if isinstance(error, asyncio.CancelledError):
        text = "The service is ending. Ask again; what was asked may have been done."
        return Fault("ServiceUnavailable", text, retry_after=5)
    if isinstance(error, OperationalError | ReadOnlyDisk):
        # The database or the disk may come back: clients are told to retry.
        _log.error(
            "database or disk trouble",
            exc_info=error,
            extra={"request_id": request_id},
        )
        return Fault.unavailable(error)
    # What went wrong inside is told to the log alone.
    _log.error("request failed", exc_info=error, extra={"request_id": request_id})
    text = f"Something failed inside the service; its log has request {request_id}."
    return Fault("InternalServer", text)
