"""Requests that make something are carried out once, however often a client sends them.

Clients repeat a request that got no answer, with the same token. Its answer is kept in the
transaction that made the resource: either both are there after a crash, or neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import WrongState
from luthier.server.tables.database import Base, lock_by_name, now

RETENTION = timedelta(days=1)
"""How long a client may repeat a request: as long as temporary errors last, and then some."""


class TokenReused(WrongState):
    """The token came before, with other parameters."""


class AnsweredRequest(Base):
    """The answer to one request, kept for :data:`RETENTION`."""

    __tablename__ = "answered_requests"

    account: Mapped[str] = mapped_column(primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(primary_key=True)
    parameters: Mapped[str]
    """SHA-256 of what was asked."""
    answer: Mapped[dict[str, Any]]
    created: Mapped[datetime]


@dataclass(frozen=True)
class Attempt:
    """One sending of a request that carries a token."""

    account: str
    operation: str
    token: str
    parameters: str
    """SHA-256 of what is asked."""

    @staticmethod
    def of(account: str, operation: str, token: str, members: Mapping[str, Any]) -> Attempt:
        """``members`` are plain values, in any order."""
        text = json.dumps(members, sort_keys=True, separators=(",", ":"))
        return Attempt(account, operation, token, hashlib.sha256(text.encode()).hexdigest())


def recall(session: Session, attempt: Attempt) -> dict[str, Any] | None:
    """The answer that the same request got; ``None`` where it is the first.

    Another sending of it waits until this transaction ends.

    Raises:
        TokenReused: where the token came with other parameters.
    """
    lock_by_name(session, f"{attempt.account} {attempt.operation} {attempt.token}")
    found = session.get(
        AnsweredRequest,
        (attempt.account, attempt.operation, attempt.token),
        populate_existing=True,
    )
    if found is None:
        return None
    if found.parameters != attempt.parameters:
        raise TokenReused(
            "The provided client request token was used before with other parameters."
        )
    return dict(found.answer)


def remember(session: Session, attempt: Attempt, answer: Mapping[str, Any]) -> None:
    """Keep the answer, in the transaction that made what it names; old ones of the account go."""
    old = AnsweredRequest.account == attempt.account, AnsweredRequest.created < now() - RETENTION
    session.execute(delete(AnsweredRequest).where(*old))
    session.add(
        AnsweredRequest(
            account=attempt.account,
            operation=attempt.operation,
            token=attempt.token,
            parameters=attempt.parameters,
            answer=dict(answer),
            created=now(),
        )
    )
    session.flush()
