"""An application whose APIs echo requests, with clients on real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from handler_api import Endpoint, handler_api
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from trails import Remembered

from luthier.limits import ServerLimits
from luthier.server.actions import record_action
from luthier.server.http.application import Api, Application
from luthier.server.http.messages import Caller, Fault, Request, RequestHead, Response, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.http.routes import handler_endpoint, read_head
from luthier.server.http.streams import to_starlette

ANNA = Caller("111111111111", "anna", ("administrator",))
ACTION = "luthier:WhoAmI"
"""Action of all operations here, allowed for every role."""


class Door:
    """Authentication by one key, with a record of presented keys."""

    def __init__(self) -> None:
        self.bodies: list[bytes | None] = []

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        self.bodies.append(body)
        given = [value for name, value in head.headers if name == "authorization"]
        if given in (["Bearer good"], ["AWS4-HMAC-SHA256 Credential=A/20260101/r/bedrock/x"]):
            return Signed(ANNA)
        raise Fault("UnrecognizedClient", "The key is not known.")

    def recognize(self, head: RequestHead) -> Signed | None:
        signed = self.authenticate(head, b"")
        return signed if dict(head.headers)["authorization"].startswith("Bearer") else None


class Waiting:
    """A body whose second piece never arrives; closing unblocks the reader."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.begun = False

    def __iter__(self) -> Waiting:
        return self

    def __next__(self) -> bytes:
        if not self.begun:
            self.begun = True
            return b"first"
        self.closed.wait(30)
        raise StopIteration

    def close(self) -> None:
        self.closed.set()


class Taking:
    """A handler that reads a body in pieces and records the sizes."""

    def __init__(self) -> None:
        self.pieces: list[int] = []
        self.seconds = 0.0
        self.closed, self.first = threading.Event(), threading.Event()

    def open(self, request: Request) -> Taking:
        record_action("test:Take", request.path)
        if request.query:
            raise Fault("AccessDenied", "The query is not allowed.")
        return self

    def __enter__(self) -> Taking:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.closed.set()

    def write(self, data: bytes) -> int:
        self.pieces.append(len(data))
        time.sleep(self.seconds)
        self.first.set()
        return len(data)


class Echo:
    """An API that echoes requests."""

    def __init__(self) -> None:
        self.taking = Taking()
        self.closed = threading.Event()
        self.sent = 0
        self.error = Exception()
        self.waiting = Waiting()

    def choose(self, head: RequestHead) -> Endpoint:
        name = head.path.rpartition("/")[2]
        works = {"echo": self.echo, "fail": self.fail, "stream": self.stream, "full": self.full}
        works |= {"deny": self.deny, "half": self.half}
        works["large"] = lambda call: Response.json(len(call.body))
        works["pour"] = lambda call: Response(200, self.much())
        works["nap"] = self.nap
        works["wait"] = lambda call: Response(200, self.waiting)
        if name == "take":
            return self.taken
        if name not in works:
            raise Fault("UnknownOperation", "There is no such operation.")
        limit = 10_000_000 if name == "large" else 1000
        return handler_endpoint(works[name], f"test.{name}", ACTION, limit)

    def refusal(self, fault: Fault, request_id: str) -> Response:
        return Response.json({"code": fault.code, "message": fault.message, "id": request_id}, 400)

    def echo(self, request: Request) -> Response:
        record_action("test:Echo", request.path)
        record = {"path": request.path, "query": dict(request.query), "body": request.body.decode()}
        return Response.json({**record, "user": request.caller.user})

    def fail(self, request: Request) -> Response:
        raise RuntimeError("the password is hunter2")

    async def taken(self, sent: HttpRequest) -> HttpResponse:
        sent.state.record.operation = "test.take"
        sent.state.body.limit = 8_000_000
        request = read_head(sent)
        with await run_in_threadpool(self.taking.open, request) as taking:
            await sent.state.body.write_to(taking.write)
            assert not request.body and not self.taking.closed.is_set()
            return to_starlette(Response.json(sum(taking.pieces)))

    def nap(self, request: Request) -> Response:
        time.sleep(2.5)  # longer than the time limit for heads in the tests
        return Response.json("rested")

    def deny(self, request: Request) -> Response:
        record_action("test:Deny", "*")
        raise Fault("AccessDenied", "This is not allowed.")

    def half(self, request: Request) -> Response:
        record_action("test:First", request.path)
        record_action("test:Second", request.path)
        raise self.error

    def full(self, request: Request) -> Response:
        raise Fault("Throttling", "Slow down.", retry_after=1)

    def stream(self, request: Request) -> Response:
        return Response(200, self.pieces(), {"Content-Type": "text/plain"})

    def pieces(self) -> Iterator[bytes]:
        try:
            for number in range(1000):
                self.sent = number
                yield f"{number}\n".encode()
                time.sleep(0.01)
        finally:
            self.closed.set()

    def much(self) -> Iterator[bytes]:
        try:
            for number in range(1000):
                self.sent = number
                yield b"a" * 100_000
        finally:
            self.closed.set()


async def nothing(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status_code=204)


def objects_api() -> Api:
    """Stands where object storage does."""
    return handler_api(
        "s3",
        lambda head: nothing,
        lambda fault, request_id: Response(403, b"<Error/>", {"Content-Type": "application/xml"}),
        lambda head, service: service == "s3" and not head.path.startswith(("/v1/", "/api/")),
        request_id_header="x-amz-request-id",
        signs_body_hash=True,
    )


class Server:
    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.door, self.echo = Door(), Echo()
        self.missing: str | None = None
        self.admitted: list[str] = []
        echo = handler_api(
            "echo", self.echo.choose, self.echo.refusal, request_id_header="x-echo-id"
        )
        self.observer = Metrics(lambda: {"jobs": {"Queued": 3.0}, "free": {"": 1.0}})
        self.trail = Remembered()
        self.app = Application(
            (objects_api(), echo), self.door, self.admit, self.observer, self.trail,
            lambda: self.missing, limits,
        )  # fmt: skip
        self.address = ""

    def admit(self, caller: Caller) -> None:
        self.admitted.append(caller.user)

    def ask(
        self, method: str, path: str, body: bytes = b"", key: str | None = "Bearer good"
    ) -> tuple[int, Any]:
        parts = urlsplit(self.address)
        client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        headers = {"Authorization": key} if key else {}
        client.request(method, path, body, headers)
        answer = client.getresponse()
        text = answer.read()
        client.close()
        kind = answer.getheader("content-type") or ""
        return answer.status, json.loads(text) if "json" in kind else text.decode()

    def raw(self, text: bytes) -> bytes:
        parts = urlsplit(self.address)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(text)
            connection.settimeout(3)
            found = b""
            try:
                while piece := connection.recv(65536):
                    found += piece
            except (TimeoutError, ConnectionResetError):
                pass
            return found
