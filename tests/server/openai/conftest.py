"""The OpenAI API in this process, tiny models in the pool, and the unmodified client."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from both_databases import new_database
from starlette.testclient import TestClient

from luthier.files import write_json
from luthier.inference.pool import ModelPool
from luthier.library.folders import base_folder
from luthier.limits import AccountQuotas, ServerLimits
from luthier.models.manifest import MANIFEST
from luthier.server.audit import AuditTrail
from luthier.server.components import Components
from luthier.server.http.application import Application
from luthier.server.http.messages import Caller, Fault, RequestHead, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.live.capture import Capture
from luthier.server.openai import OpenAIService
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.tables.accounts import Account
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.principals import User

ACCOUNT, OTHER = "000000000000", "111111111111"
KEYS = {"sk-one": ACCOUNT, "sk-other": OTHER, "sk-fast": ACCOUNT}


class Keys:
    """Authentication by the keys above."""

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        key = dict(head.headers).get("authorization", "").removeprefix("Bearer ")
        if key not in KEYS:
            raise Fault("UnrecognizedClient", "Incorrect API key provided.")
        if key == "sk-fast":
            raise Fault("Throttling", "Too many requests.", retry_after=3)
        return Signed(Caller(KEYS[key], "somebody", ("developer",)))

    def recognize(self, head: RequestHead) -> Signed | None:
        return self.authenticate(head, b"")


@dataclass
class Service:
    """The application in this process, with database, objects and pool."""

    openai: OpenAIService
    application: Application
    database: Database
    objects: Objects
    pool: ModelPool
    deleted: list[str] = field(default_factory=list)

    @property
    def http(self) -> TestClient:
        """A client without a key."""
        return TestClient(self.application, base_url="http://luthier")

    def client(self, key: str = "sk-one", retries: int = 0) -> openai.OpenAI:
        """An unmodified client."""
        return openai.OpenAI(
            api_key=key, base_url="http://luthier/v1", max_retries=retries, http_client=self.http
        )


@pytest.fixture
def tiny_base(luthier_home: Path, tiny_model_folder: Path) -> str:
    """A generative base model in the store."""
    return _base("tiny", "causal_lm", tiny_model_folder)


@pytest.fixture
def thinking_base(luthier_home: Path, thinking_folder: Callable[[str], Path]) -> str:
    """A reasoning base model in the store."""
    return _base("thinker", "causal_lm", thinking_folder("asks itself"))


@pytest.fixture
def tiny_encoder(luthier_home: Path, family_folder: Callable[[str], Path]) -> str:
    """An encoder base model in the store."""
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
    made = new_database(f"sqlite:///{path}")
    with made.write() as session:
        for account in (ACCOUNT, OTHER):
            session.add(Account(id=account, name="", disabled=False, created=now()))
            session.flush()
            session.add(User(account=account, name="somebody", role="developer", created=now()))
    made.close()
    return path


@pytest.fixture
def service(luthier_home: Path, empty_database: Path) -> Iterator[Service]:
    """The API with an empty database."""
    luthier_home.mkdir(exist_ok=True)
    shutil.copy(empty_database, luthier_home / "luthier.db")
    database = Database()
    objects, pool = Objects(database), ModelPool(budget=1 << 30)
    deleted: list[str] = []

    def delete_model(model: CustomModel) -> None:
        with database.write() as session:
            session.delete(session.merge(model))
        deleted.append(model.id)

    components = Components(
        database=database,
        arns=Arns(),
        locations=Locations(database),
        pool=pool,
        quotas=lambda account: AccountQuotas(jobs_in_flight=20),
        delete_model=delete_model,
        capture=Capture(objects),
    )
    made = OpenAIService(components, objects, ServerLimits())
    keys: Any = Keys()
    application = Application(
        [made.api],
        keys,
        lambda caller: None,
        Metrics(dict),
        AuditTrail(database),
        lambda: None,
        recorder=components.capture,
    )
    yield Service(made, application, database, objects, pool, deleted)
    made.close()
    pool.close()
    database.close()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """A client of the first account."""
    with service.client() as made:
        yield made


@pytest.fixture
def other(service: Service) -> Iterator[openai.OpenAI]:
    """A client of the second account."""
    with service.client("sk-other") as made:
        yield made
