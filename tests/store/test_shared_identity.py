"""A shared store belongs to one database: with another one it is refused before anything is swept."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.errors import RefusedInput
from luthier.store import shared
from luthier.store.database import Database
from luthier.store.objects import Objects
from luthier.store.schema import upgrade
from luthier.store.shared import DirectoryStore, read_shared
from luthier.store.shared_identity import IDENTITY, agree_identity, check_identity

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
