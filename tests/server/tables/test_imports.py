"""Ends of imports, and their names and quotas."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import NameInUse, QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.server.jobs.submit import submit_import
from luthier.server.stores.removal import ModelInUse, remove
from luthier.server.tables import imports, queue
from luthier.server.tables.custom_models import ACTIVE, FAILED, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.imports import ModelImport

ACCOUNT = "000000000000"
WORKER = {"host": "here", "pid": 1, "born": 0.0}


@pytest.fixture
def database(database: Database) -> Database:
    """Return a database with two waiting imports."""
    for name in ("first", "second"):
        with database.write() as session:
            submit_import(session, ACCOUNT, name, f"s3://data/{name}", {"roleArn": "r"})
    return database


def model(database: Database, name: str) -> CustomModel:
    with database.read() as session:
        return session.query(CustomModel).filter_by(name=name).one()


def claimed(database: Database, memory: int = 10**12, **how: Any) -> ModelImport | None:
    with database.write() as session:
        return queue.claim(session, ModelImport, WORKER, memory, **how)


def test_import_completion_and_failure(database: Database) -> None:
    first, second = claimed(database), claimed(database)
    assert first and second
    with database.write() as session:
        changes = {"stored_id": "imported:x", "root": "luthier.imported-x"}
        imports.complete(session, first.id, str(first.lease), changes, {"kind": "encoder"})
        imports.fail(session, second.id, str(second.lease), "x" * 5000)
    done, failed = model(database, "first"), model(database, "second")
    assert (done.status, done.stored_id, done.details["kind"]) == (ACTIVE, "imported:x", "encoder")
    assert done.details["request"] == {"roleArn": "r"} and done.bottom == "luthier.imported-x"
    assert (failed.status, len(str(failed.failure))) == (FAILED, 2048)
    with database.read() as session:
        assert not any(queue.has_unfinished(session, ModelImport, m.id) for m in (done, failed))
        assert queue.leased_rows(session, ModelImport) == []


def test_names_quota_and_removal(database: Database) -> None:
    with pytest.raises(NameInUse), database.write() as session:
        submit_import(session, ACCOUNT, "first", "s3://data/x", {})
    with pytest.raises(QuotaExceeded), database.write() as session:
        submit_import(session, ACCOUNT, "third", "s3://data/x", {}, AccountQuotas(custom_models=2))
    with pytest.raises(ModelInUse), database.write() as session:
        remove(session, session.query(CustomModel).filter_by(name="first").one(), "arn")
