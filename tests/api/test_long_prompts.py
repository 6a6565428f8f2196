"""Prompts of megabytes on every operation that reads one: refused at once, for all others nothing."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from luthier_server import BASE, ENCODER, KEYS, ONE, OTHER, Served, add_base, home_with_tiny
from resident_memory import Growth, resident

pytestmark = pytest.mark.slow

DIGITS = "0123456789" * 1_200_000
TURNS = [{"role": "user", "content": [{"text": DIGITS}]}]
CHAT = [{"role": "user", "content": DIGITS}]
WORDS = "Input is too long for requested model. Its context is"
GROWTH, LEFT = 400 << 20, 100 << 20


def of_invoke(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": {"invokeModel": {"body": base64.b64encode(json.dumps(body).encode()).decode()}}
    }


OPENAI: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"messages": CHAT}, "messages"),
    "completions": ("/v1/completions", {"prompt": DIGITS}, "prompt"),
    "ids": ("/v1/completions", {"prompt": [7] * 400_000, "echo": True}, "prompt"),
    "responses": ("/v1/responses", {"input": DIGITS}, "input"),
    "embeddings": ("/v1/embeddings", {"model": ENCODER, "input": ["a", DIGITS]},
                   "input"),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 10_000},
                 "messages"),
    "tools": ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": f"f{n}", "description": DIGITS[:80_000]}}
                  for n in range(128)],
    }, "messages"),
}  # fmt: skip
BEDROCK: dict[str, tuple[str, dict[str, Any]]] = {
    "Converse": ("converse", {"messages": TURNS}),
    "ConverseStream": ("converse-stream", {"messages": TURNS}),
    "InvokeModel": ("invoke", {"prompt": DIGITS}),
    "InvokeModel, messages": ("invoke", {"messages": CHAT}),
    "InvokeModel, embedding": ("invoke", {"inputText": DIGITS}),
    "InvokeModelWithResponseStream": ("invoke-with-response-stream", {"prompt": DIGITS}),
    "CountTokens": ("count-tokens", {"input": {"converse": {"messages": TURNS}}}),
    "CountTokens, InvokeModel": ("count-tokens", of_invoke({"prompt": DIGITS})),
}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Iterator[Served]:
    home = home_with_tiny(tmp_path_factory.mktemp("long"), tiny_model_folder)
    add_base(home, "encoder", "encoder", family_folder("bert"))
    made = Served(home, forked=False)
    made.start("--no-workers")
    for account in KEYS:
        assert said(made, account) == 200
    assert made.ask("POST", "/v1/embeddings", {"model": ENCODER, "input": "a"})[0] == 200
    yield made
    made.end()


def said(server: Served, account: str) -> int:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": BASE, "messages": messages, "max_tokens": 4}
    return int(server.ask("POST", "/v1/chat/completions", body, account)[0])


class Neighbour:
    """Another account that chats."""

    def __init__(self, server: Served) -> None:
        self.server, self.slowest, self.answers = server, 0.0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._chat)

    def _chat(self) -> None:
        while not self._done.is_set():
            began = time.monotonic()
            assert said(self.server, OTHER) == 200
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.answers += 1

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._done.set()
        self._thread.join()


def test_every_operation_refuses_them_in_its_own_words(server: Served) -> None:
    slowest: dict[str, float] = {}
    with Growth(server) as growth, Neighbour(server) as neighbour:
        for name, (path, body, member) in OPENAI.items():
            began = time.monotonic()
            status, answer = server.ask("POST", path, {"model": BASE, **body})
            slowest[name] = time.monotonic() - began
            error = answer["error"]
            assert (status, error["code"]) == (400, "context_length_exceeded"), (name, error)
            assert error["message"].startswith(WORDS) and error["param"] == member, name
        for name, (operation, body) in BEDROCK.items():
            began = time.monotonic()
            model = ENCODER if "inputText" in body else BASE
            status, answer = server.ask("POST", f"/model/{model}/{operation}", body)
            slowest[name] = time.monotonic() - began
            assert status == 400 and answer["message"].startswith(WORDS), name
    # 13 to 70 s each before; most of this is the client's own work, beside others'.
    assert max(slowest.values()) < 6, slowest
    assert neighbour.answers > len(slowest) and neighbour.slowest < 6
    assert growth.most < GROWTH
    assert growth.comes_back(LEFT)


def test_many_at_once_take_turns(server: Served) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": DIGITS[:900_000]}]}
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(server.ask("POST", "/v1/chat/completions", body)[0])

    threads = [threading.Thread(target=ask) for _ in range(36)]
    with Growth(server) as growth, Neighbour(server) as neighbour:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [400] * 36
    assert neighbour.slowest < 6 and growth.most < GROWTH
    assert growth.comes_back(LEFT)
    status, text = server.ask("GET", "/metrics")
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200
    assert float(metrics['luthier_memory_bytes{kind="resident"}']) == pytest.approx(
        resident(server), rel=0.1
    )
    assert float(metrics['luthier_memory_bytes{kind="keys_and_values"}']) == 0
    assert float(metrics['luthier_memory_bytes{kind="models"}']) > 0


def test_texts_up_to_the_context_are_answered(server: Served) -> None:
    assert ONE != OTHER
    text = "fox " * 200
    status, body = server.ask("POST", "/v1/completions", {"model": BASE, "prompt": text})
    assert status == 200 and body["usage"]["prompt_tokens"] <= 1024
    counted = {"input": {"invokeModel": of_invoke({"prompt": text})["input"]["invokeModel"]}}
    status, count = server.ask("POST", f"/model/{BASE}/count-tokens", counted)
    assert (status, count["inputTokens"]) == (200, body["usage"]["prompt_tokens"])
