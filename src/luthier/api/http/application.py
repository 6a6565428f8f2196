"""The application: reads requests, finds out who sends them, hands them to a face, sends the response.

One port serves every face; which one is meant is known by the head alone, before anything is read.
Nothing is looked up, parsed or changed for a request that has not proved who sent it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs

from sqlalchemy.exc import OperationalError

from luthier.api.audit import FAILURES, AuditTrail, record_actions
from luthier.api.authentication import Authenticator
from luthier.api.console.face import Console
from luthier.api.http.connections import client_key
from luthier.api.http.limits import (
    REFUSALS,
    SHORT_REQUESTS,
    USELESS_BODY_BYTES,
    Admission,
    RequestPace,
    Threads,
)
from luthier.api.http.messages import (
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
from luthier.api.http.metrics import Metrics, RequestRecord
from luthier.api.http.routing import Face, Operation, Route
from luthier.api.http.streams import (
    ClientDisconnected,
    ConnectionGuard,
    GeneratedPieces,
    Receive,
    RequestBody,
    Run,
    Send,
    close_pieces,
    lifespan,
    send_response,
)
from luthier.api.roles import authorize
from luthier.api.sigv4 import claim_of
from luthier.cancellation import cancelled_by
from luthier.errors import ReadOnlyDisk, RefusedInput
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.serving.inference import meter
from luthier.serving.scheduler import working_for
from luthier.store.database import now

OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
"""Answered to everybody: they say nothing of anybody's data."""
CONSOLE_HEADER = "x-luthier-console"
"""Header of GET requests that the console sends."""
STREAMED_COST = 1 << 20
"""Bytes of memory for a body that is handed on as it comes."""

_log = logging.getLogger("luthier.api")


@dataclass
class _Exchange:
    """One request on its way to its response."""

    face: Face
    head: RequestHead
    receive: Receive
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

    def request(self, signed: Signed, route: Route, body: bytes, json_values: int) -> Request:
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
            json_values,
            signed,
            self.head.tls,
        )

    def sender(self, signed: Signed | None) -> tuple[str, str]:
        """Address, and the account that a body comes under; its key, where that is not known yet."""
        known = signed.caller.account if signed else claim_of(self.head).access_key
        return client_key(self.record.address), known


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
        faces: Sequence[Face],
        authenticator: Authenticator,
        admit: Callable[[Caller], None],
        metrics: Metrics,
        trail: AuditTrail,
        ready: Callable[[], str | None],
        limits: ServerLimits | None = None,
        pace: RequestPace | None = None,
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
            pace: that of the addresses, whose connections it concerns as well.
            console: files for browsers, which everybody may read.
        """
        self.limits = limits = limits or ServerLimits()
        self.faces, self.authenticator, self.admit = tuple(faces), authenticator, admit
        self.metrics, self.trail, self.ready = metrics, trail, ready
        self._console = console
        long_requests = limits.model_requests + limits.grading_requests
        self._run = Threads(long_requests + SHORT_REQUESTS, "request")
        self._wait = Threads(limits.streams + SHORT_REQUESTS, "stream")
        self._admission = Admission(limits)
        self._pace = pace or RequestPace(limits.requests_per_second_per_address)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request; other kinds of connections are refused."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = head_of(scope)
        record = RequestRecord(str(uuid.uuid4()), head.method, address_of(scope))
        began, client, service = time.perf_counter(), client_key(record.address), service_of(head)
        receive, send = record.count_bytes(receive, send)
        face = next(each for each in self.faces if each.serves(head, service))
        try:
            async with AsyncExitStack() as until_sent:
                exchange = _Exchange(face, head, receive, record, until_sent, self._wait)
                try:
                    delay = self._pace.delay(client)
                except Fault as fault:
                    response = self._refusal(exchange, fault)
                else:
                    if delay > 0:
                        await asyncio.sleep(delay)
                    if head.path in OPEN_PATHS:
                        response = await self._run(self._status, head.path)
                    elif self._console is not None and self._console.serves(head, service):
                        record.face = self._console.name
                        response = self._console.respond(head)
                    else:
                        record.face = face.name
                        record.of_console = _reads_for_console(head)
                        response = await self._respond_or_refuse(exchange)
                record.status = await send_response(send, receive, response, exchange.run)
        except ClientDisconnected:
            record.status, record.error = 499, "ClientDisconnected"
        except asyncio.CancelledError:
            # The server waits no longer: a stream ends where it is.
            record.status = 503
        finally:
            if record.status in REFUSALS:
                self._pace.charge_refusal(client)
            self.metrics.count_request(record, time.perf_counter() - began)

    def _status(self, path: str) -> Response:
        if path == "/metrics":
            return Response(200, *self.metrics.exposition())
        reason = self.ready() if path == "/readyz" else None
        return Response.json({"status": reason or "ok"}, 503 if reason else 200)

    async def _respond_or_refuse(self, exchange: _Exchange) -> Response:
        request_id = exchange.record.request_id
        try:
            response = await self._respond(exchange)
            if isinstance(response.body, GeneratedPieces):
                await self._wait_for_first(exchange, response.body)
        except ClientDisconnected:
            raise
        except (Exception, asyncio.CancelledError) as error:
            fault = _fault_of(error, request_id)
            self._audit_refusal(exchange.record, fault)
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

    async def _respond(self, exchange: _Exchange) -> Response:
        head, admission, small = exchange.head, self._admission, self.limits.unknown_body_bytes
        check_text(head)
        try:
            exchange.route = exchange.face.route(head)
        except Fault as fault:
            exchange.unknown = fault
        operation, length = exchange.operation, head.body_length
        limit = operation.body_limit if operation else small
        streamed = operation is not None and operation.stream is not None
        signed: Signed | None = None
        if operation is not None and operation.hashed:
            # The body is compared with its signed hash as it is read.
            signed = await self._run(self.authenticator.authenticate, head, None)
        elif length is None or length > small:
            # Of signatures the body is part: nobody's is read whose key is not known.
            signed = await self._run(self.authenticator.recognize, head)
            if signed is None and streamed:
                limit, streamed = min(limit, BODY_BYTES), False
        client = signed.caller.account if signed else client_key(exchange.record.address)
        size = limit if length is None else min(length, limit)
        async with AsyncExitStack() as receiving, AsyncExitStack() as turns:
            cost = STREAMED_COST if streamed else size
            await receiving.enter_async_context(admission.body_memory(client, length, cost))
            if size > (small if signed is None else USELESS_BODY_BYTES):
                address, sender = exchange.sender(signed)
                try:
                    admission.useless_bodies.check(address, sender)
                except Fault:  # a 429 that no load of the server caused
                    self._pace.charge_refusal(address)
                    raise
            body = RequestBody(head, exchange.receive, limit, self.limits)
            if exchange.route is not None and exchange.route.operation.stream is not None:
                return await self._stream(exchange, exchange.route, signed, body)
            data = await body.read()
            sender_of = partial(exchange.sender, signed)
            turns.enter_context(admission.count_if_useless(len(data), sender_of))
            slots = admission.slots(operation)
            if operation is not None and slots is not None:
                if signed is None:
                    signed = await self._run(self.authenticator.authenticate, head, data)
                assert signed is not None
                exchange.identify(signed)
                exchange.record.operation, client = operation.name, signed.caller.account
                seconds = self.limits.queue_seconds
                if len(data) > small:  # who waits with a large body holds memory that others want
                    seconds = min(seconds, self.limits.idle_seconds)
                await turns.enter_async_context(slots.turn(client, seconds=seconds))
            await turns.enter_async_context(admission.large_body(client, len(data)))
            # One thread does all of it: to change threads costs as much as to look something up.
            work = partial(self._handle, exchange, signed, data)
            if slots is not None:
                response = await self._run_guarded(work, exchange)
            else:
                # By key as well: many accounts may come from the address of one proxy.
                response = await admission.short_request(
                    f"{client} {_claimed_key(head)}", self._run, work, exchange.record
                )
            if not isinstance(response.body, bytes):
                try:
                    # The thread that a stream needs until its end.
                    turn = admission.streams.try_turn(exchange.record.account)
                    exchange.until_sent.enter_context(turn)
                except Fault:
                    await self._run(close_pieces, response.body)
                    raise
            return response

    def _handle(self, exchange: _Exchange, signed: Signed | None, body: bytes) -> Response:
        record = exchange.record
        signed = signed or self.authenticator.authenticate(exchange.head, body)
        exchange.identify(signed)
        self.admit(signed.caller)
        route = exchange.route
        if route is None or route.operation.handler is None:
            raise exchange.unknown or Fault("UnknownOperation", "There is no such operation.")
        request = exchange.request(signed, route, body, self.limits.json_values)
        with (
            record_actions() as record.actions,
            meter(record.add_tokens),
            working_for(record.account),
        ):
            authorize(signed.caller, route.operation.action, exchange.head.path)
            response = route.operation.handler(request)
        self._audit(record)
        return response

    async def _run_guarded(self, work: Callable[[], Response], exchange: _Exchange) -> Response:
        """What a model may write for, and stops writing for when the client hangs up."""
        guard = ConnectionGuard(exchange.receive, self._wait)
        try:
            with cancelled_by(guard.take):
                response = await self._run(work)
        except Exception as error:
            if await guard.end():
                # It is in the log, and nobody is there to be told.
                fault = _fault_of(error, exchange.record.request_id)
                self._audit_refusal(exchange.record, fault)
                raise ClientDisconnected from error
            raise
        finally:
            gone = await guard.end()
        if gone:
            raise ClientDisconnected
        return response

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
            with self._admission.count_if_useless(len(data), partial(exchange.sender, None)):
                signed = await self._run(self.authenticator.authenticate, exchange.head, data)
        exchange.identify(signed)
        request = exchange.request(signed, route, b"", self.limits.json_values)
        await self._run(self.admit, signed.caller)
        transfer = self._admission.transfers.request(signed.caller.account)
        exchange.run = exchange.until_sent.enter_context(transfer)
        assert route.operation.stream is not None
        with record_actions() as exchange.record.actions:
            if route.operation.action:
                authorize(signed.caller, route.operation.action, exchange.head.path)
            response = await route.operation.stream(request, body, exchange.run)
        await exchange.run(self._audit, exchange.record)
        return response

    def _audit(self, record: RequestRecord, outcome: str = "ok") -> None:
        """What was changed is in the audit log before the response leaves; the rest is counted."""
        caller = Caller(record.account, record.user, ())
        for action, resource in record.actions:
            self.trail.record(caller, action, resource, outcome, record.request_id, record.address)

    def _audit_refusal(self, record: RequestRecord, fault: Fault) -> None:
        record.error = fault.code
        if not record.user:
            self.trail.reject_unknown(fault.code, record.address)
        else:
            if fault.code not in FAILURES:
                # Only what was asked for last can have been refused.
                record.actions = record.actions[-1:]
            self._audit(record, fault.code)


def _fault_of(error: BaseException, request_id: str) -> Fault:
    """What a client is told of an error."""
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


def _claimed_key(head: RequestHead) -> str:
    """The key that a request claims to come with, unchecked; empty without one."""
    given = next((value for name, value in head.headers if name == "authorization"), "")
    return given.partition("/")[0]  # behind the key, a signature has its day
