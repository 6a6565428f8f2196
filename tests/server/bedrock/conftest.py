"""Fixtures: a server with the Bedrock API, clients of two accounts, jobs and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bedrock_service import ALICE, BOB, Server, Service, job_members
from both_databases import with_tables

from luthier.server.tables.database import Database


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Run a server on a free port."""
    made = Server()
    yield made
    made.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Return a database file with all tables."""
    yield from with_tables(f"sqlite:///{tmp_path / 'service.db'}")


@pytest.fixture
def service(server: Server, database: Database) -> Iterator[Service]:
    """The service behind the server."""
    with server.serving(database) as made:
        yield made


@pytest.fixture
def bedrock(service: Service) -> Any:
    """Alice's client."""
    return service.client()


@pytest.fixture
def bob(service: Service) -> Any:
    """Return the client of another account."""
    return service.client(BOB)


@pytest.fixture
def submit(bedrock: Any) -> Callable[..., str]:
    """Return a function that creates a job of Alice and returns the ARN."""

    def make(name: str = "job-1", client: Any = bedrock, **members: Any) -> str:
        return client.create_model_customization_job(**job_members(name, **members))["jobArn"]

    return make


@pytest.fixture
def model(service: Service, submit: Callable[..., str]) -> Callable[..., str]:
    """Return a function that creates a custom model of Alice with a job and returns the ARN."""

    def make(name: str = "job-1", account: str = ALICE, **members: Any) -> str:
        submit(name, service.client(account), **members)
        made = service.complete(account, name)
        return service.control.arns.custom_model(account, made.foundation, made.id)

    return make
