"""A server that is used for long holds no more memory than after a while.

    LUTHIER_TEST_MINUTES=30 pytest -m slow tests/api/test_soak.py -s

Streams, hang-ups, embeddings and adapters that are loaded and dropped go on together, each client from
an address of its own. Memory is the resident set of the server's own process, read twice a second; the
median of the last quarter is held against that of the second, which no single reading moves.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from luthier_server import BASE, ENCODER, KEYS, ONE, Served, add_base, home_with_tiny
from resident_memory import resident

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.engine import machine as machines
from luthier.engine.train import train
from luthier.recipe import Recipe
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import new_id, now

MINUTES = float(os.environ.get("LUTHIER_TEST_MINUTES", "4"))
ADAPTERS, NUMBERS = 4, 100
"""So many different words are in the texts: a tokenizer keeps the first 10,000 that it meets in pieces,
which would look like a leak until they are there."""
MIB = 1 << 20
GROWTH = 16 * MIB
"""A request that left one kilobyte would exceed it within minutes."""


@pytest.fixture
def server(
    tmp_path: Path,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    """With a base and adapters on it, and an encoder."""
    home = home_with_tiny(tmp_path / "served", tiny_model_folder)
    add_base(home, "encoder", "encoder", family_folder("bert"))
    rows = home / "rows.jsonl"
    rows.write_text('{"prompt": "say fox", "completion": "fox fox"}\n' * 3)
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(home / "bootstrap.json"))
    machine = machines.Machine(torch.device("cpu"), torch.float32, 1, "a test")
    monkeypatch.setattr(machines, "choose_machine", lambda *arguments: machine)
    service = Service(Settings())
    for number in range(ADAPTERS):
        fields: dict[str, Any] = {
            "base": "tiny", "name": f"adapter-{number}",
            "data": {"train": str(rows), "validation_share": 0},
            "adaptation": {"method": "lora", "rank": 4},
            "training": {"max_steps": 1, "precision": "float32", "threads": 1},
        }  # fmt: skip
        model = CustomModel(
            id=new_id(), account=ONE, name=f"adapter-{number}", foundation=BASE, root=BASE,
            base_model=f"arn:aws:bedrock:us-east-1::foundation-model/{BASE}",
            stored_id=train(Recipe.parse(fields)).model_id, status=ACTIVE, created=now(),
        )  # fmt: skip
        with service.database.write() as session:
            session.add(model)
    service.close()
    made = Served(home, forked=False)
    made.start("--no-workers")
    yield made
    made.end()


class Clients:
    """Ask a server until they are told to end; each kind of request in a thread of its own."""

    def __init__(self, server: Served) -> None:
        self.port = int(server.url.rpartition(":")[2])
        self.answers: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        self.done = threading.Event()
        works = (self.stream, self.stream, self.hang_up, self.embed, self.change_adapters)
        self.threads = [
            threading.Thread(target=self._repeat, args=(work, f"127.0.0.{number}"))
            for number, work in enumerate(works, 10)
        ]

    def _repeat(self, work: Callable[[str, int], None], source: str) -> None:
        turn = 0
        while not self.done.is_set():
            turn += 1
            try:
                work(source, turn)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{work.__name__}: {error!r}")

    def ask(
        self, source: str, path: str, body: Any, pieces: int | None = None, method: str = "POST"
    ) -> None:
        """Read the answer, or so many lines of it before hanging up."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=120, source_address=(source, 0)
        )
        with closing(connection):
            headers = {"Authorization": f"Bearer {KEYS[ONE]['api_key']}"}
            connection.request(method, path, json.dumps(body), headers)
            answer = connection.getresponse()
            if pieces is None:
                text = answer.read()
            else:
                text = b"".join(answer.readline() for _ in range(pieces))
            self.answers[path.rpartition("/")[2], answer.status] += 1
            if answer.status != 200:
                self.failures.append(f"{path}: {answer.status} {text[:200]!r}")

    def stream(self, source: str, turn: int) -> None:
        self.chat(source, turn, 48)

    def hang_up(self, source: str, turn: int) -> None:
        self.chat(source, turn, 400, 1 + 2 * (turn % 3))
        time.sleep(0.1)

    def chat(self, source: str, turn: int, tokens: int, pieces: int | None = None) -> None:
        model = BASE if turn % 2 else f"adapter-{turn % ADAPTERS}"
        message = {"role": "user", "content": f"Say fox {turn % NUMBERS} times."}
        body = {
            "model": model, "messages": [message], "max_tokens": tokens, "stream": True,
            "logit_bias": {"1": -100},
        }  # fmt: skip
        self.ask(source, "/v1/chat/completions", body, pieces)

    def embed(self, source: str, turn: int) -> None:
        texts = [f"The quick brown fox {turn % NUMBERS} {number}" for number in range(1 + turn % 8)]
        self.ask(source, "/v1/embeddings", {"model": ENCODER, "input": texts})

    def change_adapters(self, source: str, turn: int) -> None:
        one = f"/api/v1/models/adapter-{turn % ADAPTERS}"
        self.ask(source, f"{one}/load", {})
        time.sleep(0.2)
        self.ask(source, f"{one}/unload", {})

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 600)
def test_memory_stays_flat(server: Served) -> None:
    readings = []
    with Clients(server) as clients:
        until = time.monotonic() + 60 * MINUTES
        while time.monotonic() < until:
            readings.append(resident(server, children=False))
            time.sleep(0.5)
    quarter = len(readings) // 4
    medians = [statistics.median(readings[n * quarter : (n + 1) * quarter]) / MIB for n in range(4)]
    print(f"resident, MiB by quarter: {medians}; {dict(clients.answers)}")
    assert not clients.failures, clients.failures[:5]
    assert len(clients.answers) == 4
    assert medians[3] - medians[1] <= GROWTH / MIB, medians
