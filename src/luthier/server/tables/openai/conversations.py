"""Stored conversations of the OpenAI API: responses and chat completions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from luthier.server.tables.database import Base, JSONText


class StoredConversation(Base):
    """A response or chat completion with its input."""

    __tablename__ = "stored_conversations"
    __table_args__ = (
        UniqueConstraint("account", "id"),
        Index("stored_conversations_by_kind", "account", "kind"),
    )

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    id: Mapped[str]
    kind: Mapped[str]
    """``response`` or ``chat.completion``."""
    model: Mapped[str]
    user_metadata: Mapped[dict[str, Any]]
    created: Mapped[datetime]
    body: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """The object of the API."""
    given: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """Input of the request: ``items`` of a response, including earlier turns, or ``messages``."""
