"""Memory of the server at rest, at the peak and afterwards, and latency of another account.

    python benchmarks/service_memory.py [--models LUTHIER_HOME] [--after 10] [SCENARIO ...]

Each scenario has a separate server with two accounts and both base models. One account sends the
load; the other repeats a short chat and a list. Resident memory is read from ``/proc`` each 10 ms.
``after`` is read some seconds after the last reply.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import service_load
from service_load import KEY, MODEL, NEIGHBOUR_KEY, Connection

READER = "sentence-transformers.all-minilm-l6-v2"
BASES = (service_load.BASE, "all-minilm-l6-v2")
DIGITS = "0123456789"
WORDS = "The sea was calm and the wind came from the south. "
MODEL_PATH = f"/model/{MODEL}"
Request = tuple[str, Mapping[str, Any]]
"""Path and body."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], help="all by default")
    parser.add_argument(
        "--after", type=float, default=10, help="seconds until memory is read again"
    )
    parser.add_argument("--models", type=Path, required=True, help="LUTHIER_HOME with both models")
    asked = parser.parse_args()
    print(f"{'scenario':22} {'rest':>6} {'peak':>6} {'after':>6} MB | answers | neighbour")
    for name in asked.scenarios or SCENARIOS:
        with tempfile.TemporaryDirectory() as home:
            for base in BASES:
                folder = Path("models/base", base)
                shutil.copytree(asked.models / folder, Path(home, folder))
            process, port = service_load.start(Path(home))
            try:
                asyncio.run(measure(name, port, process.pid, asked.after))
            finally:
                process.terminate()
                process.wait()


async def measure(name: str, port: int, pid: int, after: float) -> None:
    first = await one_by_one(port, [chat("Hello."), embedding("Hello.")])
    if any(status != 200 for status, *_ in first):
        raise SystemExit(summary(first))
    await asyncio.sleep(3)
    with Neighbour(port) as quiet:
        await asyncio.sleep(3)
    rest = resident(pid)
    began = time.perf_counter()
    with Peak(pid) as peak, Neighbour(port) as neighbour:
        statuses = await SCENARIOS[name](port)
        seconds = time.perf_counter() - began
    await asyncio.sleep(after)
    print(
        f"{name:22} {rest:6.0f} {peak.most:6.0f} {resident(pid):6.0f} MB | {summary(statuses)} in "
        f"{seconds:.1f} s | chat {neighbour.latency('chat')} (quiet {quiet.latency('chat')}), "
        f"list {neighbour.latency('list')}",
        flush=True,
    )


def summary(answers: Iterable[tuple[int, float, bytes]]) -> str:
    counts: dict[str, list[float]] = {}
    for status, seconds, text in answers:
        name = str(status)
        if status >= 400:
            found = json.loads(text)
            error = found.get("error") or {}
            name += f" {error.get('code') or found.get('message') or error.get('message')}"[:60]
        counts.setdefault(name, []).append(seconds)
    return ", ".join(f"{len(s)} x {k} (slowest {max(s):.1f} s)" for k, s in counts.items())


def resident(pid: int) -> float:
    """Megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """The most memory of a process while the block runs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most = pid, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, resident(self.pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._done.set()
        self._thread.join()


class Neighbour:
    """Another account that sends chats and list requests during the block."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.times: dict[str, list[float]] = {"chat": [], "list": []}
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))

    async def _ask(self) -> None:
        async def repeat(name: str, method: str, path: str, body: bytes, pause: float) -> None:
            connection = Connection(self.port, NEIGHBOUR_KEY)
            while not self._done.is_set():
                began = time.perf_counter()
                status, _ = await connection.ask(method, path, body)
                if status == 200:
                    self.times[name].append(time.perf_counter() - began)
                await asyncio.sleep(pause)

        path, body = chat("Hello.")
        await asyncio.gather(
            repeat("chat", "POST", path, json.dumps(body).encode(), 0.05),
            repeat("list", "GET", "/custom-models", b"", 0.02),
        )

    def latency(self, name: str) -> str:
        times = sorted(self.times[name])
        if not times:
            return "none"
        p50, p99 = (times[min(len(times) - 1, int(len(times) * share))] for share in (0.5, 0.99))
        return f"p50 {p50 * 1000:.0f} p99 {p99 * 1000:.0f} ms of {len(times)}"

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._done.set()
        self._thread.join()


def chat(text: str, **fields: Any) -> Request:
    messages = [{"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, **fields}
    return "/v1/chat/completions", body


def embedding(texts: Any) -> Request:
    return "/v1/embeddings", {"model": READER, "input": texts}


def faces(text: str) -> list[Request]:
    """Return ``text`` as the prompt of every operation with a prompt."""
    turns = [{"role": "user", "content": [{"text": text}]}]
    return [
        chat(text),
        ("/v1/completions", {"model": MODEL, "prompt": text, "max_tokens": 8}),
        ("/v1/responses", {"model": MODEL, "input": text, "max_output_tokens": 16}),
        (f"{MODEL_PATH}/converse", {"messages": turns}),
        (f"{MODEL_PATH}/converse-stream", {"messages": turns}),
        (f"{MODEL_PATH}/invoke", {"prompt": text}),
        (f"{MODEL_PATH}/count-tokens", {"input": {"converse": {"messages": turns}}}),
        embedding(text),
    ]


async def send(
    port: int, requests: Iterable[Request], key: str = KEY
) -> list[tuple[int, float, bytes]]:
    """Send all requests at once; return status, seconds and body of each reply."""

    async def one(path: str, body: Mapping[str, Any]) -> tuple[int, float, bytes]:
        data = json.dumps(body).encode()
        began = time.perf_counter()
        status, text = await Connection(port, key).ask("POST", path, data)
        return status, time.perf_counter() - began, text

    return list(await asyncio.gather(*(one(*request) for request in requests)))


async def one_by_one(port: int, requests: Iterable[Request]) -> list[tuple[int, float, bytes]]:
    return [answer for request in requests for answer in await send(port, [request])]


SCENARIOS: dict[str, Callable[[int], Awaitable[list[tuple[int, float, bytes]]]]] = {
    # What the server answers.
    "20 chats of 3,900 tokens": lambda port: send(port, [chat(WORDS * 320, max_tokens=2)] * 20),
    "4 x 512 embeddings": lambda port: send(port, [embedding([WORDS * 8] * 512)] * 4),
    # What it refuses.
    "12 MB of digits": lambda port: one_by_one(port, faces(DIGITS * 1_200_000)),
    "8 x 24 MB bodies": lambda port: send(port, [chat("a" * 24_000_000)] * 8),
    "8 x 24 MB with emoji": lambda port: send(port, [chat("\U0001f3bb" + "a" * 23_900_000)] * 8),
    "36 x 600 KB of digits": lambda port: send(port, [chat(DIGITS * 60_000)] * 36),
    "400,000 messages": lambda port: send(
        port, [chat("", messages=[{"role": "user", "content": "a"}] * 400_000)] * 2
    ),
    "4 MB of tools": lambda port: send(
        port, [chat("Hi", tools=[tool(number) for number in range(128)])] * 8
    ),
    "8 million ids": lambda port: send(
        port,
        [
            ("/v1/completions", {"model": MODEL, "prompt": [7] * 8_000_000, "echo": True}),
            ("/v1/embeddings", {"model": READER, "input": [7] * 8_000_000}),
        ],
    ),
    "4 million wrong items": lambda port: send(port, [embedding([1.5] * 4_000_000)] * 2),
}


def tool(number: int) -> dict[str, Any]:
    described = {"name": f"f{number}", "description": DIGITS * 3200, "parameters": {}}
    return {"type": "function", "function": described}


if __name__ == "__main__":
    main()
