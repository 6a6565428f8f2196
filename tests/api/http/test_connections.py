"""Connections over real sockets: heads and bodies too large or too slow, and too many at once."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3
from echo_service import Server
from served import served

from luthier.api.http.connections import (
    DISCARDED,
    PIPELINED,
    Connections,
    client_key,
    raise_open_files,
)
from luthier.limits import ServerLimits

LIMITS = ServerLimits(
    head_seconds=1, idle_seconds=2, linger_seconds=0.5, connections=40, connections_per_address=30,
    body_rate=100_000,
)  # fmt: skip
HEAD = b"GET /x/echo HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(LIMITS)
    with served(made.app, LIMITS) as address:
        made.address = address
        yield made


def connect(server: Server) -> socket.socket:
    parts = urlsplit(server.address)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def flood(server: Server, start: bytes, piece: bytes, most: int) -> tuple[bytes, int]:
    """Send ``piece`` until the server answers or ends; its answer, and how much was sent."""
    sent = 0
    with connect(server) as connection:
        connection.setblocking(True)
        connection.settimeout(0.2)
        answer = b""
        try:
            connection.sendall(start)
            while sent < most:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        connection.settimeout(5)
        with suppress(TimeoutError):
            answer = read_all(connection)
    return answer, sent


@pytest.mark.parametrize(
    ("start", "piece", "status"),
    [
        (HEAD + b"X-Long: ", b"a" * 65536, 431),
        (HEAD, b"a" * 65536, 431),
        (HEAD, b"X-A: b\r\n" * 1000, 431),
        (HEAD, b"".join(b"X-%d: %s\r\n" % (n, b"b" * 4000) for n in range(20)), 431),
        (b"GET /healthz?", b"a" * 65536, 414),
        (b"GET /", b"%20" * 20000, 414),
    ],
)  # fmt: skip
def test_a_head_without_end_is_refused(
    server: Server, start: bytes, piece: bytes, status: int
) -> None:
    answer, _ = flood(server, start, piece, 4_000_000)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
    assert b'"message"' in answer and b"at most" in answer
    assert server.ask("GET", "/healthz")[0] == 200
    assert not server.door.bodies  # nobody was asked who it is


def test_a_head_within_its_limits_is_read(server: Server) -> None:
    head = HEAD + b"X-Long: " + b"a" * 16_000 + b"\r\n"
    head += b"".join(b"X-%d: b\r\n" % number for number in range(90)) + b"Connection: close\r\n\r\n"
    assert server.raw(head).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/x/take?deny", "/x/take"])
def test_a_client_that_keeps_connections_is_told_where_one_ends(path: str) -> None:
    limits = LIMITS.model_copy(update={"linger_seconds": 20, "body_rate": 1})
    server = Server(limits)
    with served(server.app, limits) as address:
        _send_refused_bodies(address, path)


def _send_refused_bodies(address: str, path: str) -> None:
    parts = urlsplit(address)
    pool = urllib3.HTTPConnectionPool(parts.hostname or "", parts.port, maxsize=1, retries=False)
    headers = {"Authorization": "Bearer good"}
    for size in (3_000_000, 9_000_000):  # the second is more than is taken here
        answer = pool.request("POST", path, body=b"a" * size, headers=headers, timeout=10)
        unread = "deny" in path or size == 9_000_000
        assert (answer.status >= 400) == unread
        assert (answer.headers.get("connection") == "close") == unread
        began = time.monotonic()
        assert pool.request("GET", "/healthz", timeout=10).status == 200
        assert time.monotonic() - began < 10  # and not after linger_seconds


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /x/take?deny HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n"
        b"Content-Length: 3000000\r\n\r\n",
    ],
)
def test_a_refused_client_that_reads_to_the_end_is_not_kept_waiting(request_bytes: bytes) -> None:
    limits = LIMITS.model_copy(update={"linger_seconds": 20})
    server = Server(limits)
    with served(server.app, limits) as address:
        parts = urlsplit(address)
        with socket.create_connection(
            (parts.hostname or "", parts.port or 0), timeout=10
        ) as client:
            client.sendall(request_bytes)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 4")
            with suppress(OSError):
                client.sendall(b"a" * 100_000)  # what is still on its way does harm to nobody


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", [b"h2c", b"websocket"])
def test_no_request_is_read_out_of_the_body_of_an_upgrade(
    server: Server, kind: bytes, apart: bool
) -> None:
    body = HEAD + b"\r\n"
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n" % kind
    head = HEAD + upgrade + b"Content-Length: %d\r\n\r\n" % len(body)
    with connect(server) as connection:
        connection.sendall(head)
        if apart:
            time.sleep(0.2)
        with suppress(OSError):
            connection.sendall(body)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 501 ") and found.count(b"HTTP/1.1 ") == 1
    with connect(server) as connection:
        connection.sendall(HEAD + upgrade + b"\r\n" + (b"" if apart else body))
        time.sleep(0.2)
        with suppress(OSError):
            connection.sendall(body)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in found.lower()


def test_what_is_sent_behind_an_unread_body_is_never_answered(server: Server) -> None:
    head = HEAD.replace(b"GET /x/echo", b"POST /x/take?deny") + b"Content-Length: 3000000\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(head)
        found = b""
        while b"AccessDenied" not in found:  # head and body may come apart
            piece = connection.recv(65536)
            assert piece
            found += piece
        with suppress(OSError):
            connection.sendall(b"a" * 3_000_000 + b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_all(connection) == b""


def test_refusals_are_counted_and_logged_now_and_then(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        flood(server, b"GET /healthz?", b"a" * 65536, 4_000_000)
    deadline, lines = time.monotonic() + 10, list[logging.LogRecord]()
    while not lines and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = [r for r in caplog.records if r.message.startswith("refused before")]
    assert len(lines) == 1
    fields = lines[0].fields  # type: ignore[attr-defined]
    assert fields["last_address"] == "127.0.0.1" and "URL" in fields["last_reason"]
    assert set(fields["refused_by_status"]) == {"414"}


def test_trailers_and_chunk_extensions_have_the_limits_of_heads(server: Server) -> None:
    start = HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n"
    for piece in (b"0\r\nX-Trailer: " + b"a" * 100_000, b"1;x=" + b"a" * 100_000):
        answer, _ = flood(server, start, piece, 4_000_000)
        # The request is being answered: nothing but its end can be told.
        assert b" 200 " not in answer
    assert server.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /healthz HT", HEAD])
def test_half_a_head_and_silence_end(server: Server, start: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(start)
        began = time.monotonic()
        answer = read_all(connection)
        seconds = time.monotonic() - began
    if start.strip():
        assert answer.startswith(b"HTTP/1.1 408 ") and seconds < 4
    else:
        assert answer == b"" and 1.5 < seconds < 5


def test_a_head_that_drips_ends_too(server: Server) -> None:
    with connect(server) as connection:
        began = time.monotonic()
        try:
            for byte in HEAD * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
                if time.monotonic() - began > 8:
                    break
        except OSError:
            pass
        assert time.monotonic() - began < 5


def test_a_connection_that_is_kept_open_is_answered_again_and_ends_when_idle(
    server: Server,
) -> None:
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"\r\n")
            found = b""
            while b"anna" not in found:
                found += connection.recv(65536)
            assert b"200 OK" in found
            time.sleep(0.5)
        began = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - began < 4


def test_a_body_that_drips_is_answered_and_its_place_is_free(server: Server) -> None:
    start = HEAD.replace(b"GET /x/echo", b"POST /x/take") + b"Content-Length: 3000000\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(start)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 8:
                connection.sendall(b"a" * 100)
                time.sleep(0.1)
        except OSError:
            pass
        assert time.monotonic() - began < 6
        assert b"RequestTimeout" in read_all(connection)


def test_an_answer_that_nobody_reads_is_given_up(server: Server) -> None:
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD.replace(b"/x/echo", b"/x/pour") + b"\r\n")
        assert server.echo.closed.wait(15)
        assert server.echo.sent < 1000


def test_more_connections_than_allowed_are_refused_and_the_others_go_on(server: Server) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(connect(server))
        for _ in range(LIMITS.connections_per_address - 1):
            stack.enter_context(connect(server))
        time.sleep(0.2)
        refused = [stack.enter_context(connect(server)) for _ in range(5)]
        answers = [read_all(connection) for connection in refused]
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers), answers
        for _ in range(10):  # in all
            stack.enter_context(connect(server))
        first.sendall(HEAD + b"\r\n")
        assert b"200 OK" in first.recv(65536)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if server.ask("GET", "/healthz")[0] == 200:
                break
        except OSError:
            time.sleep(0.1)
    assert server.ask("GET", "/healthz")[0] == 200


def test_clients_that_left_before_they_were_let_in_slow_their_address() -> None:
    connections = Connections(ServerLimits(requests_per_second_per_address=2))
    (listening,) = connections.listen("127.0.0.1", 0, tls=False)
    with listening:
        listening.listen()
        for gone in (False, True):
            with socket.create_connection(listening.getsockname()) as client:
                if gone:
                    client.shutdown(socket.SHUT_WR)
                accepted, _ = listening.accept()
                accepted.close()
            assert (connections.pace.delay("127.0.0.1") > 0) == gone


@pytest.mark.parametrize("tls", [False, True])
def test_connections_are_counted_from_before_their_handshake(tls: bool) -> None:
    limits = ServerLimits(connections=3, connections_per_address=2)
    connections = Connections(limits)
    (listening,) = connections.listen("127.0.0.1", 0, tls)
    with ExitStack() as stack:
        stack.enter_context(listening)
        listening.setblocking(False)
        listening.listen()
        port = listening.getsockname()[1]
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(3)
        ]
        accepted = [stack.enter_context(listening.accept()[0]) for _ in range(2)]
        with pytest.raises(BlockingIOError):
            listening.accept()
        said = clients[2].recv(4096)
        assert said == b"" if tls else said.startswith(b"HTTP/1.1 503 ")
        assert (connections.by_client["127.0.0.1"], connections.refusals[503]) == (2, 1)
        accepted[0].close()
        accepted[0].close()
        assert connections.by_client["127.0.0.1"] == 1
        for number in (2, 3):
            address = (f"127.0.0.{number}", 0)
            clients.append(socket.create_connection(("127.0.0.1", port), 5, address))
            stack.enter_context(clients[-1])
            accepted.append(stack.enter_context(listening.accept()[0]))
        stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
        with pytest.raises(BlockingIOError):  # in all
            listening.accept()


def test_requests_that_are_sent_ahead_are_few(server: Server) -> None:
    ahead = b"GET /x/stream HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n\r\n"
    answer, _ = flood(server, b"", ahead * (PIPELINED + 5), len(ahead))
    assert len(re.findall(rb"HTTP/1.1 200", answer)) <= 1
    assert server.ask("GET", "/healthz")[0] == 200


def test_half_a_head_behind_a_request_at_work_waits_for_its_answer(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD.replace(b"/x/echo", b"/x/nap") + b"\r\n" + HEAD)
        found = b""
        while b"rested" not in found:
            piece = connection.recv(65536)
            assert piece, found
            found += piece
        connection.sendall(b"\r\n")
        while b"anna" not in found:
            piece = connection.recv(65536)
            assert piece, found
            found += piece
    assert found.count(b"200 OK") == 2


def test_a_slow_server_is_no_slow_client(server: Server) -> None:
    start = HEAD.replace(b"GET /x/echo", b"POST /x/take") + b"Content-Length: 3000000\r\n\r\n"
    server.echo.taking.seconds = 0.6  # a piece: longer in all than a body may take to come
    with connect(server) as connection:
        connection.sendall(start + b"a" * 3_000_000)
        assert b"200 OK" in connection.recv(65536)


def test_what_is_sent_behind_an_answer_is_thrown_away_and_ends(server: Server) -> None:
    start = HEAD.replace(b"GET", b"POST") + b"Content-Length: 900000000\r\n\r\n"
    began = time.monotonic()
    _, sent = flood(server, start, b"a" * 65536, 900_000_000)
    assert time.monotonic() - began < 10 and sent < 3 * DISCARDED


def test_one_client_is_an_address_or_a_network_of_ipv6() -> None:
    assert client_key("10.0.0.1") == client_key("::ffff:10.0.0.1") == "10.0.0.1"
    assert client_key("2001:db8::1") == client_key("2001:db8::ffff:2") != client_key("2001:db9::1")
    assert client_key("") == "" and client_key("unix") == "unix"


def test_the_process_may_open_what_its_connections_need(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 2000))
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: calls.append(limits))
    assert raise_open_files(1000) == 1000 and calls == [(1512, 2000)]
    assert raise_open_files(10_000) == 1488 and calls[-1] == (2000, 2000)
