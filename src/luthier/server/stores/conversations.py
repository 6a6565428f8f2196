"""Stored conversations: the responses and chat completions that clients can retrieve later."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from luthier.errors import DoesNotFit, QuotaExceeded, ReadOnlyDisk
from luthier.limits import AccountQuotas, ServerLimits
from luthier.server.tables import storage
from luthier.server.tables.database import Database, find_row, now, page_of
from luthier.server.tables.openai.conversations import StoredConversation

RESPONSE, COMPLETION = "response", "chat.completion"
_log = logging.getLogger("luthier.server")


class Conversations:
    """Stored conversations of all accounts. Safe to share between threads and processes."""

    def __init__(
        self, database: Database, quotas: Callable[[str], AccountQuotas], limits: ServerLimits
    ) -> None:
        self.database, self._quotas, self._limits = database, quotas, limits

    def put(
        self, account: str, kind: str, body: Mapping[str, Any], given: Mapping[str, Any]
    ) -> bool:
        """Store an object of the API with its input; return False if there is no space.

        The oldest objects of the account make room. A reply never fails because of the store.
        """
        if not self._limits.stored_conversations:
            return False
        size = len(json.dumps(body)) + len(json.dumps(given))
        quotas = self._quotas(account)
        try:
            with self.database.write() as session:
                mine = StoredConversation.account == account, StoredConversation.kind == kind
                newest = (
                    select(StoredConversation.seq)
                    .where(*mine)
                    .order_by(StoredConversation.seq.desc())
                    .offset(self._limits.stored_conversations - 1)
                    .limit(1)
                )
                last = session.scalar(newest)
                if last is not None:
                    _remove(session, account, *mine, StoredConversation.seq <= last)
                session.add(
                    StoredConversation(
                        account=account, id=body["id"], kind=kind, model=body["model"],
                        user_metadata=body.get("metadata") or {}, created=now(), body=dict(body),
                        given=dict(given),
                    )
                )  # fmt: skip
                session.flush()
                storage.charge(session, account, quotas, stored_bytes=size)
        except (QuotaExceeded, OperationalError, DoesNotFit, ReadOnlyDisk) as error:
            _log.warning("a conversation of account %s was not stored: %s", account, error)
            return False
        return True

    def get(self, account: str, kind: str, identifier: str) -> StoredConversation | None:
        """Return an object; None for an unknown, expired or foreign id."""
        with self.database.read() as session:
            query = self._visible(account, kind).where(StoredConversation.id == identifier)
            return find_row(session, query)

    def list(
        self,
        account: str,
        kind: str,
        limit: int,
        *,
        position: int | None = None,
        ascending: bool = True,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[StoredConversation]:
        """Return at most ``limit`` objects after ``position`` with the model and metadata."""
        query = self._visible(account, kind)
        if model is not None:
            query = query.where(StoredConversation.model == model)
        for name, value in (metadata or {}).items():
            query = query.where(StoredConversation.user_metadata[name].as_string() == value)
        with self.database.read() as session:
            seq = StoredConversation.seq
            return page_of(session, query, seq, limit=limit, position=position, ascending=ascending)

    def update(
        self, account: str, kind: str, identifier: str, metadata: Mapping[str, str]
    ) -> StoredConversation | None:
        """Replace the metadata of an object.

        Raises:
            QuotaExceeded: for longer metadata than the account has space for.
        """
        quotas = self._quotas(account)
        with self.database.write() as session:
            query = self._visible(account, kind).where(StoredConversation.id == identifier)
            row = find_row(session, query, lock=True)
            if row is not None:
                body = {**row.body, "metadata": dict(metadata)}
                more = len(json.dumps(body)) - len(json.dumps(row.body))
                storage.charge(session, account, quotas, stored_bytes=more)
                row.user_metadata, row.body = dict(metadata), body
            return row

    def delete(self, account: str, kind: str, identifier: str) -> bool:
        """Delete an object; return False for an unknown id."""
        with self.database.write() as session:
            mine = StoredConversation.account == account, StoredConversation.kind == kind
            return bool(_remove(session, account, *mine, StoredConversation.id == identifier))

    def remove_expired(self) -> None:
        """Delete expired objects of all accounts."""
        late = StoredConversation.created <= self._oldest()
        with self.database.read() as session:
            accounts = session.scalars(select(StoredConversation.account).where(late).distinct())
            found = accounts.all()
        for account in found:
            with self.database.write() as session:
                _remove(session, account, StoredConversation.account == account, late)

    def _visible(self, account: str, kind: str) -> Select[Any]:
        return select(StoredConversation).where(
            StoredConversation.account == account,
            StoredConversation.kind == kind,
            StoredConversation.created > self._oldest(),
        )

    def _oldest(self) -> datetime:
        return now() - timedelta(days=self._limits.conversation_days)


def _remove(session: Session, account: str, *conditions: ColumnElement[bool]) -> int:
    """Delete rows of an account with their storage, and return the number of rows."""
    size = func.length(StoredConversation.body) + func.length(StoredConversation.given)
    count, total = session.execute(select(func.count(), func.sum(size)).where(*conditions)).one()
    session.execute(delete(StoredConversation).where(*conditions))
    storage.release(session, account, stored_bytes=int(total or 0))
    return int(count)
