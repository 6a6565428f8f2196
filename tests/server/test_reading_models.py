"""Many clients ask models that read at the same time: a real server, real clients, and some hang up."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from served import served

from luthier.engine import machine as machines
from luthier.engine.train import train
from luthier.recipe import Recipe
from luthier.server.http.metrics import Metrics, RequestRecord
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import new_id, now

ACCOUNT = "000000000000"
WORDS = ("fox", "dog", "card", "capital", "question", "answer")
TEXTS = [" ".join([word] * count) for word in WORDS for count in (1, 7, 3, 2)]
MODELS = {"tickets": "classification", "near": "contrastive"}


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path]
) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("readers")
    file = home / "rows.jsonl"
    labelled = [{"text": text, "label": f"class {n % 3}"} for n, text in enumerate(TEXTS)]
    pairs = [{"anchor": text, "positive": f"a {text}"} for text in TEXTS]
    machine = machines.Machine(torch.device("cpu"), torch.float32, 1, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        patch.setattr(machines, "choose_machine", lambda *arguments: machine)
        made = Service(Settings(database=f"sqlite:///{home / 's.db'}"))
        for (name, method), rows in zip(MODELS.items(), (labelled, pairs), strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            fields: dict[str, Any] = {
                "base": str(family_folder("bert")), "name": name, "data": {"train": str(file)},
                "objective": {"method": method}, "adaptation": {"method": "full"},
                "training": {"max_steps": 2, "precision": "float32", "threads": 1},
            }  # fmt: skip
            stored_id = train(Recipe.parse(fields)).model_id
            with made.database.write() as session:
                session.add(
                    CustomModel(
                        id=new_id(),
                        account=ACCOUNT,
                        name=name,
                        foundation="luthier.x",
                        root="luthier.x",
                        base_model="",
                        stored_id=stored_id,
                        status=ACTIVE,
                        openai_id=f"ft:x:org:{name}:1",
                        created=now(),
                    )
                )
        yield made
        made.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service.application) as url:
        yield url


@pytest.fixture(autouse=True)
def luthier_home(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(Path(service.database.url[10:]).parent))


def request_of(service: Service, url: str, texts: list[str]) -> urllib.request.Request:
    assert service.issued is not None
    body = json.dumps({"inputs": [{"text": text} for text in texts]}).encode()
    headers = {"Authorization": f"Bearer {service.issued.api_key}"}
    headers["Content-Type"] = "application/json"
    return urllib.request.Request(f"{url}/api/v1/models/tickets/predictions", body, headers)


@pytest.mark.slow
def test_clients_are_answered_together_as_each_alone(service: Service, url: str) -> None:
    def predict(text: str) -> Any:
        with urllib.request.urlopen(request_of(service, url, [text]), timeout=60) as answer:
            return json.loads(answer.read())["answers"]

    assert service.issued is not None
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key=service.issued.api_key, max_retries=0
    ) as client:

        def embed(text: str) -> list[float]:
            made = client.embeddings.create(model="near", input=[text, "fox"])
            assert len(made.data) == 2
            return made.data[0].embedding

        for ask in (predict, embed):
            alone = [ask(text) for text in TEXTS]
            with ThreadPoolExecutor(len(TEXTS)) as clients:
                assert [*clients.map(ask, TEXTS)] == alone


def test_clients_that_hang_up_hold_up_nobody(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, str]] = []
    count = Metrics.count_request

    def count_request(self: Metrics, record: RequestRecord, seconds: float) -> None:
        counted.append((record.status, record.error))
        count(self, record, seconds)

    # Before the first request: its answer is read before it is counted.
    monkeypatch.setattr(Metrics, "count_request", count_request)
    with urllib.request.urlopen(request_of(service, url, ["fox"]), timeout=60) as answer:
        expected = json.loads(answer.read())["answers"]
    pool = service.pool
    model: Any = pool._entries["bert:tickets"].model
    honest, read = model._predictor.read, []

    def slow(rows: Any, **settings: Any) -> Any:
        time.sleep(0.1)
        read.extend(rows)
        return honest(rows, **settings)

    monkeypatch.setattr(model._predictor, "read", slow)
    monkeypatch.setattr(model._batcher, "_size", 32)
    monkeypatch.setattr(model._batcher, "_most", 32)
    address, many = urlsplit(url), request_of(service, url, ["card dog question"] * 60)
    assert address.port is not None and isinstance(many.data, bytes)
    for _ in range(6):
        with socket.create_connection(("127.0.0.1", address.port)) as line:
            head = "".join(f"{name}: {value}\r\n" for name, value in many.header_items())
            start = f"POST {many.selector} HTTP/1.1\r\nHost: x\r\n{head}"
            line.sendall(f"{start}Content-Length: {len(many.data)}\r\n\r\n".encode() + many.data)
            time.sleep(0.05)
    began = time.monotonic()
    with urllib.request.urlopen(request_of(service, url, ["fox"]), timeout=60) as answer:
        assert json.loads(answer.read())["answers"] == expected
    assert time.monotonic() - began < 5
    until = time.monotonic() + 10
    while [*model._batcher._waiting] and time.monotonic() < until:
        time.sleep(0.02)
    assert not model._batcher._waiting and pool.memory.reserved_bytes == 0
    assert len(read) < 200, "of 361 rows that were asked for"
    while len(counted) < 8 and time.monotonic() < until:
        time.sleep(0.02)
    assert sorted(counted) == [(200, "")] * 2 + [(499, "ClientDisconnected")] * 6
