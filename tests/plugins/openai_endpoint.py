"""An OpenAI-compatible endpoint on loopback that can be slow, return errors, or disconnect."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-very-secret-0123456789"


class Endpoint:
    """Responses of the endpoint and received requests."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Any]] = defaultdict(list)
        """Actions by prompt, one per request, then ``ok``."""
        self.answers: dict[str, str] = {}
        self.answer: Callable[[str], str] = lambda prompt: f"the answer to {prompt}"
        """Reply for prompts without an entry in :attr:`answers`."""
        self.action: Callable[[str], Any] = lambda prompt: "ok"
        """Action for prompts without an entry in :attr:`actions`."""
        self.known: set[str] | None = None
        """Accepted keys; ``None`` for any."""
        self.models: set[str] | None = None
        """Available models; ``None`` for any."""
        self.delay = 0.0
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def handler(endpoint) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                with endpoint.lock:
                    endpoint.asked[prompt] += 1
                    endpoint.bodies.append(body)
                    endpoint.keys.add(self.headers["authorization"])
                    actions = endpoint.actions[prompt]
                    action = actions.pop(0) if actions else endpoint.action(prompt)
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                time.sleep(endpoint.delay)
                with endpoint.lock:
                    endpoint.at_once -= 1
                if endpoint.known is not None and self.headers["authorization"] not in {
                    f"Bearer {key}" for key in endpoint.known
                }:
                    action = (401, {})
                elif endpoint.models is not None and body["model"] not in endpoint.models:
                    action = (404, {})
                self.act(action, endpoint.answers.get(prompt) or endpoint.answer(prompt))

            def act(self, action: Any, text: str) -> None:
                self.close_connection = True
                if callable(action):  # the action sends the response itself
                    action(self)
                    return
                if isinstance(action, float):
                    time.sleep(action)
                    action = "ok"
                if isinstance(action, bytes):
                    self.reply(200, action.decode(), {})
                    return
                if isinstance(action, tuple):
                    code, headers = action
                    self.reply(code, json.dumps({"error": {"message": f"no {KEY}"}}), headers)
                    return
                finish = action if action in ("length", "content_filter", None) else "stop"
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": finish}
                whole = json.dumps({
                    "id": "1", "object": "chat.completion", "created": 1, "model": "big",
                    "choices": [] if action == "nothing" else [choice],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
                })  # fmt: skip
                if action == "drop":  # the connection breaks before Content-Length bytes
                    self.reply(200, whole[: len(whole) // 2], {"content-length": str(len(whole))})
                elif action == "half":  # nothing was promised, and half a JSON came
                    self.reply(200, whole[: len(whole) // 2], {"content-length": None})
                else:
                    self.reply(200, whole, {})

            def reply(self, code: int, text: str, headers: dict[str, str | None]) -> None:
                data = text.encode()
                sent = {"content-type": "application/json", "content-length": str(len(data))}
                self.send_response(code)
                for name, value in {**sent, **headers}.items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client was killed
                    super().handle()

        return Handler


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running endpoint; the key is in the environment."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def key() -> str:
    return KEY
