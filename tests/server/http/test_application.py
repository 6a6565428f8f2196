"""The application over real sockets: authentication, reading of bodies, and disconnects."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
from echo_service import Server
from served import served

from luthier.errors import ReadOnlyDisk, RefusedInput
from luthier.server.http.messages import Caller, Fault, Request, Response
from luthier.server.tables.database import now

HEAD = b"POST /x/take%s HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with served(made.app) as address:
        made.address = address
        yield made


def test_api_receives_raw_path_and_decoded_query(server: Server) -> None:
    status, body = server.ask("POST", "/model/arn%3Aaws%2Fx/echo?a=1%202&a=3&b=", b"hello")
    assert status == 200
    assert body["path"] == "/model/arn%3Aaws%2Fx/echo"
    assert body["query"] == {"a": ["1 2", "3"], "b": [""]}
    assert (body["body"], body["user"]) == ("hello", "anna")


@pytest.mark.parametrize("path", ["/x/echo", "/v1/echo", "/openai/v1/echo", "/api/v1/echo"])
def test_every_api_requires_key(server: Server, path: str) -> None:
    assert server.ask("POST", path, b"{}")[0] == 200
    assert server.admitted == ["anna"]
    for key in (None, "Bearer bad", "good"):
        status, body = server.ask("POST", path, b"{}", key=key)
        assert (status, body["code"]) == (400, "UnrecognizedClient")
    assert server.admitted == ["anna"]


def test_unknown_path_is_reported_after_authentication(server: Server) -> None:
    assert server.ask("GET", "/nowhere")[1]["code"] == "UnknownOperation"
    assert server.ask("GET", "/nowhere", key=None)[1]["code"] == "UnrecognizedClient"


def test_unknown_path_with_body_is_unknown_operation(server: Server) -> None:
    assert server.ask("POST", "/v1/moderations", b"a" * 5000)[1]["code"] == "UnknownOperation"


def test_signature_needs_body_but_key_is_checked_first(server: Server) -> None:
    server.ask("POST", "/x/echo", b"abc", key="AWS4-HMAC-SHA256 Credential=A/20260101/r/bedrock/x")
    assert server.ask("POST", "/x/large", b"a" * 3_000_000)[0] == 200
    assert server.ask("POST", "/x/large", b"a" * 3_000_000, key="Bearer bad")[0] == 400
    assert server.door.bodies == [b"", b"abc", b"", b""]


def test_large_body_is_not_read_for_unknown_key(server: Server) -> None:
    unknown = HEAD.replace(b"Bearer good", b"AWS4-HMAC-SHA256 Credential=B/20260101/r/bedrock/x")
    for path in (b"/x/large", b"/x/take"):
        start = unknown.replace(b"/x/take", path) % b"" + b"Content-Length: 8000000\r\n\r\n"
        assert b"UnrecognizedClient" in server.raw(start)
    # Small bodies are read with their heads. A body without length may be large.
    start = unknown % b"" + b"Transfer-Encoding: chunked\r\n\r\n"
    assert b"UnrecognizedClient" in server.raw(start)
    assert server.door.bodies == [b"", b"", b""]


def test_json_value_count_is_limited() -> None:
    def call(body: bytes) -> Request:
        caller = Caller("111111111111", "anna", ("administrator",))
        return Request("r", caller, "POST", "/", {}, {}, body, now())

    assert call(b"[" + b"1," * 90_000 + b"1]").json[-1] == 1
    assert len(call(b'["' + b"a " * 10_000 + b'"]').json[0]) == 20_000
    for body in (b"[" + b"[]," * 300_000 + b"[]]", b"[" + b'{"":0},' * 300_000 + b"1]"):
        with pytest.raises(Fault) as refused:
            _ = call(body).json
        assert refused.value.code == "RequestEntityTooLarge"


def test_oversized_body_is_rejected_before_reading(server: Server) -> None:
    status, body = server.ask("POST", "/x/echo", b"a" * 1001)
    assert (status, body["code"]) == (400, "RequestEntityTooLarge")
    chunked = b"POST /x/echo HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n"
    chunked += b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 1024 + b"\r\n"
    assert b"RequestEntityTooLarge" in server.raw(chunked + b"0\r\n\r\n")


def test_body_is_streamed_to_handler(server: Server) -> None:
    parts, taking = urlsplit(server.address), server.echo.taking
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(HEAD % b"" + b"Content-Length: 3000000\r\n\r\n" + b"a" * 2_000_000)
        assert taking.first.wait(5)
        assert not taking.closed.is_set()
        connection.sendall(b"a" * 1_000_000)
        found = b""
        while b"3000000" not in found:
            found += connection.recv(4096)
    assert taking.closed.wait(5)
    assert sum(taking.pieces) == 3_000_000 and max(taking.pieces) < 2_000_000
    assert server.door.bodies == [b""]
    assert server.trail.lines == [("ok", "test:Take", "/x/take", "anna")]


@pytest.mark.parametrize("body", [b"abc", b""])
def test_signed_body_is_verified_before_handler(server: Server, body: bytes) -> None:
    key = "AWS4-HMAC-SHA256 Credential=A/20260101/r/bedrock/x"
    assert server.ask("POST", "/x/take", body, key=key) == (200, len(body))
    assert server.door.bodies == [b"", body] and server.admitted == ["anna"]


def test_streamed_body_is_limited(server: Server) -> None:
    assert server.ask("POST", "/x/take", b"a" * 8_000_001)[1]["code"] == "RequestEntityTooLarge"
    chunk = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
    found = server.raw(
        HEAD % b"" + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 9 + b"0\r\n\r\n"
    )
    assert b"RequestEntityTooLarge" in found
    taking = server.echo.taking
    assert sum(taking.pieces) < 8_000_000 and taking.closed.is_set()


def test_forbidden_upload_is_rejected_before_reading_body(server: Server) -> None:
    found = server.raw(HEAD % b"?deny" + b"Content-Length: 3000000\r\nExpect: 100-continue\r\n\r\n")
    assert b"AccessDenied" in found and server.echo.taking.pieces == []
    assert b"100 Continue" not in found and b"connection: close" in found.lower()
    assert {line[:2] for line in server.trail.lines} == {("AccessDenied", "test:Take")}


def test_disconnect_during_upload_closes_body(server: Server) -> None:
    parts, taking = urlsplit(server.address), server.echo.taking
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(HEAD % b"" + b"Content-Length: 3000000\r\n\r\n" + b"a" * 2_000_000)
        assert taking.first.wait(5)
    assert taking.closed.wait(5)


def test_internal_error_details_only_in_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    status, body = server.ask("GET", "/x/fail")
    assert (status, body["code"]) == (400, "InternalServer")
    assert "hunter2" not in json.dumps(body) and body["id"] in body["message"]
    assert "hunter2" in caplog.text


def test_stream_is_sent_incrementally_and_ends_on_disconnect(server: Server) -> None:
    parts = urlsplit(server.address)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
    connection.sendall(b"GET /x/stream HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n\r\n")
    found = b""
    while b"\n3\n" not in found.replace(b"\r\n", b"\n"):
        found += connection.recv(4096)
    assert server.echo.sent < 100
    connection.close()
    assert server.echo.closed.wait(1.0)
    assert server.echo.sent < 200


def test_disconnect_wakes_stream_waiting_for_next_chunk(server: Server) -> None:
    parts = urlsplit(server.address)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
    connection.sendall(b"GET /x/wait HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n\r\n")
    assert b"200" in connection.recv(4096)
    assert not server.echo.waiting.closed.is_set()
    connection.close()
    assert server.echo.waiting.closed.wait(1.0)


def test_shutdown_answers_waiting_request_with_503() -> None:
    begun, done = threading.Event(), threading.Event()

    def work(request: Request) -> Response:
        begun.set()
        done.wait(30)
        return Response.json({})

    made = Server()
    made.echo.fail = work  # type: ignore[method-assign]
    sent: list[Any] = []

    async def asked() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/fail", "raw_path": b"/v1/fail",
            "query_string": b"", "headers": [(b"authorization", b"Bearer good")],
            "client": ("127.0.0.1", 1),
        }  # fmt: skip
        task = asyncio.create_task(made.app(scope, receive, send))
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        await task

    try:
        asyncio.run(asked())
    finally:
        done.set()
    body = json.loads(sent[1]["body"])
    assert body["code"] == "ServiceUnavailable"


def test_health_is_public_and_metrics_omit_client_paths(server: Server) -> None:
    assert server.ask("GET", "/healthz", key=None) == (200, {"status": "ok"})
    assert server.ask("GET", "/readyz", key=None) == (200, {"status": "ok"})
    server.missing = "the database cannot be reached"
    assert server.ask("GET", "/readyz", key=None) == (503, {"status": server.missing})
    server.ask("GET", "/secret-path-of-a-client")
    server.ask("GET", "/x/full")
    text = server.ask("GET", "/metrics", key=None)[1]
    assert 'luthier_jobs{kind="Queued"} 3.0' in text and "luthier_free 1.0" in text
    assert 'operation="test.full",status="400"' in text
    assert "secret-path" not in text


def fields_of(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]


def test_request_log_line_omits_secrets(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="luthier.server"):
        server.ask("POST", "/x/echo?token=s3cret", b"body-text")
        deadline = time.monotonic() + 5
        # The server writes the line after sending the response.
        while not (lines := fields_of(caplog)) and time.monotonic() < deadline:
            time.sleep(0.01)
    (line,) = lines
    assert line["operation"] == "test.echo" and line["user"] == "anna" and line["status"] == 200
    assert "s3cret" not in str(line) and "good" not in str(line) and "body-text" not in str(line)


def test_audit_log_records_changes_and_denied_requests(server: Server) -> None:
    server.ask("POST", "/x%2Fy/echo")
    server.ask("POST", "/x/deny")
    server.ask("POST", "/x/full")
    assert server.trail.lines == [
        ("ok", "test:Echo", "/x%2Fy/echo", "anna"),
        ("AccessDenied", "test:Deny", "*", "anna"),
    ]


def test_partially_failed_change_is_in_audit_log(server: Server) -> None:
    errors = {
        "InternalServer": RuntimeError("committed, and then this"),
        "ServiceUnavailable": ReadOnlyDisk("no writes"),
        "Validation": RefusedInput("wrong"),
    }
    for code, error in errors.items():
        server.echo.error = error
        assert server.ask("POST", "/x/half")[1]["code"] == code
    assert server.trail.lines == [
        (code, f"test:{part}", "/x/half", "anna")
        for code, parts in (
            ("InternalServer", ("First", "Second")),
            ("ServiceUnavailable", ("First", "Second")),
            ("Validation", ("Second",)),
        )
        for part in parts
    ]


SMUGGLED = {
    "two lengths": b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nhello",
    "length and chunks": b"Content-Length: 50\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "odd coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "space before the colon": b"Content-Length : 5\r\n\r\nhello",
    "bare line feed in a name": b"X\nA: b\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_ambiguous_request_is_not_split(server: Server, name: str) -> None:
    first = b"POST /x/echo HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n" + SMUGGLED[name]
    second = b"GET /smuggled/echo HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer good\r\n\r\n"
    found = server.raw(first + second)
    assert b"/smuggled/echo" not in found or found.count(b"HTTP/1.1 200") < 2


@pytest.mark.parametrize(
    "head", [b"Host: a\r\nContent-Length: 5\r\nContent-Length: 50\r\n", b"", b"Host: a\r\nHost: b\r\n"],
    ids=["two lengths", "no host", "two hosts"],
)  # fmt: skip
def test_malformed_http_has_request_id_in_response_and_log(
    server: Server, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    top, _, body = server.raw(b"POST /x/echo HTTP/1.1\r\n" + head + b"\r\n").partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    (logged,) = {getattr(each, "request_id", None) for each in caplog.records} - {None}
    assert f"x-request-id: {logged}".encode() in top.lower()


def test_signed_s3_request_is_routed_to_object_storage(server: Server) -> None:
    key = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request, x"
    status, text = server.ask("GET", "/bucket/key", key=key)
    assert (status, text) == (403, "<Error/>")
    assert server.door.bodies == [None]


def test_concurrent_requests_succeed(server: Server) -> None:
    found: list[int] = []
    ask = partial(server.ask, "POST", "/x/echo", b"x")
    threads = [threading.Thread(target=lambda: found.append(ask()[0])) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 50


@pytest.mark.slow
def test_responses_have_request_id_and_throttling_has_retry_after(
    server: Server,
) -> None:
    for name in (b"echo", b"full"):
        found = server.raw(HEAD.replace(b"POST /x/take", b"POST /x/" + name) % b"" + b"\r\n")
        assert b"\r\nx-echo-id: " in found
        assert (b"\r\nretry-after: 1\r\n" in found) == (name == b"full")


def test_head_above_64_kib_is_rejected(server: Server) -> None:
    large = HEAD.replace(b"/take", b"/echo") % b"" + b"X-Long: " + b"a" * 70_000
    assert b"RequestEntityTooLarge" in server.raw(large + b"\r\n\r\n")
    # This head has no end.
    assert b" 200 " not in server.raw(large * 10)
    assert server.door.bodies == []
