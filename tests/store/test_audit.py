"""The audit log: a chain that shows every change to it, whoever writes at once."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from principals_of import FIRST, OTHER, made_at
from sqlalchemy import text

from luthier.errors import CorruptFile
from luthier.store import accounts, principals
from luthier.store.audit import (
    MARK,
    Event,
    append,
    entries,
    entry_values,
    last,
    read_mark,
    verify,
    write_mark,
)
from luthier.store.database import Database, now


def fill(database: Database, number: int = 5) -> None:
    for index in range(number):
        with database.write() as session:
            append(session, Event(f"bedrock:Act{index}", "arn:x", account=FIRST, user="ann"))


def broken(database: Database, noted: str | None = None) -> tuple[int, str] | None:
    with database.read() as session:
        found = verify(session, noted)
        return (found.seq, found.reason) if found else None


def head_of(database: Database) -> tuple[int, str]:
    with database.read() as session:
        return last(session)


def test_an_empty_log_is_intact(database: Database) -> None:
    assert broken(database) is None
    assert head_of(database) == (0, "0" * 64)


def test_entries_are_chained(database: Database) -> None:
    fill(database, 3)
    assert broken(database) is None
    with database.read() as session:
        newest, middle, oldest = entries(session)
    assert [newest.seq, middle.seq, oldest.seq] == [3, 2, 1]
    assert (oldest.previous, middle.previous) == ("0" * 64, oldest.hash)
    assert head_of(database) == (3, newest.hash)
    assert entry_values(newest)["action"] == "bedrock:Act2"


@pytest.mark.parametrize(
    ("change", "seq"),
    [
        ("UPDATE audit_log SET \"user\"='bob' WHERE seq=3", 3),
        ("UPDATE audit_log SET outcome='AccessDenied' WHERE seq=1", 1),
        ("UPDATE audit_log SET at=CURRENT_TIMESTAMP WHERE seq=5", 5),
        ("UPDATE audit_log SET details='[1]' WHERE seq=2", 2),
        ("UPDATE audit_log SET hash=previous WHERE seq=2", 2),
        ("UPDATE audit_log SET previous=hash WHERE seq=4", 4),
        ("DELETE FROM audit_log WHERE seq=1", 1),
        ("DELETE FROM audit_log WHERE seq=3", 3),
        ("DELETE FROM audit_log WHERE seq=5", 5),
        ("DELETE FROM audit_log", 1),
        ("UPDATE audit_log SET seq=9 WHERE seq=5", 5),
        ("UPDATE audit_head SET seq=4", 6),
        ("DELETE FROM audit_head", 6),
        (
            "INSERT INTO audit_log SELECT 6, at, account, action, resource, outcome, outcome,"
            " request_id, address, details, previous, hash FROM audit_log WHERE seq=5",
            6,
        ),
    ],
)
def test_what_was_changed_is_found(database: Database, change: str, seq: int) -> None:
    fill(database)
    with database.write() as session:
        session.execute(text(change))
    found = broken(database)
    assert found is not None
    assert found[0] == seq


def test_a_log_that_was_written_anew(database: Database) -> None:
    """Whole in itself; a hash that was noted elsewhere tells."""
    fill(database)
    noted = head_of(database)[1]
    fill(database, 2)
    assert broken(database, noted) is None
    with database.write() as session:
        session.execute(text("DELETE FROM audit_log"))
        session.execute(text("DELETE FROM audit_head"))
    fill(database, 7)
    assert broken(database) is None
    assert broken(database, noted) == (7, "the noted hash does not stand in the log")


def test_writers_at_once(database: Database) -> None:
    def write(name: str) -> None:
        for index in range(10):
            with database.write() as session:
                append(session, Event(f"x:{name}{index}"), Event("x:second"))

    threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert head_of(database)[0] == 160
    assert broken(database) is None


def test_an_entry_is_part_of_its_transaction(database: Database) -> None:
    fill(database, 1)
    with suppress(KeyError), database.write() as session:
        append(session, Event("x:never"))
        raise KeyError
    assert head_of(database)[0] == 1
    fill(database, 1)
    assert broken(database) is None


def test_odd_values(database: Database) -> None:
    odd = "\x00\ud800é你" + "x" * 5000
    with database.write() as session:
        append(session, Event("x:y", odd, user=odd, details={"count": 3, "name": odd}))
    assert broken(database) is None
    with database.read() as session:
        entry = entries(session)[0]
    assert entry.resource.startswith("\ufffd\ufffdé你")
    assert entry.details == {"count": 3, "name": "\ufffd\ufffdé你" + "x" * 5000}
    assert len(entry.resource) == 2048


def test_looking_for_entries(database: Database) -> None:
    fill(database, 4)
    with database.write() as session:
        append(session, Event("s3:PutObject", "b", account=OTHER, user="bob"))
        append(session, Event("x:old", at=now() - timedelta(days=2)))
    with database.read() as session:
        assert [each.seq for each in entries(session, account=FIRST)] == [4, 3, 2, 1]
        assert [each.seq for each in entries(session, user="bob")] == [5]
        assert [each.seq for each in entries(session, action="act2")] == [3]
        assert [each.seq for each in entries(session, action="%")] == []
        assert [each.seq for each in entries(session, limit=2, before=4)] == [3, 2]
        recent = entries(session, since=now() - timedelta(days=1))
        assert [each.seq for each in recent] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE audit_log SET at='yesterday' WHERE seq=3", "cannot be read"),
        ("UPDATE audit_log SET at=7 WHERE seq=3", "cannot be read"),
        ("UPDATE audit_log SET at='0001-01-01 00:00:00.000000' WHERE seq=3", "its hash is not"),
        ("UPDATE audit_log SET details='{' WHERE seq=3", "cannot be read"),
        ("UPDATE audit_log SET details=7 WHERE seq=3", "its hash is not"),
        ("UPDATE audit_log SET details='{\"a\": 1e999}' WHERE seq=3", "cannot be read"),
        (f"UPDATE audit_log SET details='{'[' * 200_000}' WHERE seq=3", "cannot be read"),
        ("UPDATE audit_log SET action=CAST(x'ff' AS TEXT) WHERE seq=3", "cannot be read"),
        ("UPDATE audit_log SET hash=x'ff' WHERE seq=3", "its hash is not"),
    ],
)
def test_what_cannot_be_read_is_named(luthier_home: Path, change: str, reason: str) -> None:
    """SQLite keeps anything in any column."""
    for database in made_at(f"sqlite:///{luthier_home / 'luthier.db'}"):
        fill(database)
        with database.write() as session:
            session.connection().exec_driver_sql(change)
        found = broken(database)
        assert found is not None
        assert found[0] == 3 and reason in found[1]
        if "cannot" in reason and "1e999" not in change:
            with database.read() as session, pytest.raises(CorruptFile, match="audit verify"):
                entries(session)
        with database.read() as session:
            assert [each.seq for each in entries(session, before=3)] == [2, 1]


def test_times_without_end_are_named(postgres: Any) -> None:
    for database in made_at(postgres.new_database()):
        fill(database)
        with database.write() as session:
            session.execute(text("UPDATE audit_log SET at='infinity' WHERE seq=3"))
        found = broken(database)
        assert found is not None and found[0] == 3 and "cannot be read" in found[1]


@pytest.mark.parametrize("change", ["seq='many'", "hash=x'ff'", "hash=CAST(x'ff' AS TEXT)"])
def test_an_end_that_cannot_be_read(luthier_home: Path, change: str) -> None:
    for database in made_at(f"sqlite:///{luthier_home / 'luthier.db'}"):
        fill(database)
        with database.write() as session:
            session.connection().exec_driver_sql(f"UPDATE audit_head SET {change}")
        found = broken(database)
        assert found is not None and "last entry" in found[1]


def test_an_emptied_log_is_not_intact_in_a_store_that_holds_something(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, FIRST)
        principals.create_user(session, FIRST, "ann", role="administrator")
        append(session, Event("luthier:admin.users.create"))
    assert broken(database) is None
    with database.write() as session:
        session.execute(text("DELETE FROM audit_log"))
        session.execute(text("DELETE FROM audit_head"))
    found = broken(database)
    assert found is not None
    assert found[0] == 1 and "holds users (1)" in found[1]


@pytest.mark.parametrize("left", [0, 2])
def test_a_log_that_is_cut_is_noticed_by_what_the_store_notes(
    database: Database, luthier_home: Path, left: int
) -> None:
    def checked() -> tuple[int, str] | None:
        with database.read() as session:
            found = verify(session, mark=read_mark(luthier_home))
            return (found.seq, found.reason) if found else None

    def marked() -> bool:
        with database.read() as session:
            return write_mark(session, luthier_home)

    assert checked() is None and marked()
    fill(database, 3)
    assert checked() is None and marked()
    fill(database, 2)
    assert checked() is None and marked() and marked()
    with database.write() as session:
        session.execute(text("DELETE FROM audit_log WHERE seq > :left"), {"left": left})
        session.execute(text("DELETE FROM audit_head"))
        if left:
            taken = "SELECT 1, seq, hash FROM audit_log WHERE seq = 2"
            session.execute(text(f"INSERT INTO audit_head (id, seq, hash) {taken}"))
    found = checked()
    assert found is not None and found[0] == left + 1 and "notes entry 5" in found[1]
    # It goes on, and gets longer than it was: what was noted stays so.
    fill(database, 6)
    assert not marked()
    found = checked()
    assert found is not None and found[0] == 5 and MARK in found[1]
    (luthier_home / MARK).write_text("[]")
    with pytest.raises(CorruptFile, match=r"audit\.json"):
        checked()
