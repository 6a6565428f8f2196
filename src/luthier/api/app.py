"""The application: reads requests, finds out who sends them, hands them to a face, sends the answer.

One port serves every face. Which one is meant is known before anything is read: by the path for the
OpenAI and native faces, by the scope of the signature for object storage and STS, and else it is
Bedrock.
Nothing is looked up, parsed or changed for a request that has not proved who sent it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sqlalchemy.exc import OperationalError

from luthier.api.attending import Attendant
from luthier.api.connections import client_key
from luthier.api.heads import (
    Scope,
    address_of,
    call_of,
    check_text,
    head_of,
    service_of,
)
from luthier.api.observability import Observed, Observer
from luthier.api.policies import noted
from luthier.api.rate_limits import REFUSALS, RequestPace, WrongBodies
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
from luthier.api.sigv4 import claim_of
from luthier.api.threads import FairSlots, FairThreads, Threads
from luthier.api.wire import Answer, Caller, Face, Fault, Head, Route, Signed
from luthier.cancellation import cancelled_by
from luthier.errors import ReadOnlyDisk, RefusedInput
from luthier.limits import BODY_BYTES, ServerLimits
from luthier.serving.inference import metered
from luthier.serving.prompts import on_prompt_tokenized
from luthier.serving.scheduler import working_for

OPENAI_PATHS = ("/v1/", "/openai/v1/")
NATIVE_PATH = "/api/"
OPEN_PATHS = ("/healthz", "/readyz", "/metrics")
"""Answered to everybody: they say nothing of anybody's data."""
WRONG_BODY_BYTES = 1 << 20
"""Larger bodies that cannot be used are counted: to read and parse them takes time of all others."""
UNUSABLE = frozenset({"Validation", "Serialization", "RequestEntityTooLarge"})
STREAMED_COST = 1 << 20
"""Bytes of memory for a body that is handed on as it comes."""
SHORT_REQUESTS = 16
"""Threads beside those for what takes long: they answer what is short, and close streams."""
SHORT_REQUESTS_PER_CLIENT = 2
"""Of those, for one key from one address."""
REST_FACTOR = 4.0
"""For so many times the processor time of a short request its slot takes no other one of its client
while others are at work: they all compute in Python, one at a time. Forty connections that listed 400
files made a neighbour's chat take 3.6 times as long, and 1.5 times with this."""
LONGEST_REST = 1.0
"""Seconds."""

TROUBLES = (OperationalError, ReadOnlyDisk)
"""What passes when the database, or the disk, is back: clients are told to ask again."""

_log = logging.getLogger("luthier.api")


class Authenticates(Protocol):
    """Finds out who sends a request."""

    def authenticate(self, head: Head, body: bytes | None) -> Signed:
        """The caller; raises :class:`Fault` for one who is not let in."""

    def recognize(self, head: Head) -> Signed | None:
        """The caller by the head alone; ``None`` where the body, too, is needed to be sure.

        Raises :class:`Fault` for one who is not let in whatever the body is.
        """


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
    sts: Face


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
        limits: ServerLimits | None = None,
        pace: RequestPace | None = None,
    ) -> None:
        """``admit`` raises :class:`Fault` beyond the rate limit; ``ready`` says what is missing.

        ``pace`` is that of the addresses, whose connections it concerns as well.
        """
        self.limits = limits = limits or ServerLimits()
        self.faces, self.authenticator, self.admit = faces, authenticator, admit
        self.observer, self.trail, self.ready = observer, trail, ready
        long_requests = limits.model_requests + limits.grading_requests
        self._run = Threads(long_requests + SHORT_REQUESTS, "request")
        self._wait = Threads(limits.streams + SHORT_REQUESTS, "stream")

        def slots(capacity: int, per_client: int) -> FairSlots:
            return FairSlots(capacity, per_client, limits.waiting_requests)

        self._turns = slots(limits.model_requests, limits.share_of(limits.model_requests))
        self._gradings = slots(limits.grading_requests, max(1, limits.grading_requests // 4))
        self._streams = slots(limits.streams, limits.share_of(limits.streams))
        most, each = limits.transfers, limits.share_of(limits.transfers)
        self._transfers = FairThreads(most, each, limits.waiting_requests, "transfer")
        self._wrong_bodies = WrongBodies(limits.wrong_bodies_per_minute)
        self._pace = pace or RequestPace(limits.requests_per_second_per_address)
        # They compute in Python one after the other: more at once would only keep others waiting.
        self._short = slots(SHORT_REQUESTS, SHORT_REQUESTS_PER_CLIENT)
        # Apart: a client that sends its body slowly keeps nobody from working on theirs.
        self._receiving = slots(limits.body_memory, limits.body_memory_per_client)
        self._large = slots(limits.large_bodies, limits.large_bodies_per_client)

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
        began, client = time.perf_counter(), client_key(seen.address)
        receive, send = seen.counted(receive, send)
        service = service_of(head)
        objects = service == "s3" and not _named_face(head.path)
        try:
            try:
                delay = self._pace.delay(client)
            except Fault as fault:
                face = self.faces.objects if objects else self._chosen(head, service)[1]
                seen.refused(fault)
                answer = face.refusal(fault, seen.request_id)
                seen.status = await send_answer(send, receive, answer, self._wait)
                return
            if delay > 0:
                await asyncio.sleep(delay)
            if head.path in OPEN_PATHS:
                answer = await self._run(self._open, head.path)
                seen.status = await send_answer(send, receive, answer, self._wait)
            elif objects:
                await self._objects(head, receive, send, seen)
            else:
                await self._face(head, service, receive, send, seen)
        except ClientGone:
            seen.status = 499
        except asyncio.CancelledError:
            # The server waits no longer: a stream ends where it is.
            seen.status = 503
        finally:
            if seen.status in REFUSALS:
                self._pace.charge_refusal(client)
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
            check_text(head, "InvalidURI", "InvalidArgument")
            # The body is compared with its signed hash as it is read.
            signed = await self._run(self.authenticator.authenticate, head, None)
            seen.let_in("s3", signed.caller)
            await self._run(self.admit, signed.caller)
            seen.operation = f"s3.{head.method}"
            account = signed.caller.account
            async with self._body_memory(account, head, STREAMED_COST):
                with noted() as seen.asked, self._transfers.request(account) as run:
                    seen.status = await face.handle(
                        head, signed, receive, audited, seen.request_id, run
                    )
        except Fault as fault:
            self._refused(seen, fault)
            answer = face.refusal(fault, seen.request_id)
            seen.status = await send_answer(send, receive, answer, self._wait)
        except TROUBLES as error:
            _log.exception("database or disk trouble", extra={"request_id": seen.request_id})
            told = Fault.unavailable(error)
            seen.refused(told)
            answer = face.refusal(told, seen.request_id)
            seen.status = await send_answer(send, receive, answer, self._wait)

    async def _face(
        self, head: Head, service: str, receive: Receive, send: Send, seen: Observed
    ) -> None:
        name, face = self._chosen(head, service)
        seen.face = name
        async with AsyncExitStack() as held:
            answer = await self._answered(face, head, receive, seen, held)
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

    def _chosen(self, head: Head, service: str) -> tuple[str, Face]:
        if head.path.startswith(OPENAI_PATHS):
            return "openai", self.faces.openai
        if head.path.startswith(NATIVE_PATH):
            return "native", self.faces.native
        if service == "sts":
            return "sts", self.faces.sts
        return "bedrock", self.faces.bedrock

    async def _answer(
        self, face: Face, head: Head, receive: Receive, seen: Observed, held: AsyncExitStack
    ) -> Answer:
        check_text(head)
        route, unknown = _routed(face, head)
        signed: Signed | None = None
        small = self.limits.unknown_body_bytes
        limit, length = route.body_limit if route else small, head.body_length
        streamed = route is not None and route.sink is not None
        if length is None or length > small:
            # Of signatures the body is part: nobody's is read whose key is not known.
            signed = await self._run(self.authenticator.recognize, head)
            if signed is None and streamed:
                limit, streamed = min(limit, BODY_BYTES), False
        client = signed.caller.account if signed else client_key(seen.address)
        size = limit if length is None else min(length, limit)
        async with AsyncExitStack() as receiving, AsyncExitStack() as turns:
            cost = STREAMED_COST if streamed else size
            await receiving.enter_async_context(self._body_memory(client, head, cost))
            if size > (small if signed is None else WRONG_BODY_BYTES):
                address, sender = _sender(head, seen, signed)
                try:
                    self._wrong_bodies.check(address, sender)
                except Fault:  # a 429 that no load of the server caused
                    self._pace.charge_refusal(address)
                    raise
            if route is not None and route.sink is not None:
                return await self._upload(head, receive, limit, route, seen, signed)
            body = await read_body(head, receive, limit, self.limits)
            turns.enter_context(self._counted_if_wrong(head, len(body), seen, signed))
            takes_turns = route is not None and (route.long or route.grading)
            if route is not None and takes_turns:
                if signed is None:
                    signed = await self._run(self.authenticator.authenticate, head, body)
                client = signed.caller.account
                seen.let_in(seen.face, signed.caller)
                seen.operation = route.operation
                slots = self._gradings if route.grading else self._turns
                # Who waits with a large body holds memory that others want.
                seconds = self.limits.idle_seconds if len(body) > small else None
                await turns.enter_async_context(slots.turn(client, seconds=seconds))
            await turns.enter_async_context(self._large_turn(client, len(body)))
            # One thread does all of it: to change threads costs as much as to look something up.
            work = partial(self._work, head, body, route, unknown, seen, signed)
            if takes_turns:
                answer = await self._attended(work, receive, seen)
            else:
                # By key as well: many accounts may come from the address of one proxy.
                answer = await self._short_request(f"{client} {_claimed_key(head)}", work, seen)
            await self._hold(answer, seen.account, held)
            return answer

    async def _short_request(
        self, client: str, work: Callable[[], Answer], seen: Observed
    ) -> Answer:
        """What a short request is answered; its client's next ones wait a little beside others."""
        release = await self._short.acquire(client)
        seconds = 0.0

        def measured() -> Answer:
            nonlocal seconds
            began = time.thread_time()
            try:
                return work()
            finally:
                seconds = time.thread_time() - began

        try:
            return await self._run(measured)
        finally:
            # A model works for accounts; who sends a short request is known once it is answered.
            shared = self._short.used_by_others(client) or any(
                each.used_by_others(seen.account) for each in (self._turns, self._streams)
            )
            release(min(REST_FACTOR * seconds, LONGEST_REST) if shared else 0.0)

    def _body_memory(self, client: str, head: Head, size: int) -> AbstractAsyncContextManager[None]:
        """Hold ``size`` bytes of memory for the body of ``head``, unless it is a small one."""
        length = head.body_length
        if length is not None and length <= self.limits.unknown_body_bytes:
            return nullcontext()
        return self._receiving.turn(client, size, self.limits.idle_seconds)

    @contextmanager
    def _counted_if_wrong(
        self, head: Head, size: int, seen: Observed, signed: Signed | None
    ) -> Iterator[None]:
        """Remember the sender of a body of ``size`` bytes that turns out to be read for nothing."""
        try:
            yield
        except (Fault, RefusedInput) as refusal:
            code = (refusal if isinstance(refusal, Fault) else Fault.of(refusal)).code
            unsigned = code == "InvalidSignature"
            least = self.limits.unknown_body_bytes if unsigned else WRONG_BODY_BYTES
            if size > least and (unsigned or code in UNUSABLE):
                self._wrong_bodies.count(*_sender(head, seen, signed))
            raise

    @asynccontextmanager
    async def _large_turn(self, client: str, size: int) -> AsyncIterator[None]:
        """A turn for a body of ``size`` bytes, if that is large, until its prompt is tokens."""
        if size <= self.limits.large_body_bytes:
            yield
            return
        release = await self._large.acquire(client, seconds=self.limits.idle_seconds)
        loop = asyncio.get_running_loop()

        def in_loop() -> None:
            loop.call_soon_threadsafe(release)

        try:
            with on_prompt_tokenized(in_loop):
                yield
        finally:
            release()

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
            sent = await read_body(head, receive, limit, self.limits)
            with self._counted_if_wrong(head, len(sent), seen, None):
                signed = await self._run(self.authenticator.authenticate, head, sent)
        seen.let_in(seen.face, signed.caller)
        seen.operation = route.operation
        await self._run(self.admit, signed.caller)
        call = call_of(head, b"", route, signed.caller, seen, self.limits.json_values)
        with noted() as seen.asked, self._transfers.request(signed.caller.account) as run:
            with await run(route.sink, call) as sink:
                if sent is None:
                    await take_body(head, receive, limit, self.limits, sink.write, run)
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
            with cancelled_by(attendant.take):
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
            held.enter_context(self._streams.try_turn(account))
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
        with noted() as seen.asked, metered(seen.spend), working_for(seen.account):
            call = call_of(head, body, route, signed.caller, seen, self.limits.json_values)
            answer = route.handler(call)
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


def _sender(head: Head, seen: Observed, signed: Signed | None) -> tuple[str, str]:
    """Address, and the account that a body comes under; the access key, where it is not known yet."""
    known = signed.caller.account if signed else claim_of(head).access_key
    return client_key(seen.address), known


def _claimed_key(head: Head) -> str:
    """The key that a request claims to come with, unchecked; empty without one."""
    given = next((value for name, value in head.headers if name == "authorization"), "")
    return given.partition("/")[0]  # behind the key, a signature has its day


def _routed(face: Face, head: Head) -> tuple[Route | None, Fault | None]:
    """The route, or why there is none: that is told only to those who are let in."""
    try:
        return face.route(head.method, head.path), None
    except Fault as fault:
        return None, fault


def _named_face(path: str) -> bool:
    return path.startswith((*OPENAI_PATHS, NATIVE_PATH))
