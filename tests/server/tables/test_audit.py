"""The audit log in the database."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from principals_of import FIRST, OTHER

from luthier.server.tables.audit import Event, append, entries, entry_values
from luthier.server.tables.database import Database, now


def fill(database: Database, number: int = 5) -> None:
    for index in range(number):
        with database.write() as session:
            append(session, Event(f"bedrock:Act{index}", "arn:x", account=FIRST, user="ann"))


def test_audit_entry_is_part_of_transaction(database: Database) -> None:
    fill(database, 1)
    with suppress(KeyError), database.write() as session:
        append(session, Event("x:never"))
        raise KeyError
    with database.read() as session:
        assert len(entries(session)) == 1


def test_audit_entry_replaces_invalid_characters(database: Database) -> None:
    odd = "\x00\ud800é你" + "x" * 5000
    with database.write() as session:
        append(session, Event("x:y", odd, user=odd, details={"count": 3, "name": odd}))
    with database.read() as session:
        entry = entries(session)[0]
    assert entry.resource.startswith("\ufffd\ufffdé你")
    assert entry.details == {"count": 3, "name": "\ufffd\ufffdé你" + "x" * 5000}
    assert len(entry.resource) == 2048


def test_filters_of_audit_entries(database: Database) -> None:
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
        assert entry_values(recent[0])["action"] == "s3:PutObject"
