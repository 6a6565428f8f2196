"""The server's own part of a request to a model that reads: processor time, without the model's.

    python benchmarks/request_overhead.py [--requests 200] [--rounds 5]

The application is called in this process as a web server calls it, and its models answer at once. Of
each kind of request, and of the look-up of a model by its name alone, milliseconds of processor time
(the median of the rounds): other work on the machine changes it little. The store has 50 custom models,
in SQLite, and the records of two base models.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ACCOUNT, NAME, BASE = "000000000000", "intents", "all-minilm-l6-v2"
FOUNDATION = f"sentence-transformers.{BASE}"
MODELS = 50
TEXT = "Where is my card?"


def stocked_service(home: Path) -> tuple[Any, str]:
    """A service over a new store, and the ARN of a deployment."""
    from luthier.api.service import Service
    from luthier.api.settings import Settings
    from luthier.files import write_json
    from luthier.serving.serial import Embedding
    from luthier.store.custom_models import ACTIVE, CustomModel
    from luthier.store.database import new_id, now
    from luthier.store.endpoints import DEPLOYMENT, READY, Endpoint

    for base in (BASE, "smollm2-135m-instruct"):
        record = {"id": base, "kind": "encoder", "created": "2026-01-01T00:00:00+00:00"}
        write_json(home / "models" / "base" / base / "luthier.json", record)
    service = Service(Settings(requests_per_second=1e9))
    with service.database.write() as session:
        for number in range(MODELS):
            model = CustomModel(
                id=new_id(), account=ACCOUNT, name=NAME if not number else f"model-{number}",
                foundation=FOUNDATION, root=FOUNDATION, base_model="", status=ACTIVE,
                stored_id=f"{BASE}:model-{number}", created=now(),
            )  # fmt: skip
            session.add(model)
            if not number:
                deployed = Endpoint(
                    id=new_id(), account=ACCOUNT, kind=DEPLOYMENT, name="d", foundation=FOUNDATION,
                    model=model.arn(service.arns), status=READY, created=now(), modified=now(),
                )  # fmt: skip
                session.add(deployed)
    embedding = Embedding(np.ones(384, dtype=np.float32), 5)
    pool: Any = service.pool
    pool.embed = lambda model_id, texts: [embedding] * len(texts)
    pool.predict = lambda model_id, inputs, top=None: [{"label": "a", "scores": {"a": 1.0}}]
    application: Any = service.application
    application._pace.delay = lambda address: 0.0
    return service, service.arns.of(ACCOUNT, DEPLOYMENT, deployed.id)


async def ask(service: Any, path: str, body: bytes) -> None:
    received = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if not received:
            await asyncio.sleep(3600)
        return received.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {
        "host": "x", "authorization": f"Bearer {service.issued.api_key}",
        "content-type": "application/json", "content-length": str(len(body)),
    }  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "scheme": "http", "client": ("127.0.0.1", 1), "http_version": "1.1",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    await service.application(scope, receive, send)
    if sent[0]["status"] != 200:
        raise SystemExit(f"{path}: {sent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        os.environ["LUTHIER_HOME"] = folder
        from luthier.api.identifiers import ModelIds
        from luthier.api.openai.models import Catalogue

        service, deployment = stocked_service(Path(folder))
        catalogue = Catalogue(service.database, service.arns)
        ids = ModelIds(service.database, service.arns)

        def requests(path: str, body: Any) -> Callable[[], None]:
            async def several() -> None:
                for _ in range(options.requests):
                    await ask(service, path, json.dumps(body).encode())

            return lambda: runner.run(several())

        def lookups(look: Callable[[], Any]) -> Callable[[], None]:
            return lambda: [look() for _ in range(options.requests)] and None

        prediction = {"inputs": [{"text": TEXT}]}
        works = {
            "classification": requests(f"/api/v1/models/{NAME}/predictions", prediction),
            "embedding": requests("/v1/embeddings", {"model": NAME, "input": TEXT}),
            "embedding of a base": requests("/v1/embeddings", {"model": BASE, "input": TEXT}),
            "look-up of a name": lookups(lambda: catalogue.target(ACCOUNT, NAME)),
            "look-up of a base": lookups(lambda: catalogue.target(ACCOUNT, BASE)),
            "look-up of a deployment": lookups(lambda: ids.stored_id(ACCOUNT, deployment)),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            work()
        for _ in range(options.rounds):
            for name, work in works.items():
                began = time.process_time()
                work()
                times[name].append(1000 * (time.process_time() - began) / options.requests)
        for name, each in times.items():
            print(f"{name:24} {statistics.median(each):.3f} ms")
        service.close()


if __name__ == "__main__":
    main()
