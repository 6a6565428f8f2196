"""An application whose faces answer with what they were given, and who asks it over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from trails import Remembered

from luthier.api.app import Application, Faces
from luthier.api.observability import Observer
from luthier.api.policies import authorize
from luthier.api.wire import Answer, Call, Caller, Fault, Head, Route, Signed
from luthier.limits import ServerLimits

ANNA = Caller("111111111111", "anna", ())
MAY = Caller(
    "111111111111", "anna", ({"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}},)
)


class Door:
    """Lets in whoever shows the key, and remembers what it was shown."""

    def __init__(self) -> None:
        self.bodies: list[bytes | None] = []

    def authenticate(self, head: Head, body: bytes | None) -> Signed:
        self.bodies.append(body)
        given = [value for name, value in head.headers if name == "authorization"]
        if given in (["Bearer good"], ["AWS4-HMAC-SHA256 Credential=A/20260101/r/bedrock/x"]):
            return Signed(ANNA)
        raise Fault("UnrecognizedClient", "The key is not known.")

    def recognize(self, head: Head) -> Signed | None:
        signed = self.authenticate(head, b"")
        return signed if dict(head.headers)["authorization"].startswith("Bearer") else None


class Waiting:
    """Pieces of which the second never comes; closing it wakes who waits."""

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
    """Takes a body in pieces, and remembers how."""

    def __init__(self) -> None:
        self.pieces: list[int] = []
        self.seconds = 0.0
        self.closed, self.first = threading.Event(), threading.Event()

    def open(self, call: Call) -> Taking:
        authorize(ANNA if call.query else MAY, "test:Take", call.path)
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
    """A face that answers with what it was given."""

    def __init__(self) -> None:
        self.taking = Taking()
        self.closed = threading.Event()
        self.sent = 0
        self.waiting = Waiting()

    def route(self, method: str, path: str) -> Route:
        name = path.rpartition("/")[2]
        works = {"echo": self.echo, "fail": self.fail, "stream": self.stream, "full": self.full}
        works["deny"] = self.deny
        works["large"] = lambda call: Answer.of(len(call.body))
        works["pour"] = lambda call: Answer(200, self.much())
        works["nap"] = self.nap
        works["wait"] = lambda call: Answer(200, self.waiting)
        if name == "take":
            return Route("test.take", self.taken, body_limit=8_000_000, sink=self.taking.open)
        if name not in works:
            raise Fault("UnknownOperation", "There is no such operation.")
        limit = 10_000_000 if name == "large" else 1000
        return Route(f"test.{name}", works[name], {"name": name}, limit)

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        return Answer.of({"code": fault.code, "message": fault.message, "id": request_id}, 400)

    def echo(self, call: Call) -> Answer:
        authorize(MAY, "test:Echo", call.path)
        told = {"path": call.path, "query": dict(call.query), "body": call.body.decode()}
        return Answer.of({**told, "user": call.caller.user, "params": dict(call.params)})

    def fail(self, call: Call) -> Answer:
        raise RuntimeError("the password is hunter2")

    def taken(self, call: Call) -> Answer:
        assert not call.body and not self.taking.closed.is_set()
        return Answer.of(sum(call.sink.pieces))

    def nap(self, call: Call) -> Answer:
        time.sleep(2.5)  # longer than a head may take, in the tests of that
        return Answer.of("rested")

    def deny(self, call: Call) -> Answer:
        authorize(ANNA, "test:Deny", "*")
        raise AssertionError("it was allowed")

    def full(self, call: Call) -> Answer:
        raise Fault("Throttling", "Slow down.", retry_after=1)

    def stream(self, call: Call) -> Answer:
        return Answer(200, self.pieces(), {"Content-Type": "text/plain"})

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


class Objects:
    """Stands where object storage does."""

    async def handle(
        self, head: Head, signed: Signed, receive: Any, send: Any, rid: str, run: Any
    ) -> int:
        start = {"type": "http.response.start", "status": 204, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return 204

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        return Answer(403, b"<Error/>", {"Content-Type": "application/xml"})


class Server:
    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.door, self.echo = Door(), Echo()
        self.missing: str | None = None
        self.admitted: list[str] = []
        faces = Faces(self.echo, self.echo, self.echo, Objects(), self.echo)
        self.observer = Observer(lambda: {"jobs": {"Queued": 3.0}, "free": {"": 1.0}})
        self.trail = Remembered()
        self.app = Application(
            faces, self.door, self.admit, self.observer, self.trail,
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
            except TimeoutError:
                pass
            return found
