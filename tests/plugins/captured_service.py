"""The service in this process, with models that repeat their input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from luthier_server import KEYS, ONE, home_with_tiny
from sqlalchemy import select
from starlette.testclient import TestClient

from luthier.inference.inference import FinishEvent, GenerationRequest, Stream, TokenChunk
from luthier.inference.sequential import Embedding
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.live.captures import CapturedRequest

ITEMS = ("ann.meyer@acme-corp.io", "4111 1111 1111 1111", "+1 415 555 2671")
"""An address, a card and a telephone number."""
TEXT = f"Write to {ITEMS[0]}, pay with {ITEMS[1]}, call {ITEMS[2]}."


class Echo:
    """Model pool whose models repeat :data:`TEXT` and their input."""

    def submit(self, stored_id: str, request: GenerationRequest) -> Stream:
        events: SimpleQueue[Any] = SimpleQueue()
        for index in range(request.n):
            for start in range(0, len(TEXT), 7):
                events.put(TokenChunk(index, TEXT[start : start + 7]))
            events.put(FinishEvent(index, "stop", 9))
        return Stream(events, 5, request.n)

    def embed(self, stored_id: str, texts: list[Any]) -> list[Any]:
        return [Embedding((0.5,) * 32, tokens=3) for _ in texts]

    def predict(self, stored_id: str, inputs: list[Any], top: int | None = None) -> list[Any]:
        return [{"label": "spam", "score": 0.5, "text": TEXT} for _ in inputs]

    def sample(self, stored_id: str, request: Any) -> Any:
        picture = SimpleNamespace(pixels=np.zeros((4, 4, 3), np.uint8), label="")
        return SimpleNamespace(images=[picture], seed=1)

    def reconstruct(self, stored_id: str, images: list[Any]) -> list[Any]:
        pixels = np.zeros((4, 4, 3), np.uint8)
        ratio = SimpleNamespace(ratio=2.0)
        return [SimpleNamespace(original=pixels, copy=pixels, error=0.1, compression=ratio)]


class Running:
    """The service and clients of two accounts."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.http = TestClient(service.application, base_url="http://luthier")

    @staticmethod
    def key(account: str = ONE) -> str:
        return KEYS[account]["api_key"]

    def ask(self, path: str, body: Any, account: str = ONE, **headers: str) -> Any:
        key = {"Authorization": f"Bearer {self.key(account)}", **headers}
        return self.http.post(path, json=body, headers=key)

    def chat(self, account: str = ONE, text: str = TEXT, **members: Any) -> Any:
        message = {"role": "user", "content": text}
        body = {"model": "tiny", "messages": [message], **members}
        answer = self.ask("/v1/chat/completions", body, account)
        assert answer.status_code == 200, answer.text
        return answer


@pytest.fixture
def running(
    luthier_home: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    """The service with an echo in place of models."""
    home_with_tiny(luthier_home, tiny_model_folder)
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(luthier_home / "bootstrap.json"))
    service = Service(Settings(run_jobs=False))
    echo = Echo()
    for name in ("submit", "embed", "predict", "sample", "reconstruct"):
        monkeypatch.setattr(service.pool, name, getattr(echo, name))
    yield Running(service)
    service.close()


def _place(row: CapturedRequest, found: Any) -> tuple[int, int]:
    return row.offset, row.size


def records(running: Running, account: str = ONE) -> list[dict[str, Any]]:
    """Return the captured records of the account, oldest first, read as a client reads objects."""
    running.service.capture.flush()
    with running.service.database.read() as session:
        query = select(CapturedRequest).where(CapturedRequest.account == account)
        rows = session.scalars(query.order_by(CapturedRequest.seq)).all()
    found = []
    for row in rows:
        objects = running.service.objects
        _, pieces = objects.open_range(account, row.bucket, row.key, partial(_place, row))
        found.append(json.loads(gzip.decompress(b"".join(pieces))))
    return found
