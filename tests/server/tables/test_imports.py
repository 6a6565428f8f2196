"""Imports: each is worked on by one process, and only that one writes."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LeaseLost, NameInUse, QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.server.jobs.submit import submit_import
from luthier.server.tables import imports, queue
from luthier.server.tables.custom_models import ACTIVE, CREATING, FAILED, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.removal import ModelInUse, remove

ACCOUNT, OTHER, THIRD = "000000000000", "111111111111", "222222222222"
WORKER = {"host": "here", "pid": 1, "born": 0.0}


@pytest.fixture
def database(database: Database) -> Database:
    """With two models that wait, one after the other."""
    for name in ("first", "second"):
        with database.write() as session:
            submit_import(session, ACCOUNT, name, f"s3://data/{name}", {"roleArn": "r"})
    return database


def submit(database: Database, name: str, account: str = ACCOUNT) -> None:
    with database.write() as session:
        submit_import(session, account, name, f"s3://data/{name}", {})


def model(database: Database, name: str) -> CustomModel:
    with database.read() as session:
        return session.query(CustomModel).filter_by(name=name).one()


def claimed(database: Database, memory: int = 10**12, **how: Any) -> ModelImport | None:
    with database.write() as session:
        return queue.claim(session, ModelImport, WORKER, memory, **how)


def test_each_is_claimed_once_in_the_order_they_came(database: Database) -> None:
    first, second, third = (claimed(database) for _ in range(3))
    assert first and second and third is None
    assert [first.id, second.id] == [model(database, n).id for n in ("first", "second")]
    with database.write() as session:
        queue.release(session, ModelImport, first.id, str(first.lease))
    again = claimed(database)
    assert again and again.id == first.id and again.lease != first.lease
    for write in (
        lambda s, i, lease: queue.renew(s, ModelImport, i, lease),
        lambda s, i, lease: imports.complete(s, i, lease, {}, {}),
    ):
        with pytest.raises(LeaseLost), database.write() as session:
            write(session, first.id, str(first.lease))
    assert model(database, "first").status == CREATING


def test_how_an_import_ends(database: Database) -> None:
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


def names_in_turn(database: Database, count: int) -> list[str]:
    """Of the models that are claimed and end, one after the other."""
    names = []
    for _ in range(count):
        found = claimed(database)
        assert found is not None
        with database.write() as session:
            imports.fail(session, found.id, str(found.lease), "x")
            names.append(session.query(CustomModel).filter_by(id=found.id).one().name)
    return names


def test_an_account_with_many_imports_does_not_keep_the_others_waiting(database: Database) -> None:
    for number in range(6):
        submit(database, f"mine-{number}")
    running = claimed(database)
    for number in range(2):
        submit(database, f"theirs-{number}", OTHER)
    assert running
    with database.write() as session:
        imports.fail(session, running.id, str(running.lease), "x")
    assert names_in_turn(database, 4) == ["theirs-0", "second", "theirs-1", "mine-0"]
    # Who comes late comes in where the others are, before none of them and behind none twice.
    submit(database, "late", THIRD)
    submit(database, "theirs-2", OTHER)
    assert names_in_turn(database, 7) == [
        "mine-1", "late", "theirs-2", "mine-2", "mine-3", "mine-4", "mine-5",
    ]  # fmt: skip
    assert claimed(database) is None


def test_who_asks_again_each_time_gains_nothing(database: Database) -> None:
    order = []
    for number in range(3):
        submit(database, f"again-{number}", OTHER)
        order += names_in_turn(database, 1)
    assert order == ["first", "again-0", "second"]


def test_an_import_that_is_given_back_keeps_its_turn(database: Database) -> None:
    submit(database, "theirs", OTHER)
    first = claimed(database)
    assert first and first.id == model(database, "first").id
    with database.write() as session:
        queue.expire(session, ModelImport, first.id, str(first.lease), "by signal 9")
    assert names_in_turn(database, 3) == ["first", "theirs", "second"]


def test_a_model_that_kills_its_processes_fails(database: Database) -> None:
    for number in range(imports.MOST_CRASHES):
        found = claimed(database)
        assert found and found.id == model(database, "first").id
        with database.write() as session:
            queue.expire(session, ModelImport, found.id, str(found.lease), "by signal 9")
            again = queue.has_unfinished(session, ModelImport, found.id)
        assert again is (number + 1 < imports.MOST_CRASHES)
    failed = model(database, "first")
    assert failed.status == FAILED and "signal 9" in str(failed.failure)


def test_names_quota_and_removal(database: Database) -> None:
    with pytest.raises(NameInUse), database.write() as session:
        submit_import(session, ACCOUNT, "first", "s3://data/x", {})
    with pytest.raises(QuotaExceeded), database.write() as session:
        submit_import(session, ACCOUNT, "third", "s3://data/x", {}, AccountQuotas(custom_models=2))
    with pytest.raises(ModelInUse, match="Creating"), database.write() as session:
        remove(session, session.query(CustomModel).filter_by(name="first").one(), "arn")
