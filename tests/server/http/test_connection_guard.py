"""Clients that disconnect before the response: the server stops their generation."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from served import served

from luthier.files import write_json
from luthier.inference.decoder import Decoder
from luthier.library.folders import base_folder
from luthier.models.manifest import MANIFEST
from luthier.server.http.application import Application
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.accounts import create_account
from luthier.server.tables.principals import create_api_key, create_user

N, TOKENS = 48, 900
"""A number of tokens that takes far longer than a test may."""


@pytest.fixture
def service(luthier_home: Path, tiny_model_folder: Path) -> Iterator[Service]:
    """The whole service in this process, with a tiny generative model."""
    shutil.copytree(tiny_model_folder, base_folder("tiny"))
    manifest = {"id": "tiny", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
    write_json(base_folder("tiny") / MANIFEST, manifest)
    made = Service(Settings(run_jobs=False))
    made.start()
    yield made
    made.close()


@pytest.fixture
def address(service: Service) -> Iterator[tuple[str, str]]:
    """The host and port of the service, and the key of the root user."""
    assert service.issued is not None
    with served(service.application) as url:
        yield urlsplit(url).netloc, service.issued.api_key


def decoder(service: Service) -> Decoder:
    """Return the decoder of the loaded tiny model."""
    deadline = time.monotonic() + 60
    while service.pool.loaded_ids() != ["tiny"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = service.pool._entries["tiny"].model
    assert isinstance(found, Decoder)
    return found


def until(wanted: Any, seconds: float) -> float:
    """Wait until the condition holds and return the seconds."""
    began = time.monotonic()
    while not wanted():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - began


def chat(**further: Any) -> dict[str, Any]:
    # Without its last token, the model writes as long as it may.
    message = {"role": "user", "content": "Hi"}
    return {"messages": [message], "logit_bias": {"1": -100}, "temperature": 0, **further}


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", chat(model="tiny", n=N, max_tokens=TOKENS)),
    "completions": (
        "/v1/completions",
        {"model": "tiny", "prompt": ["a"] * N, "logit_bias": {"1": -100}, "max_tokens": TOKENS},
    ),
    "invoke": (
        f"/model/{quote('luthier.tiny')}/invoke",
        chat(n=N, max_tokens=TOKENS),
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        "chat",
        pytest.param("completions", marks=pytest.mark.slow),
        pytest.param("invoke", marks=pytest.mark.slow),
    ],
)
def test_client_disconnect_stops_generation(
    service: Service, address: tuple[str, str], kind: str
) -> None:
    host, key = address
    path, asked = LONG[kind]
    warm = {**LONG["chat"][1], "n": 1, "max_tokens": 1}
    assert post(host, key, LONG["chat"][0], warm)[0] == 200
    model = decoder(service)
    until(lambda: model.idle, 5)
    body = json.dumps(asked).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    name, _, port = host.partition(":")
    with closing(socket.create_connection((name, int(port)))) as client:
        client.sendall(head.encode() + body)
        until(lambda: model._answers.total() == N, 20)
        assert service.pool.memory.reserved_bytes > 0
    assert until(lambda: model.idle, 5) < 2
    assert (model._answers.total(), service.pool.memory.reserved_bytes) == (0, 0)
    assert service.pool._entries["tiny"].uses == 0
    # Later requests succeed.
    assert post(host, key, LONG["chat"][0], warm)[0] == 200


def test_connected_clients_receive_full_responses(
    service: Service, address: tuple[str, str]
) -> None:
    host, key = address
    asked = chat(model="tiny", n=2, max_tokens=30)
    calls: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(target=lambda: calls.append(post(host, key, LONG["chat"][0], asked)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in calls] == [200] * 4
    assert all(found["usage"]["completion_tokens"] == 60 for _, found in calls)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_abandoned_streams_release_all_resources(
    service: Service, address: tuple[str, str], count: int
) -> None:
    host, key = address
    path, asked = LONG["chat"][0], chat(model="tiny", max_tokens=TOKENS)
    honest = {**asked, "max_tokens": 4}
    with service.database.write() as session:
        create_account(session, "111111111111")
        anna = create_user(session, "111111111111", "anna", role="administrator")
        other = create_api_key(session, anna)
    other_key = other[1]
    assert post(host, key, path, honest)[0] == 200
    model, application = decoder(service), service.application
    until(lambda: model.idle, 5)
    reserved, sizes = service.pool.memory.reserved_bytes, service.pool.weight_bytes()
    answers: list[tuple[int, Any]] = []
    done = threading.Event()

    def stay() -> None:
        while not done.is_set():
            answers.append(post(host, other_key, path, honest, "127.0.0.9"))

    staying = threading.Thread(target=stay)
    staying.start()
    body = json.dumps({**asked, "stream": True}).encode()
    with ThreadPoolExecutor(50) as clients:
        statuses = [*clients.map(lambda n: abandon(host, key, path, body, n), range(count))]
    during = len(answers)
    done.set()
    staying.join()
    assert statuses == [200] * count
    assert during and all(status == 200 for status, _ in answers)
    assert all(found["usage"]["completion_tokens"] == 4 for _, found in answers)
    until(lambda: model.idle, 10)
    assert isinstance(application, Application)
    slots = application._streams, application._model_slots
    until(lambda: not any(each._own for each in slots), 10)
    until(lambda: not busy_threads(), 10)
    assert (service.pool.memory.reserved_bytes, service.pool.weight_bytes()) == (reserved, sizes)
    assert (model._answers.total(), service.pool._entries["tiny"].uses) == (0, 0)
    assert post(host, key, path, honest)[0] == 200


def abandon(host: str, key: str, path: str, body: bytes, number: int) -> int:
    """Leave a stream after the first tokens, with a reset for every second stream.

    The server limits abandoned requests per address, so each request has its own address.
    Return the status.
    """
    name, _, port = host.partition(":")
    source = f"127.0.{1 + number // 250}.{1 + number % 250}", 0
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with closing(socket.create_connection((name, int(port)), 60, source)) as client:
        client.sendall(head.encode() + body)
        seen = b""
        while seen.count(b"data: ") < 1 + number % 4 and (piece := client.recv(1 << 16)):
            seen += piece
        if number % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return int(seen.split(b" ", 2)[1])


def busy_threads() -> list[str]:
    """Return the names of busy threads of the application."""
    frames = sys._current_frames()
    return [
        each.name
        for each in threading.enumerate()
        if each.name.startswith(("request", "stream"))
        and each.ident in frames
        and frames[each.ident].f_code.co_name != "_worker"
    ]


def post(
    host: str, key: str, path: str, body: dict[str, Any], source: str = "127.0.0.1"
) -> tuple[int, Any]:
    connected = http.client.HTTPConnection(host, timeout=60, source_address=(source, 0))
    with closing(connected) as connection:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
