"""Replies to repeated requests."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import update

from luthier.server.tables.database import Database, now
from luthier.server.tables.idempotency import RETENTION, AnsweredRequest, Attempt, recall, remember


def test_remembered_response_expires_after_retention(database: Database) -> None:
    first, second, other = (
        Attempt.of(account, "create", token, {"name": "a"})
        for account, token in (("1", "one"), ("1", "two"), ("2", "one"))
    )
    with database.write() as session:
        remember(session, first, {"arn": "first"})
        remember(session, other, {"arn": "other"})
    with database.write() as session:
        assert recall(session, first) == {"arn": "first"}
        session.execute(
            update(AnsweredRequest).values(created=now() - RETENTION - timedelta(hours=1))
        )
    with database.write() as session:
        remember(session, second, {"arn": "second"})
    with database.write() as session:
        assert recall(session, first) is None
        assert recall(session, second) == {"arn": "second"}
        assert recall(session, other) == {"arn": "other"}
