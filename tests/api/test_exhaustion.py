"""No client, known or unknown, exhausts the server or slows its neighbours: a real server, attacked.

Each attack is a process of its own, from another address than the neighbour's (``attacks``). In life it
comes from other machines and takes none of the server's processors, so the server has half of them to
itself here, in quiet times too. What is asked for: the resident memory of the server and its children
stays within 400 MB of what it was, and comes back to within 100 MB; a neighbour's chat takes at most
twice its quiet time, and 99 of 100 listings at most 100 ms; and the attacker gets the answer that the
documentation names.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attacks
import pytest
from luthier_server import BASE, ENCODER, KEYS, ONE, OTHER, Served, add_base, home_with_tiny
from resident_memory import Growth

pytestmark = pytest.mark.slow

MIB = 1 << 20
PEAK, BACK = 400 * MIB, 100 * MIB
CHAT_RATIO, LISTING_SECONDS = 2.0, 0.1
EXPECTED = {
    "endless_headers": {"431", "414", "closed"},
    "half_heads": {"408", "closed", "503"},
    "many_connections": {"503", "closed", "open"},
    "unknown_signatures": {"403"},
    "wrong_signatures": {"403", "429"},
    "large_bodies": {"400", "413", "429"},
    "sent_ahead": {"200", "429", "closed"},
    "slow_bodies": {"408", "429", "400", "closed"},
    "digits": {"400", "429"},
    "template_bombs": {"400", "429"},
    "slow_graders": {"200", "400", "429", "503", "closed"},
    "schema_bombs": {"200", "400", "429"},
    "large_grammars": {"200", "400", "429"},
    "long_chats": {"200", "429", "closed"},
    "many_embeddings": {"200", "429", "closed"},
    "abandoned_requests": {"200", "429", "503", "closed"},
    "large_listings": {"200", "429"},
}
"""What each attack may be answered; ``closed`` is a connection that ended without an answer."""


class Neighbour:
    """Another account at another address, that chats and lists all the time."""

    def __init__(self, server: Served) -> None:
        self.port = int(server.url.rpartition(":")[2])
        self.chats: list[float] = []
        self.listings: list[float] = []
        self.failures: list[Any] = []
        self.done = threading.Event()

    def ask(self, method: str, path: str, body: Any = None) -> float:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEYS[OTHER]['api_key']}"}
        data = None if body is None else json.dumps(body).encode()
        began = time.perf_counter()
        client.request(method, path, data, headers)
        answer = client.getresponse()
        text = answer.read()
        seconds = time.perf_counter() - began
        client.close()
        if answer.status != 200:
            self.failures.append((answer.status, text[:300]))
        return seconds

    def chat(self) -> None:
        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": BASE, "messages": messages, "max_tokens": 32, "seed": 1}
        self.chats.append(self.ask("POST", "/v1/chat/completions", body))

    def list(self) -> None:
        self.listings.append(self.ask("GET", "/v1/files"))

    def run(self, work: Any, pause: float) -> None:
        while not self.done.is_set():
            try:
                work()
            except OSError as error:
                self.failures.append(repr(error))
            time.sleep(pause)

    def __enter__(self) -> Neighbour:
        self.chats, self.listings, self.failures = [], [], []
        self.done.clear()
        works = ((self.chat, 0.05), (self.list, 0.02))
        self.threads = [threading.Thread(target=self.run, args=each) for each in works]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Iterator[Served]:
    home = home_with_tiny(tmp_path_factory.mktemp("served"), tiny_model_folder)
    add_base(home, "encoder", "encoder", family_folder("bert"))
    made = Served(home, forked=False)
    processors = sorted(os.sched_getaffinity(0))
    half = len(processors) // 2
    os.sched_setaffinity(0, processors[half:])  # which the server, and all it starts, takes over
    made.start("--limit", "head_seconds=5", "--limit", "idle_seconds=10")
    os.sched_setaffinity(0, processors[:half] or processors)
    for account in (ONE, OTHER):
        messages = [{"role": "user", "content": "Hello"}]
        asked = {"model": BASE, "messages": messages, "max_tokens": 2}
        assert made.ask("POST", "/v1/chat/completions", asked, account)[0] == 200
    embed = {"model": ENCODER, "input": "a"}
    assert made.ask("POST", "/v1/embeddings", embed)[0] == 200
    yield made
    made.end()
    os.sched_setaffinity(0, processors)


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_an_attack_costs_the_neighbours_little(server: Served, name: str) -> None:
    neighbour = Neighbour(server)
    with neighbour:
        time.sleep(4)
    quiet = statistics.median(neighbour.chats)
    listing = _slowest(neighbour.listings)
    assert not neighbour.failures
    memory = Growth(server)
    keys = json.dumps({**KEYS[ONE], "model": BASE, "encoder": ENCODER})
    command = [sys.executable, attacks.__file__, name, str(neighbour.port), keys]
    with memory, neighbour:
        attack = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert attack.returncode == 0, attack.stderr
    result = json.loads(attack.stdout)
    report = {
        "attack": name,
        "seconds": result["seconds"],
        "answers": result["answers"],
        "rest": memory.rest // MIB,
        "peak": memory.most // MIB,
        "chat": [round(quiet, 3), round(statistics.median(neighbour.chats), 3)],
        "listing": [round(listing, 3), round(_slowest(neighbour.listings), 3)],
    }
    back = memory.comes_back(BACK)
    report["after"] = memory.now() // MIB
    print(json.dumps(report))
    assert not neighbour.failures, neighbour.failures[:3]
    assert set(result["answers"]) <= EXPECTED[name], result
    assert memory.most < PEAK, report
    assert back, report
    assert report["chat"][1] < CHAT_RATIO * quiet, report
    assert report["listing"][1] < LISTING_SECONDS, report


def _slowest(seconds: Sequence[float]) -> float:
    """What 99 of 100 take at most."""
    return statistics.quantiles(seconds, n=100)[98]
