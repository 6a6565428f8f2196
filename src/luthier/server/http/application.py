"""ASGI application of the server: request ids, authentication, limits, audit log and metrics.

All APIs share one port; the head of a request selects the API. The application authenticates a
request, then calls the API. An API is an ASGI application: FastAPI for the OpenAI and native APIs,
Starlette routes for the AWS APIs.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response as StarletteResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.inference.inference import meter, observe_models
from luthier.inference.scheduler import working_for
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.processes import cancelled_by
from luthier.server.actions import record_actions
from luthier.server.audit import FAILURES, AuditTrail
from luthier.server.authentication import Authenticator
from luthier.server.http.exchanges import Recorder, RequestObservation
from luthier.server.http.limits import Slots
from luthier.server.http.messages import (
    Caller,
    Fault,
    RequestHead,
    Response,
    Signed,
    address_of,
    check_head,
    fault_of,
    head_of,
    service_of,
)
from luthier.server.http.metrics import Metrics, RequestRecord
from luthier.server.http.streams import (
    DISCONNECTED,
    ConnectionGuard,
    RequestBody,
    to_starlette,
)
from luthier.server.routing import SESSION_HEADER, route

if TYPE_CHECKING:
    from luthier.server.console.routes import Console

OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
"""Paths that need no key: the responses contain no account data."""
CONSOLE_HEADER = "x-luthier-console"
"""Header of the console's GET requests."""
REPORTS = 2
"""Maximum number of concurrent data reports and estimates; more requests wait."""

_log = logging.getLogger("luthier.server")


@dataclass(frozen=True)
class Api:
    """An API that the server mounts behind authentication.

    The ASGI application finds in ``scope["state"]``: ``api``; ``caller`` and ``signed``;
    ``record``, for the name of the ``operation``; ``body``, with a ``limit`` that routes may
    change; ``observed``, for requests to models; and the context managers ``model_slot``,
    ``grading_slot``, ``report_slot`` and ``stream_slot``. The scope contains the raw path, because
    an ARN in a path has encoded slashes.
    """

    name: str
    app: ASGIApp
    serves: Callable[[RequestHead, str], bool]
    """Return True if a request is for the API; the second argument is the service of the signature."""
    refusal: Callable[[Fault, str], Response]
    """Return the API's response for a fault; the second argument is the request id."""
    request_id_header: str = "x-request-id"
    signs_body_hash: bool = False
    """True if the signature covers a hash of the body. The API checks the hash while reading the
    body."""

    def refuse(self, error: BaseException, record: RequestRecord) -> StarletteResponse:
        """Return the response to a request that failed with ``error``."""
        fault = fault_of(error, record.request_id)
        record.error = fault.code
        answer = self.refusal(fault, record.request_id)
        response = to_starlette(answer)
        if "retry_after" in fault.details:
            response.headers.setdefault("Retry-After", str(fault.details["retry_after"]))
        return response


def _reads_for_console(head: RequestHead) -> bool:
    """Return True if a console page reads data through the native API.

    Pages refresh every few seconds, without being use of the API by the account. The header removes
    the request from the usage counts only: rate limits, logs, metrics and the audit log still
    apply.
    """
    named = any(name == CONSOLE_HEADER for name, _ in head.headers)
    return named and head.method == "GET" and head.path.startswith("/api/")


class Application:
    """ASGI application in front of all APIs."""

    def __init__(
        self,
        apis: Sequence[Api],
        authenticator: Authenticator,
        admit: Callable[[Caller], None],
        metrics: Metrics,
        trail: AuditTrail,
        ready: Callable[[], str | None],
        limits: ServerLimits | None = None,
        console: Console | None = None,
        recorder: Recorder | None = None,
        routed: Callable[[RequestRecord, float], None] = lambda record, seconds: None,
    ) -> None:
        """Create the application.

        Args:
            apis: The first API that serves a request responds; the last API serves all requests.
            authenticator: Authenticates requests.
            admit: Raises :class:`Fault` if a caller exceeds the rate limit.
            metrics: Counts and logs requests.
            trail: The audit log.
            ready: Returns the reason if the service cannot work, or None.
            limits: Limits of the server.
            console: Static files for browsers, without authentication.
            recorder: Captures requests to models.
            routed: Receives each request and its duration in seconds, for canaries.
        """
        self.limits = limits = limits or ServerLimits()
        self.apis, self.authenticator, self.admit = tuple(apis), authenticator, admit
        self.metrics, self.trail, self.ready = metrics, trail, ready
        self._console, self._recorder, self._routed = console, recorder, routed

        def slots(capacity: int, per_account: int) -> Slots:
            return Slots(capacity, per_account, limits.waiting_requests)

        self._model_slots = slots(limits.model_requests, limits.share_of(limits.model_requests))
        self._grading_slots = slots(limits.grading_requests, max(1, limits.grading_requests // 4))
        self._report_slots = slots(REPORTS, REPORTS)
        self._streams = slots(limits.streams, limits.share_of(limits.streams))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request."""
        head = head_of(scope)
        record = RequestRecord(str(uuid.uuid4()), head.method, address_of(scope))
        began, service = time.perf_counter(), service_of(head)
        receive, send = record.count_bytes(receive, send)
        try:
            if head.path in OPEN_PATHS:
                # Gauges and the readiness check read the database.
                answer = await run_in_threadpool(self._status, head.path)
                record.status = answer.status
                await to_starlette(answer)(scope, receive, send)
            # The console never serves a request with an authorization: S3 clients may use any path.
            elif self._console is not None and self._console.serves(head, service):
                record.api = self._console.name
                answer = self._console.respond(head)
                record.status = answer.status
                await to_starlette(answer)(scope, receive, send)
            else:
                api = next(each for each in self.apis if each.serves(head, service))
                await self._call_api(api, head, record, scope, receive, send)
        except ClientDisconnect:
            record.error = DISCONNECTED
        except asyncio.CancelledError:
            # The server shuts down during a stream.
            record.status = 503
        finally:
            # An interrupted stream has recorded the status of its head, such as 200.
            if record.error == DISCONNECTED:
                record.status = 499
            seconds = time.perf_counter() - began
            self.metrics.count_request(record, seconds)
            self._routed(record, seconds)

    def _status(self, path: str) -> Response:
        if path == "/metrics":
            return Response(200, *self.metrics.exposition())
        reason = self.ready() if path == "/readyz" else None
        return Response.json({"status": reason or "ok"}, 503 if reason else 200)

    async def _call_api(
        self,
        api: Api,
        head: RequestHead,
        record: RequestRecord,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        record.api, record.of_console = api.name, _reads_for_console(head)
        record.routing.session = dict(head.headers).get(SESSION_HEADER, "")
        body = RequestBody(head, receive, BODY_BYTES)
        observed = self._recorder and RequestObservation(
            self._recorder, record, time.perf_counter()
        )

        async def send_audited(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                await self._audit(record, status)
                # Set the status after the audit entry: if the entry fails, no response has started,
                # and the client receives an error.
                record.status = status
                headers = [
                    *message["headers"],
                    (api.request_id_header.lower().encode(), record.request_id.encode()),
                ]
                if record.routing.model:
                    headers.append((b"x-luthier-model", record.routing.model.encode()))
                waits = any(name == "expect" for name, _ in head.headers)
                if (waits and not record.body_requested) or head.has_two_lengths:
                    # The end of the body is unknown, or the client still waits for 100 Continue.
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            if observed and observed.exchange:
                observed.exchange.add(message)
            await send(message)

        with (
            record_actions() as record.actions,
            observe_models(record.add_model),
            meter(record.add_tokens),
            route(record.routing),
        ):
            try:
                signed = await self._identify(api, head, record, body)
                state = {
                    "api": api,
                    "caller": signed.caller,
                    "signed": signed,
                    "record": record,
                    "body": body,
                    "observed": observed,
                    "model_slot": partial(self._slot, self._model_slots, record, receive),
                    "grading_slot": partial(self._slot, self._grading_slots, record, receive),
                    "report_slot": partial(self._slot, self._report_slots, record, receive),
                    "stream_slot": partial(self._streams.turn, record.account, 0),
                }
                # Routers match the raw path, where the slashes of an ARN are still encoded.
                inner = {**scope, "app": api.app, "path": head.path, "state": state}
                with working_for(record.account):
                    await api.app(inner, body.receive, send_audited)
            except ClientDisconnect:
                await self._audit(record, 499)
                raise
            # CancelledError included: at shutdown, a request without a response gets an error.
            except (Exception, asyncio.CancelledError) as error:
                if record.status:
                    raise  # the response has started
                await api.refuse(error, record)(scope, receive, send_audited)
            finally:
                if observed:
                    observed.end()

    async def _identify(
        self, api: Api, head: RequestHead, record: RequestRecord, body: RequestBody
    ) -> Signed:
        """Authenticate the request and apply the account's rate limit."""
        check_head(head)

        def recognize() -> Signed | None:
            if api.signs_body_hash:
                return admitted(self.authenticator.authenticate(head, None))
            signed = self.authenticator.recognize(head)
            return signed and admitted(signed)

        def admitted(signed: Signed) -> Signed:
            record.account, record.user = signed.caller.account, signed.caller.user
            record.key = signed.caller.key
            self.admit(signed.caller)
            return signed

        # Check the key before reading the body, so that unknown clients cannot fill the memory.
        signed = await run_in_threadpool(recognize)
        if signed is None:
            data = await body.read()
            signed = await run_in_threadpool(
                lambda: admitted(self.authenticator.authenticate(head, data))
            )
        return signed

    @asynccontextmanager
    async def _slot(
        self, slots: Slots, record: RequestRecord, receive: Receive
    ) -> AsyncIterator[None]:
        """Occupy a slot, and cancel the work of the block when the client disconnects.

        Raises:
            Fault: If no slot is free in time.
            ClientDisconnect: If the client disconnected.
        """
        began = time.perf_counter()
        async with slots.turn(record.account, self.limits.queue_seconds):
            record.queue_seconds = time.perf_counter() - began
            guard = ConnectionGuard(receive)
            try:
                with cancelled_by(guard.register):
                    yield
            except Exception as error:
                if not await guard.end():
                    raise
                # No client reads the response; only the logs report the error.
                record.error = fault_of(error, record.request_id).code
                await self._audit(record, 500)
                raise ClientDisconnect from error
            finally:
                gone = await guard.end()
            if gone:
                raise ClientDisconnect

    async def _audit(self, record: RequestRecord, status: int) -> None:
        """Write changes into the audit log before the response is sent."""
        actions, record.actions = record.actions, []  # each action is written once
        if not actions:
            return
        # A change without an entry must not be reported as done: an error here reaches the client.
        if status < 400 or status == 499:
            await run_in_threadpool(self._write_audit, record, actions, "ok")
            return
        if record.error not in FAILURES:
            # The last action was rejected. Earlier actions of the request changed nothing.
            actions = actions[-1:]
        try:
            await run_in_threadpool(self._write_audit, record, actions, record.error)
        except Exception:
            _log.exception("the audit log could not be written")

    def _write_audit(
        self, record: RequestRecord, actions: Sequence[tuple[str, str]], outcome: str
    ) -> None:
        caller = Caller(record.account, record.user, (), key=record.key)
        for action, resource in actions:
            self.trail.record(caller, action, resource, outcome, record.request_id, record.address)
