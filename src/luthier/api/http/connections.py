"""Connections of clients: how many there may be, how large a head may be, how long nothing may happen.

uvicorn (0.54, httptools) bounds none of these: a header grows in the parser until memory ends, half a
head stays open without end, and so does an answer that nobody reads. The protocol here is uvicorn's
with these limits; once a second :meth:`Connections.close_overdue` looks at every connection, which is
cheaper and simpler than timers that each part of a request starts and stops.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import MutableMapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from weakref import WeakSet

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from luthier.api.http.limits import RequestPace
from luthier.api.http.streams import Receive, Send
from luthier.limits import ServerLimits
from luthier.serving.scheduler import discount

PIPELINED = 16
"""Requests that may be sent ahead on a connection whose first is not answered yet."""
DISCARDED = 32 << 20
"""Bytes that are read and thrown away behind an answer: a client that was refused before its body was
read, and sends it all before it looks, finds the answer. To read without end is work for nobody."""
DISCARD_RATE = 64 << 20
"""Bytes a second that are thrown away, on all connections together: sixty clients that send 24 MB each
for nothing would else take most of the time of the thread that reads all connections."""
DISCARD_PAUSE = 0.05
"""Seconds before what is thrown away is read: most clients have seen the answer by then, and stop."""
ACCEPT_BUDGET = 128
"""Connections that are refused between two looks at those that are open, each in 20 microseconds. There
may be a thousand such looks a second, and other threads hold the interpreter between them."""
ACCEPT_COST = 8
"""One that is taken counts as so many: it costs a quarter of a millisecond."""
TCP_CLOSE_WAIT = 8
"""State of a connection whose other end has closed it, in Linux's ``tcp_states.h``."""
EXPLANATIONS_PER_SECOND = 100
"""Refused connections that are told why, in a second: that takes half of what a refusal takes."""
TOO_MANY = "Too many connections or requests from this address. Use fewer, or wait."
TOO_MANY_IN_ALL = "Too many connections in all."
OTHER_FILES = 512
"""Descriptors that the server needs for all that is not a connection of a client."""
LOG_SECONDS = 10.0
"""Between two lines of the log about refusals: who is refused could fill the disk else."""

_log = logging.getLogger("luthier.server")


class Connections:
    """Every open connection of a server, on all its ports."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.pace = RequestPace(limits.requests_per_second_per_address)
        """That of requests: who has spent it far ahead opens no connection."""
        self.refusals: Counter[int] = Counter()
        """What was refused before its request was read, by status."""
        self._last_refusal: tuple[str, str] | None = None
        """Address and reason, where it is not in the log yet."""
        self._logged = float("-inf")
        self._discard_until = 0.0
        self._explained = 0, 0
        """A second of the clock, and how many were told why in it."""
        self.by_client: Counter[str] = Counter()
        # Weak: a TLS handshake that fails ends without a word to its protocol.
        self._open: WeakSet[LimitedHttpProtocol] = WeakSet()

    def __len__(self) -> int:
        return len(self._open)

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> LimitedHttpProtocol:
        """The protocol of a new connection, as uvicorn's ``http_protocol_class`` makes it."""
        made = LimitedHttpProtocol(self, config, server_state, app_state, _loop)
        self._open.add(made)
        return made

    def listen(self, host: str, port: int, tls: bool) -> list[LimitedSocket]:
        """Sockets on ``port`` of every address of ``host`` that this machine has.

        Raises:
            OSError: where the port is taken, or it has none of the addresses.
        """
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        missing: OSError | None = None
        with ExitStack() as opened:
            made = []
            for family, kind, protocol, _, address in dict.fromkeys(found):
                try:
                    each = LimitedSocket(self, family, kind, protocol, tls)
                    opened.enter_context(each)
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    each.bind(address)
                except OSError as error:
                    if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        raise
                    missing = error  # as with ::1 of localhost on a machine without IPv6
                    continue
                made.append(each)
            if not made and missing is not None:
                raise missing
            opened.pop_all()
        return made

    def close_overdue(self) -> None:
        """End every connection that has waited longer than it may, and log what was refused."""
        for connection in list(self._open):
            connection.close_if_overdue()
        now = time.monotonic()
        if self._last_refusal is not None and now - self._logged > LOG_SECONDS:
            address, reason = self._last_refusal
            fields = {
                "refused_by_status": {str(k): n for k, n in sorted(self.refusals.items())},
                "last_address": address,
                "last_reason": reason,
            }
            _log.warning("refused before the request was read", extra={"fields": fields})
            self._last_refusal, self._logged = None, now

    def count_refusal(self, status: HTTPStatus, address: str, reason: str) -> None:
        """A connection or a request of ``address`` is refused before it is read."""
        self.refusals[status.value] += 1
        self._last_refusal = (address, reason)

    def may_explain(self) -> bool:
        """Whether one more refused connection is told why in this second."""
        if (second := int(time.monotonic())) != self._explained[0]:
            self._explained = second, 0
        self._explained = second, self._explained[1] + 1
        return self._explained[1] <= EXPLANATIONS_PER_SECOND

    def discard_pause(self, size: int) -> float:
        """Seconds until more may be thrown away, after ``size`` bytes were."""
        now = time.monotonic()
        self._discard_until = max(now, self._discard_until) + size / DISCARD_RATE
        return self._discard_until - now

    def discard(self, connection: LimitedHttpProtocol) -> None:
        """``connection`` is closed."""
        self._open.discard(connection)


class CountedSocket(socket.socket):
    """A connection of a client, which is counted until it is closed, handshakes included."""

    def __init__(
        self, listening: socket.socket, descriptor: int, client: str, by_client: Counter[str]
    ) -> None:
        """``descriptor`` is what the socket ``listening`` accepted."""
        super().__init__(listening.family, listening.type, listening.proto, descriptor)
        self._client, self._by_client = client, by_client
        by_client[client] += 1

    def is_half_closed(self) -> bool:
        """Whether the client sends nothing more; ``False`` where the system cannot tell."""
        if not hasattr(socket, "TCP_INFO"):
            return False
        return self.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE_WAIT

    def close(self) -> None:
        """Close it, and count it no more."""
        if self.fileno() >= 0:
            discount(self._by_client, self._client)
        super().close()


class LimitedSocket(socket.socket):
    """A listening socket that refuses what is too much before anything is made for it."""

    def __init__(
        self, connections: Connections, family: int, kind: int, protocol: int, tls: bool
    ) -> None:
        """With ``tls`` nobody is told why: before its handshake no client could read it."""
        super().__init__(family, kind, protocol)
        self._connections, self._tls, self._spent = connections, tls, 0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is not refused.

        Raises:
            BlockingIOError: where there is none now, or others have to be looked at first.
        """
        by_client = self._connections.by_client
        while self._spent < ACCEPT_BUDGET:
            self._spent += 1
            try:
                # As CPython's own accept() begins (3.11 to 3.14): a socket of the descriptor takes as
                # long to make as a refusal.
                descriptor, address = self._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                break
            client = client_key(address[0])
            most = self._connections.limits.connections_per_address
            if by_client[client] >= most or self._connections.pace.is_spent(client):
                self._refuse(descriptor, address[0], TOO_MANY, explain=not self._tls)
            elif by_client.total() >= self._connections.limits.connections:
                self._refuse(descriptor, address[0], TOO_MANY_IN_ALL, explain=False)
            else:
                self._spent += ACCEPT_COST - 1
                made = CountedSocket(self, descriptor, client, by_client)
                if made.is_half_closed():
                    # Most have left, and cost as much as others until that is noticed.
                    self._connections.pace.charge_refusal(client)
                return made, address
        self._spent = 0
        raise BlockingIOError

    def _refuse(self, descriptor: int, address: str, reason: str, explain: bool) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        self._connections.count_refusal(status, address, reason)
        with suppress(OSError):
            # It blocks, and has an empty buffer that takes this at once.
            if explain and self._connections.may_explain():
                os.write(descriptor, _refusal(status, reason))
        os.close(descriptor)


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection, with the limits of its server."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections, self._limits = connections, connections.limits
        self._head_since: float | None = None
        """When the head that is being read began; ``None`` outside of heads."""
        self._idle_since = self.loop.time()
        """Since when no request is asked or answered."""
        self._discard_since: float | None = None
        """Since when what comes is thrown away: the answer is sent, and the connection ends."""
        self._discarded = 0
        self._last_answer = False
        """Whether the answer that is sent is the last of this connection."""
        self._shutting_down = False
        """Whether the server ends."""
        self._upgrade = False
        """Whether the last request offered another protocol: what follows it cannot be told apart."""
        self._closing_since: float | None = None
        self._unparsed = 0
        """Bytes that the parser was fed since it gave anything back: it holds them."""
        self._head_size = self._head_lines = 0
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._unsent, self._unsent_since = 0, 0.0

    def connection_lost(self, exc: Exception | None) -> None:
        """Its times are not looked at any more."""
        super().connection_lost(exc)
        self._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the connection is at its end."""
        if self._upgrade:
            return
        if self._discard_since is not None or self.transport.is_closing():
            self._discarded += len(data)
            self.flow.pause_reading()
            if self._discarded <= DISCARDED:
                self.loop.call_later(self._connections.discard_pause(len(data)), self._read_rest)
            return
        self._unparsed += len(data)
        super().data_received(data)
        # A name or value without end, a trailer or a chunk's extension: no callback tells of them.
        if self._unparsed > self._limits.header_bytes and self._discard_since is None:
            text = f"The headers of a request have {self._limits.header_bytes:,} bytes at most."
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_since = self.loop.time()
        self._head_size = self._head_lines = self._unparsed = 0

    def on_url(self, url: bytes) -> None:
        """A part of the URL, which may come in several."""
        super().on_url(url)
        self._unparsed = 0
        if len(self.url) > self._limits.url_bytes:
            text = f"The URL of a request has {self._limits.url_bytes:,} bytes at most."
            self._stop_parsing(HTTPStatus.REQUEST_URI_TOO_LONG, text)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or, behind a chunked body, a trailer: both are kept by uvicorn."""
        self._unparsed = 0
        size = len(name) + len(value) + 4
        self._head_size += size
        self._head_lines += 1
        limits = self._limits
        for number, limit, what in (
            (self._head_lines, limits.header_count, "The headers of a request are {:,} at most."),
            (size, limits.header_line_bytes, "A header has {:,} bytes at most."),
            (self._head_size, limits.header_bytes, "All headers together have {:,} bytes at most."),
        ):
            if number > limit:
                text = what.format(limit)
                self._stop_parsing(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: its request begins, or waits for those before it."""
        self._head_since = None
        if self.parser.should_upgrade():
            # To the parser, whatever follows such a head is of the other protocol, its body as well.
            if any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
                text = "A request with a body cannot offer an upgrade. Send it without `Upgrade`."
                self._stop_parsing(HTTPStatus.NOT_IMPLEMENTED, text)
            self._upgrade = True
        super().on_headers_complete()
        if self._upgrade:
            self.cycle.keep_alive = False
        if len(self.pipeline) > PIPELINED:
            text = f"On one connection {PIPELINED} requests at most may wait for their answers."
            self._stop_parsing(HTTPStatus.TOO_MANY_REQUESTS, text)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """An answer is sent; where its request was not whole, the connection ends after it."""
        if self._last_answer:
            self.pipeline.clear()
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self._head_since is not None:
            # Of a request that was sent ahead: while its turn had not come, nothing was read of it.
            self._head_since = self._idle_since
        if self._last_answer:
            # To close at once could take the answer away from a client that is still sending.
            self._discard_since = self._idle_since
            self._write_eof()
            self._unset_keepalive_if_required()
            self.flow.pause_reading()
            self.loop.call_later(DISCARD_PAUSE, self._read_rest)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser stopped at; uvicorn calls this for any of its errors."""
        status, text = self._refusal or (HTTPStatus.BAD_REQUEST, msg)
        self._refuse(status, text)

    def close_if_overdue(self) -> None:
        """End the connection where one of its times is over."""
        if self.transport is None:  # its TLS handshake has a limit of its own
            return
        now, limits = self.loop.time(), self._limits
        if (unsent := self.transport.get_write_buffer_size()) != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        if self.transport.is_closing() and self._closing_since is None:
            self._closing_since = now
        answering = self.cycle is not None and not self.cycle.response_complete
        if (unsent and now - self._unsent_since > limits.idle_seconds) or (
            self._closing_since is not None and now - self._closing_since > limits.idle_seconds
        ):
            self.transport.abort()
        elif self._discard_since is not None:
            if now - self._discard_since > limits.linger_seconds:
                self.transport.close()
        elif answering:
            pass  # reading a body has limits of its own, and what is sent ahead has to wait
        elif self._head_since is not None:
            if now - self._head_since > limits.head_seconds:
                text = (
                    f"The headers of a request have to come within {limits.head_seconds:g} seconds."
                )
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, text)
        elif now - self._idle_since > limits.idle_seconds:
            self.transport.close()

    def shutdown(self) -> None:
        """The server ends: no answer is waited for any more than it takes to send it."""
        self._shutting_down = True
        if self._discard_since is not None:
            self.transport.close()
        super().shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin a request, whose answer says so where the connection ends with it."""

        async def close_unread(scope: Any, receive: Receive, send: Send) -> None:
            async def send_and_close(message: MutableMapping[str, Any]) -> None:
                if message["type"] != "http.response.start" or not cycle.more_body:
                    await send(message)
                    return
                # Part of the body is still to come. A client that keeps connections would send its
                # next request behind it, where nobody reads any more.
                self._last_answer = True
                headers = [*message.get("headers", []), (b"connection", b"close")]
                await send({**message, "headers": headers})
                if not self._shutting_down:
                    cycle.keep_alive = True  # uvicorn would close before the client has the answer

            await app(scope, receive, send_and_close)

        super()._start_asgi_task(cycle, close_unread)  # type: ignore[arg-type]

    def _read_rest(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _stop_parsing(self, status: HTTPStatus, text: str) -> None:
        self._refusal = (status, text)
        # The parser ends, and uvicorn asks for the answer to what it takes for a bad request.
        raise ValueError(text)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Answer before any face is known, in a body that clients of each of them can read."""
        self._head_since, self._discard_since = None, self.loop.time()
        self._connections.count_refusal(status, self.client[0] if self.client else "", text)
        self.flow.resume_reading()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer before it is on its way, and nothing can stand between. The end comes after
            # linger_seconds: who would do this again at once is kept waiting.
            self.pipeline.clear()
            self.flow.pause_reading()
            return
        self.transport.write(_refusal(status, text))
        self._write_eof()

    def _write_eof(self) -> None:
        """Tell clients that read to the end of a connection that this is it; TLS cannot."""
        if self.transport.can_write_eof() and not self.transport.is_closing():
            with suppress(OSError):  # the client may have left
                self.transport.write_eof()


@lru_cache(maxsize=64)
def _refusal(status: HTTPStatus, text: str) -> bytes:
    """An answer that ends its connection, and says as much to clients of every face.

    Those of S3 take what is no XML for its status. It has no request id: no request was read.
    """
    kind, code, name = _ERROR_TYPES.get(status, _INVALID)
    error = {"message": text, "type": kind, "param": None, "code": code}
    body = json.dumps({"message": text, "error": error}).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"x-amzn-errortype: {name}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_INVALID = "invalid_request_error", None, "ValidationException"
_ERROR_TYPES = {
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "server_error", "service_unavailable", "ServiceUnavailableException",
    ),
    HTTPStatus.TOO_MANY_REQUESTS: ("requests", "rate_limit_exceeded", "ThrottlingException"),
}  # fmt: skip
"""Type and code of errors as OpenAI's face names them, and Bedrock's name."""


@lru_cache(maxsize=4096)
def client_key(address: str) -> str:
    """What counts as one client of those nobody knows: an IPv4 address, or the /64 of an IPv6 one.

    Whoever has one address of IPv6 has all 2^64 of its network.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed.packed[:8] + bytes(8), 64)))
    return address


def raise_open_files(connections: int) -> int:
    """Let the process open the files that ``connections`` need.

    Returns:
        How many connections there is room for: fewer where the hard limit of the process is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else soft
    return min(connections, max(1, room - OTHER_FILES))
