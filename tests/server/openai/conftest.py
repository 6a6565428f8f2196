"""The face behind a real server, tiny models in the pool, and the unmodified client."""

from __future__ import annotations

import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import anyio.to_thread
import openai
import pytest
import uvicorn

from luthier.errors import RefusedInput
from luthier.files import write_json
from luthier.inference.pool import ModelPool
from luthier.library.folders import base_folder
from luthier.limits import AccountQuotas
from luthier.models.manifest import MANIFEST
from luthier.server.http.messages import Caller, Fault, Request, RequestHead, Response
from luthier.server.http.streams import RequestBody
from luthier.server.openai import OpenAIFace
from luthier.server.settings import Settings
from luthier.server.tables.accounts import Account
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.objects import Objects
from luthier.server.tables.principals import User
from luthier.server.tables.schema import METADATA

ACCOUNT, OTHER = "000000000000", "111111111111"
KEYS = {"sk-one": ACCOUNT, "sk-other": OTHER, "sk-fast": ACCOUNT}


class Server:
    """A face over HTTP: keys name accounts, bodies are read whole, answers are sent as they come."""

    def __init__(self, face: OpenAIFace) -> None:
        self.face = face

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request_id = str(uuid.uuid4())
        headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
        path = scope["raw_path"].decode()
        try:
            caller = self._caller(headers)
            query = scope["query_string"].decode()
            head = RequestHead(scope["method"], path, query, [*headers.items()], tls=False)
            route = self.face.route(head)
            body = RequestBody(head, receive, route.operation.body_limit)
            stream = route.operation.stream
            data = b"" if stream else await body.read()
            call = Request(
                request_id,
                caller,
                scope["method"],
                path,
                parse_qs(query, keep_blank_values=True),
                headers,
                data,
                now(),
                route.params,
            )
            if stream is not None:
                answer = await stream(call, body, anyio.to_thread.run_sync)
            else:
                answer = await anyio.to_thread.run_sync(route.operation.handler, call)
        except Fault as fault:
            answer = self.face.refusal(fault, request_id)
        except RefusedInput as refused:
            answer = self.face.refusal(Fault.of(refused), request_id)
        await _send(send, answer, request_id)

    def _caller(self, headers: Mapping[str, str]) -> Caller:
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if key not in KEYS:
            raise Fault("UnrecognizedClient", "Incorrect API key provided.")
        if key == "sk-fast":
            raise Fault("Throttling", "Too many requests.", retry_after=3)
        return Caller(KEYS[key], "somebody", ("developer",))


async def _send(send: Any, answer: Response, request_id: str) -> None:
    sent = {"x-request-id": request_id, **answer.headers}
    headers = [(k.lower().encode(), v.encode()) for k, v in sent.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if isinstance(answer.body, bytes):
        await send({"type": "http.response.body", "body": answer.body})
        return
    while True:
        piece = await anyio.to_thread.run_sync(next, answer.body, None)
        if piece is None:
            break
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@dataclass
class Service:
    """A running face and what is behind it."""

    face: OpenAIFace
    database: Database
    objects: Objects
    pool: ModelPool
    url: str
    deleted: list[str] = field(default_factory=list)

    def client(self, key: str = "sk-one", retries: int = 0) -> openai.OpenAI:
        """An unmodified client."""
        return openai.OpenAI(api_key=key, base_url=self.url, max_retries=retries, timeout=60)


@pytest.fixture
def tiny_base(luthier_home: Path, tiny_model_folder: Path) -> str:
    """A base model in the store that writes."""
    return _base("tiny", "causal_lm", tiny_model_folder)


@pytest.fixture
def thinking_base(luthier_home: Path, thinking_folder: Callable[[str], Path]) -> str:
    """A base model in the store that thinks before it answers."""
    return _base("thinker", "causal_lm", thinking_folder("asks itself"))


@pytest.fixture
def tiny_encoder(luthier_home: Path, family_folder: Callable[[str], Path]) -> str:
    """A base model in the store that reads."""
    return _base("tiny-encoder", "encoder", family_folder("bert"))


def _base(name: str, kind: str, folder: Path) -> str:
    shutil.copytree(folder, base_folder(name))
    manifest = {"id": name, "kind": kind, "created": "2026-01-01T00:00:00+00:00"}
    write_json(base_folder(name) / MANIFEST, manifest)
    return name


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all tables and the users of the keys, to be copied."""
    path = tmp_path_factory.mktemp("database") / "luthier.db"
    made = Database(f"sqlite:///{path}")
    METADATA.create_all(made.engine)
    with made.write() as session:
        for account in (ACCOUNT, OTHER):
            session.add(Account(id=account, name="", disabled=False, created=now()))
            session.flush()
            session.add(User(account=account, name="somebody", role="developer", created=now()))
    made.close()
    return path


@pytest.fixture
def service(luthier_home: Path, empty_database: Path) -> Iterator[Service]:
    """A face on a free port, with an empty database."""
    luthier_home.mkdir(exist_ok=True)
    shutil.copy(empty_database, luthier_home / "luthier.db")
    database = Database()
    objects, pool = Objects(database), ModelPool(budget=1 << 30)
    deleted: list[str] = []

    def delete_model(model: CustomModel) -> None:
        with database.write() as session:
            session.delete(session.merge(model))
        deleted.append(model.id)

    face = OpenAIFace(
        database,
        Settings(),
        pool,
        objects,
        delete_model,
        quotas=lambda account: AccountQuotas(jobs_in_flight=20),
        file_limit=2_000_000,
    )
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        Server(face), log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    yield Service(face, database, objects, pool, url, deleted)
    face.close()
    server.should_exit = True
    thread.join()
    listening.close()
    pool.close()
    database.close()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The client of one account."""
    with service.client() as made:
        yield made


@pytest.fixture
def other(service: Service) -> Iterator[openai.OpenAI]:
    """The client of another account."""
    with service.client("sk-other") as made:
        yield made
