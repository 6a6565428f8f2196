"""The application: reads requests, finds out who sends them, hands them to a face, sends the answer.

One port serves every face. Which one is meant is known before anything is read: by the path for the
OpenAI and native faces, by the scope of the signature for object storage, and else it is Bedrock.
Nothing is looked up, parsed or changed for a request that has not proved who sent it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sqlalchemy.exc import OperationalError

from luthier.api.attending import Attendant
from luthier.api.heads import (
    SMALL,
    Scope,
    address_of,
    call_of,
    head_of,
    is_bearer,
    is_large,
    is_signed,
    service_of,
)
from luthier.api.observability import Observed, Observer
from luthier.api.policies import noted
from luthier.api.sending import (
    ClientGone,
    Receive,
    Run,
    Send,
    close_pieces,
    lifespan,
    read_body,
    send_answer,
    take_body,
)
from luthier.api.threads import FairSlots, FairThreads, LargeBodies, Threads
from luthier.api.wire import Answer, Caller, Face, Fault, Head, Route, Signed
from luthier.errors import ReadOnlyDisk, RefusedInput
from luthier.limits import ServerLimits
from luthier.serving.stream import attended

OPENAI_PATHS = ("/v1/", "/openai/v1/")
NATIVE_PATH = "/api/"
OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
"""Answered to everybody: they say nothing of anybody's data."""
LARGEST_SIGNED = 25_000_000
"""Bytes of a signed body, which is read before its sender is known."""
THREADS, STREAMS = 64, 256
"""Requests that are worked on at once, and streams that wait for their next piece."""
LONG = 48
"""Requests that take a model's time at once: the other threads answer what is short."""
TRANSFERS = 8
"""Pieces of objects and files that are written or read at once."""
SHARE = 0.75
"""Part of all these that one account may have; further ones of it wait."""

TROUBLES = (OperationalError, ReadOnlyDisk)
"""What passes when the database, or the disk, is back: clients are told to ask again."""

_log = logging.getLogger("luthier.api")


class Authenticates(Protocol):
    """Finds out who sends a request."""

    def authenticate(self, head: Head, body: bytes | None) -> Signed:
        """The caller; raises :class:`Fault` for one who is not let in."""


class Audits(Protocol):
    """The audit log, as :class:`luthier.api.auditing.Trail` writes it."""

    def record(
        self,
        caller: Caller,
        action: str,
        resource: str,
        outcome: str = "ok",
        request_id: str = "",
        address: str = "",
    ) -> None:
        """Note a call that was handled: what it changed is on disk when this is back."""

    def turned_away(self, code: str, address: str) -> None:
        """Somebody unknown was not let in."""


class Streams(Protocol):
    """A face that reads bodies as they come: object storage."""

    async def handle(
        self, head: Head, signed: Signed, receive: Receive, send: Send, request_id: str, run: Run
    ) -> int:
        """Answer the request, all that blocks by ``run``; the status that was sent."""

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        """``fault`` as this face's clients expect it."""


@dataclass(frozen=True)
class Faces:
    """All that one port answers with."""

    bedrock: Face
    openai: Face
    native: Face
    objects: Streams


class Application:
    """An ASGI application. ``ready`` says whether the service can do its work."""

    def __init__(
        self,
        faces: Faces,
        authenticator: Authenticates,
        admit: Callable[[Caller], None],
        observer: Observer,
        trail: Audits,
        ready: Callable[[], str | None],
        large: LargeBodies | None = None,
    ) -> None:
        """``admit`` raises :class:`Fault` beyond the rate limit; ``ready`` says what is missing.

        ``large`` has the turns at which large bodies are parsed.
        """
        self.faces, self.authenticator, self.admit = faces, authenticator, admit
        self.observer, self.trail, self.ready = observer, trail, ready
        self._run, self._wait = Threads(THREADS, "request"), Threads(STREAMS, "stream")
        self._large = large or LargeBodies.of(ServerLimits())
        self._turns = FairSlots(LONG, int(LONG * SHARE))
        self._streams = FairSlots(STREAMS, int(STREAMS * SHARE))
        self._transfers = FairThreads(TRANSFERS, int(TRANSFERS * SHARE), "transfer")

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
        head, request_id = head_of(scope), str(uuid.uuid4())
        seen = Observed(request_id, head.method, address_of(scope))
        began = time.perf_counter()
        try:
            if head.path in OPEN_PATHS:
                answer = await self._run(self._open, head.path)
                seen.status = await send_answer(send, receive, answer, self._wait)
            elif service_of(head) == "s3" and not _named_face(head.path):
                await self._objects(head, receive, send, seen)
            else:
                await self._face(head, receive, send, seen)
        except ClientGone:
            seen.status = 499
        except asyncio.CancelledError:
            # The server waits no longer: a stream ends where it is.
            seen.status = 503
        finally:
            self.observer.finished(seen, time.perf_counter() - began)

    def _open(self, path: str) -> Answer:
        if path == "/metrics":
            return Answer(200, *self.observer.exposition())
        reason = self.ready() if path == "/readyz" else None
        return Answer.of({"status": reason or "ok"}, 503 if reason else 200)

    async def _objects(self, head: Head, receive: Receive, send: Send, seen: Observed) -> None:
        face = self.faces.objects

        async def audited(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                await self._run(self._note, seen)
            await send(message)

        try:
            # The body is compared with its signed hash as it is read.
            signed = await self._run(self.authenticator.authenticate, head, None)
            seen.let_in("s3", signed.caller)
            self.admit(signed.caller)
            seen.operation = f"s3.{head.method}"
            with noted() as seen.asked, self._transfers.request(signed.caller.account) as run:
                seen.status = await face.handle(
                    head, signed, receive, audited, seen.request_id, run
                )
        except Fault as fault:
            self._refused(seen, fault)
            answer = _closing(head, face.refusal(fault, seen.request_id))
            seen.status = await send_answer(send, receive, answer, self._wait)
        except TROUBLES as error:
            _log.exception("database or disk trouble", extra={"request_id": seen.request_id})
            told = Fault.unavailable(error)
            seen.refused(told)
            answer = _closing(head, face.refusal(told, seen.request_id))
            seen.status = await send_answer(send, receive, answer, self._wait)

    async def _face(self, head: Head, receive: Receive, send: Send, seen: Observed) -> None:
        name, face = self._chosen(head.path)
        seen.face = name
        async with AsyncExitStack() as held:
            answer = await self._answered(face, head, receive, seen, held)
            if answer.status >= 400:
                answer = _closing(head, answer)
            seen.status = await send_answer(send, receive, answer, self._wait)

    async def _answered(
        self, face: Face, head: Head, receive: Receive, seen: Observed, held: AsyncExitStack
    ) -> Answer:
        """The answer, or the refusal; ``held`` keeps what the answer needs until it is sent."""
        try:
            answer = await self._answer(face, head, receive, seen, held)
        except Fault as fault:
            self._refused(seen, fault)
            answer = face.refusal(fault, seen.request_id)
        except RefusedInput as refused:
            told = Fault.of(refused)
            seen.refused(told)
            answer = face.refusal(told, seen.request_id)
        except ClientGone:
            raise
        except asyncio.CancelledError:
            text = "The service is ending. Ask again; what was asked may have been done."
            told = Fault("ServiceUnavailable", text, retry_after=5)
            seen.refused(told)
            answer = face.refusal(told, seen.request_id)
        except TROUBLES as error:
            _log.exception("database or disk trouble", extra={"request_id": seen.request_id})
            told = Fault.unavailable(error)
            seen.refused(told)
            answer = face.refusal(told, seen.request_id)
        except Exception:
            # What went wrong inside is told to the log alone.
            _log.exception("request failed", extra={"request_id": seen.request_id})
            text = f"Something failed inside the service; its log has request {seen.request_id}."
            answer = face.refusal(Fault("InternalServer", text), seen.request_id)
            seen.error = "InternalServer"
        return answer

    def _chosen(self, path: str) -> tuple[str, Face]:
        if path.startswith(OPENAI_PATHS):
            return "openai", self.faces.openai
        if path.startswith(NATIVE_PATH):
            return "native", self.faces.native
        return "bedrock", self.faces.bedrock

    async def _answer(
        self, face: Face, head: Head, receive: Receive, seen: Observed, held: AsyncExitStack
    ) -> Answer:
        route, unknown = _routed(face, head)
        signed: Signed | None = None
        limit = route.body_limit if route else SMALL
        if is_large(head):
            # A key needs no body to be known: a large one is only read from those who may send it.
            # Of signatures it is part, so that nobody's is read without end.
            if is_bearer(head) or not is_signed(head):
                signed = await self._run(self.authenticator.authenticate, head, b"")
            else:
                limit = min(limit, LARGEST_SIGNED)
        if route is not None and route.sink is not None:
            return await self._upload(head, receive, limit, route, seen, signed)
        body = await read_body(head, receive, limit)
        if route is not None and route.long:
            if signed is None:
                signed = await self._run(self.authenticator.authenticate, head, body)
            account = signed.caller.account
            seen.let_in(seen.face, signed.caller)
            seen.operation = route.operation
            work = partial(self._work, head, body, route, unknown, seen, signed)
            async with self._turns.turn(account):
                answer = await self._attended(work, receive, seen)
            await self._hold(answer, account, held)
            return answer
        # One thread does all of it: to change threads costs as much as to look something up.
        work = partial(self._work, head, body, route, unknown, seen, signed)
        answer = await self._run(work)
        await self._hold(answer, seen.account, held)
        return answer

    async def _upload(
        self,
        head: Head,
        receive: Receive,
        limit: int,
        route: Route,
        seen: Observed,
        signed: Signed | None,
    ) -> Answer:
        """A body that is taken as it comes, from those who may send it."""
        sent: bytes | None = None
        if signed is None:
            sent = await read_body(head, receive, limit)
            signed = await self._run(self.authenticator.authenticate, head, sent)
        seen.let_in(seen.face, signed.caller)
        seen.operation = route.operation
        self.admit(signed.caller)
        call = call_of(head, b"", route, signed.caller, seen)
        with noted() as seen.asked, self._transfers.request(signed.caller.account) as run:
            with await run(route.sink, call) as sink:
                if sent is None:
                    await take_body(head, receive, limit, sink.write, run)
                else:
                    await run(sink.write, sent)
                answer: Answer = await run(route.handler, replace(call, sink=sink))
            await self._run(self._note, seen)
        return answer

    async def _attended(
        self, work: Callable[[], Answer], receive: Receive, seen: Observed
    ) -> Answer:
        """What a model may write for, and stops writing for when the client hangs up."""
        attendant = Attendant(receive, self._wait)
        try:
            with attended(attendant.take):
                answer = await self._run(work)
        except Fault as fault:
            if await attendant.end():
                # It is in the log, and nobody is there to be told.
                self._refused(seen, fault)
                raise ClientGone from fault
            raise
        finally:
            gone = await attendant.end()
        if gone:
            raise ClientGone
        return answer

    async def _hold(self, answer: Answer, account: str, held: AsyncExitStack) -> None:
        """Take the thread that a stream needs until its end, where the account may have one more."""
        if isinstance(answer.body, bytes):
            return
        try:
            held.enter_context(self._streams.now(account))
        except Fault:
            await self._run(close_pieces, answer.body)
            raise

    def _work(
        self,
        head: Head,
        body: bytes,
        route: Route | None,
        unknown: Fault | None,
        seen: Observed,
        signed: Signed | None,
    ) -> Answer:
        signed = signed or self.authenticator.authenticate(head, body)
        seen.let_in(seen.face, signed.caller)
        self.admit(signed.caller)
        if route is None:
            raise unknown or Fault("UnknownOperation", "There is no such operation.")
        seen.operation = route.operation
        with noted() as seen.asked, self._large.turn(signed.caller.account, len(body)):
            answer = route.handler(call_of(head, body, route, signed.caller, seen))
        self._note(seen)
        return answer

    def _note(self, seen: Observed, outcome: str = "ok") -> None:
        """What was changed is in the audit log before the answer leaves; the rest is counted."""
        caller = Caller(seen.account, seen.user, ())
        for action, resource in seen.asked:
            self.trail.record(caller, action, resource, outcome, seen.request_id, seen.address)

    def _refused(self, seen: Observed, fault: Fault) -> None:
        seen.refused(fault)
        if not seen.user:
            self.trail.turned_away(fault.code, seen.address)
        else:
            # Only what was asked for last can have been refused.
            seen.asked = seen.asked[-1:]
            self._note(seen, fault.code)


def _closing(head: Head, answer: Answer) -> Answer:
    """``answer``, after which the connection ends if the client still waits to send its body.

    It will not send it now, and what it sends next on the connection would be taken for it.
    """
    if not any(name == "expect" for name, _ in head.headers):
        return answer
    return replace(answer, headers={**answer.headers, "Connection": "close"})


def _routed(face: Face, head: Head) -> tuple[Route | None, Fault | None]:
    """The route, or why there is none: that is told only to those who are let in."""
    try:
        return face.route(head.method, head.path), None
    except Fault as fault:
        return None, fault


def _named_face(path: str) -> bool:
    return path.startswith((*OPENAI_PATHS, NATIVE_PATH))
