"""Capture of requests to models: settings of accounts, and the index of captured requests.

The records are lines of objects in the account's built-in bucket. A row of the index has the
location of a record, and the columns that are searched without reading records.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base

DAYS, MOST_BYTES = 30, 10_000_000_000
"""Default retention of records."""
CAPTURES = "luthier-capture"
"""Bucket of each account with the records, unless a client chooses a different bucket."""


class CaptureSettings(Base):
    """Capture settings of one account."""

    __tablename__ = "capture_settings"

    account: Mapped[str] = mapped_column(primary_key=True)
    enabled: Mapped[bool]
    share: Mapped[float] = mapped_column(default=1.0)
    """Share of captured requests, from 0 to 1."""
    redact: Mapped[bool] = mapped_column(default=True)
    """True if personal data and secrets are replaced before anything is written."""
    days: Mapped[int] = mapped_column(default=DAYS)
    most_bytes: Mapped[int] = mapped_column(BigInteger, default=MOST_BYTES)
    """Maximum size of the objects with records; the oldest objects are deleted first."""
    bucket: Mapped[str] = mapped_column(default=CAPTURES)
    prefix: Mapped[str] = mapped_column(default="")
    """Prefix of the objects' keys."""
    logging: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """``loggingConfig`` as sent to the Bedrock API; empty if capture was enabled in another way."""
    second_rater: Mapped[float | None]
    """Share of answers to review that go to two raters, and the others to one; None for all answers
    to all raters."""
    checked: Mapped[datetime | None]
    """End of the last week whose health was checked."""


class CapturedRequest(Base):
    """Index row of a captured request."""

    __tablename__ = "captured_requests"
    __table_args__ = (
        UniqueConstraint("account", "id"),
        Index("captured_requests_by_response", "account", "response_id"),
        Index("captured_requests_by_time", "account", "created"),
        Index("captured_requests_by_key", "account", "key"),
    )

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    id: Mapped[str]
    """Request id in the headers of the response."""
    response_id: Mapped[str]
    """Id of the response object (``chatcmpl-…``); empty for responses without an id."""
    created: Mapped[datetime]
    operation: Mapped[str]
    model: Mapped[str]
    """Model as named by the client: a name, id or ARN, possibly of a deployment."""
    stored_id: Mapped[str]
    """Library id of the queried model; empty if the request failed early."""
    error: Mapped[str]
    """Code of the fault; empty for a successful request."""
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    milliseconds: Mapped[int]
    answers: Mapped[int | None]
    """Number of inputs or choices; None for a record of an earlier version."""
    user_metadata: Mapped[dict[str, Any]]
    """``requestMetadata`` or ``metadata`` of the request."""
    bucket: Mapped[str]
    key: Mapped[str]
    """Key of the object with the record."""
    offset: Mapped[int]
    """First byte of the record's gzip member in the object."""
    size: Mapped[int]
    """Size of the gzip member in bytes."""


class Feedback(Base):
    """A statement of a rater about a captured request. Rows are never changed."""

    __tablename__ = "feedback"
    __table_args__ = (Index("feedback_by_request", "request_seq"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    request_seq: Mapped[int] = mapped_column(ForeignKey("captured_requests.seq"))
    position: Mapped[int]
    """Number of the input or choice that the statement is about, from 0."""
    rater: Mapped[str]
    name: Mapped[str]
    """``thumb``, ``rating``, ``preferred``, ``corrected``, ``label``, ``comment``, or the name of an
    outcome after ``outcome.``."""
    value: Mapped[dict[str, Any]]
    """The value as ``{"value": …}``; an outcome also has ``higher_is_better``."""
    created: Mapped[datetime]


class ReviewLease(Base):
    """An answer in the queue of a rater. Other raters do not get the answer until the lease ends."""

    __tablename__ = "review_leases"

    request_seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rater: Mapped[str] = mapped_column(primary_key=True)
    ends: Mapped[datetime]


def find_captured(session: Session, account: str, identifier: str) -> CapturedRequest | None:
    """Return the captured request of the account by request id or response id."""
    ids = or_(CapturedRequest.id == identifier, CapturedRequest.response_id == identifier)
    return session.scalars(
        select(CapturedRequest).where(CapturedRequest.account == account, ids)
    ).first()
