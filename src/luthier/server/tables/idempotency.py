"""Idempotency of requests with a client token.

Clients repeat a request without a reply, with the same token. The transaction that creates the
resource also stores the reply, so that after a crash either both exist or neither.
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
"""Time during which a client may repeat a request."""


class TokenReused(WrongState):
    """Error for a token that was used with different parameters."""


class AnsweredRequest(Base):
    """Reply to one request, stored for :data:`RETENTION`."""

    __tablename__ = "answered_requests"

    account: Mapped[str] = mapped_column(primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(primary_key=True)
    parameters: Mapped[str]
    """SHA-256 of the request's parameters."""
    answer: Mapped[dict[str, Any]]
    created: Mapped[datetime]


@dataclass(frozen=True)
class Attempt:
    """Request with a client token."""

    account: str
    operation: str
    token: str
    parameters: str
    """SHA-256 of the request's parameters."""

    @staticmethod
    def of(account: str, operation: str, token: str, members: Mapping[str, Any]) -> Attempt:
        """Return the request; the order of ``members``, plain values, does not matter."""
        text = json.dumps(members, sort_keys=True, separators=(",", ":"))
        return Attempt(account, operation, token, hashlib.sha256(text.encode()).hexdigest())


def recall(session: Session, attempt: Attempt) -> dict[str, Any] | None:
    """Return the stored reply to the same request; ``None`` for the first request.

    Simultaneous requests with the same token wait until this transaction ends.

    Raises:
        TokenReused: if the token was used with different parameters.
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
        raise TokenReused("The client request token was used before with different parameters.")
    return dict(found.answer)


def remember(session: Session, attempt: Attempt, answer: Mapping[str, Any]) -> None:
    """Store the reply in the transaction that creates the resource, and delete the account's
    expired replies."""
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
