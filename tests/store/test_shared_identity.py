"""A shared store belongs to one database: with another one it is refused before anything is swept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.errors import RefusedInput, SharedStoreAway
from luthier.store import shared
from luthier.store.custom_models import CustomModel
from luthier.store.database import Base, Database, Moment, now
from luthier.store.jobs import Job
from luthier.store.objects import ObjectPiece, Objects
from luthier.store.schema import upgrade
from luthier.store.shared import IDENTITY, DirectoryStore, read_shared
from luthier.store.shared_identity import (
    SharedStoreIdentity,
    agree_identity,
    check_identity,
    check_present,
)

OBJECT = f"objects/000000000000/ab/{'ab' * 16}"


@pytest.fixture
def store(tmp_path: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(shared.ENVIRONMENT, str(tmp_path / "shared"))
    return DirectoryStore(tmp_path / "shared")


def database(tmp_path: Path, name: str) -> Database:
    made = Database(f"sqlite:///{tmp_path / name}")
    upgrade(made)
    return made


def test_the_first_server_ties_a_shared_store_to_its_database(
    store: DirectoryStore, database_url: str
) -> None:
    first = Database(database_url)
    upgrade(first)
    check_identity(first, store)
    agree_identity(first, store)
    token = read_shared(store, IDENTITY)
    assert token
    agree_identity(first, store)
    check_identity(first, store)
    assert read_shared(store, IDENTITY) == token
    first.close()


def test_an_empty_database_sweeps_nothing_of_the_store_of_another(
    store: DirectoryStore, tmp_path: Path
) -> None:
    agree_identity(database(tmp_path, "first.db"), store)
    store.put(OBJECT, b"of the first database")
    address = f"sqlite:///{tmp_path / 'empty.db'}"
    with pytest.raises(RefusedInput, match=f"belongs to another database: it has the {IDENTITY}"):
        Service(Settings(database=address))
    # Nor where the store was changed under a server that runs.
    with pytest.raises(RefusedInput, match="belongs to another database"):
        Objects(Database(address)).sweep(older_than=-60)
    assert store.exists(OBJECT)


def test_a_store_that_was_emptied_or_is_of_others_is_refused(
    store: DirectoryStore, tmp_path: Path
) -> None:
    first = database(tmp_path, "first.db")
    agree_identity(first, store)
    store.delete([IDENTITY])
    for check in (agree_identity, check_identity):
        with pytest.raises(RefusedInput, match="was emptied, or is not mounted"):
            check(first, store)
    assert read_shared(store, IDENTITY) is None
    store.put(IDENTITY, b"another")
    with pytest.raises(RefusedInput, match=f"its {IDENTITY} is another, and this database"):
        agree_identity(first, store)


def test_of_two_databases_that_open_a_new_store_at_once_one_is_refused(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = database(tmp_path, "first.db"), database(tmp_path, "second.db")
    create = store.create

    def create_after_another(key: str, content: bytes) -> bool:
        monkeypatch.setattr(store, "create", create)
        agree_identity(second, store)
        return create(key, content)

    monkeypatch.setattr(store, "create", create_after_another)
    with pytest.raises(RefusedInput, match="belongs to another database"):
        agree_identity(first, store)
    check_identity(second, store)


def old_store(store: DirectoryStore) -> None:
    """What a server of before there were ids has put."""
    store.put("records/models/tiny/mine.json", b"{}")
    store.put("blobs/jobs/0123456789ab/00", b"rows")
    store.put(OBJECT, b"an object")


def test_a_store_from_before_ids_is_not_swept_for_a_database_without_its_rows(
    store: DirectoryStore, tmp_path: Path
) -> None:
    old_store(store)
    empty = database(tmp_path, "empty.db")
    for check in (agree_identity, check_identity):
        with pytest.raises(RefusedInput, match=r"records/models/tiny/mine.json, and no store-id"):
            check(empty, store)
    with pytest.raises(RefusedInput, match="ties the two"):
        Objects(empty).sweep(older_than=-60)
    assert store.exists(OBJECT) and not store.exists(IDENTITY)
    with empty.read() as session:
        assert session.query(SharedStoreIdentity).count() == 0


@pytest.mark.parametrize("row", ["model", "job", "object"])
def test_a_store_from_before_ids_is_tied_to_the_database_that_names_its_files(
    store: DirectoryStore, tmp_path: Path, row: str
) -> None:
    own = database(tmp_path, "own.db")
    kinds = {
        "model": (CustomModel, {"stored_id": "tiny:mine"}),
        "job": (Job, {"id": "0123456789ab"}),
        "object": (ObjectPiece, {"id": "ab" * 16}),
    }
    table, fields = kinds[row]
    with own.write() as session:
        session.execute(insert(table).values(**filled(table, **fields)))
    old_store(store)
    check_identity(own, store)
    agree_identity(own, store)
    assert read_shared(store, IDENTITY)
    check_identity(own, store)


def filled(table: type[Base], **fields: Any) -> dict[str, Any]:
    """A row with these ``fields``, and anything where it needs some."""
    plain: dict[type, Any] = {int: 1, str: "x", bool: False}
    for column in table.__table__.columns:
        if not column.nullable and column.default is None and column.name not in fields:
            is_time = isinstance(column.type, Moment)
            fields[column.name] = now() if is_time else plain.get(column.type.python_type, {})
    return fields


def test_the_work_of_a_worker_waits_for_the_store_of_its_database(
    store: DirectoryStore, tmp_path: Path
) -> None:
    own = database(tmp_path, "own.db")
    agree_identity(own, store)
    check_present(own, store)
    # The volume is not mounted: what is left is an empty folder.
    (tmp_path / "shared").rename(tmp_path / "mounted")
    (tmp_path / "shared").mkdir()
    with pytest.raises(SharedStoreAway, match="was emptied, or is not mounted"):
        check_present(own, DirectoryStore(tmp_path / "shared"))
