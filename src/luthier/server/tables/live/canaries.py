"""Answers of requests to deployments with a canary."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ForeignKey, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base
from luthier.server.tables.live.captures import CapturedRequest, Feedback


class CanaryAnswer(Base):
    """Answer of the canary or of the serving model, as long as the canary runs."""

    __tablename__ = "canary_answers"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    change: Mapped[int] = mapped_column(ForeignKey("deployment_changes.seq"), index=True)
    request_id: Mapped[str] = mapped_column(index=True)
    unit: Mapped[str]
    """Hash of the user, session or request."""
    is_new: Mapped[bool]
    """True for an answer of the canary."""
    failed: Mapped[bool]
    milliseconds: Mapped[int]


def answers_of(session: Session, change: int) -> Sequence[CanaryAnswer]:
    """Return the first answers of each user, session or request, oldest first."""
    mine = CanaryAnswer.change == change
    first = select(func.min(CanaryAnswer.seq)).where(mine)
    # The first answer without failure counts for the latency.
    first = first.group_by(CanaryAnswer.unit, CanaryAnswer.failed)
    rows = select(CanaryAnswer).where(CanaryAnswer.seq.in_(first)).order_by(CanaryAnswer.seq)
    return session.scalars(rows).all()


def feedback_of(session: Session, account: str, change: int) -> list[tuple[CanaryAnswer, Feedback]]:
    """Return the feedback about the answers, oldest first."""
    query = (
        select(CanaryAnswer, Feedback)
        .join(CapturedRequest, CapturedRequest.id == CanaryAnswer.request_id)
        .join(Feedback, Feedback.request_seq == CapturedRequest.seq)
        .where(CanaryAnswer.change == change, CapturedRequest.account == account)
        .order_by(Feedback.seq)
    )
    return [(answer, feedback) for answer, feedback in session.execute(query)]


def delete_answers(session: Session, changes: Sequence[int]) -> None:
    """Delete the answers of ended canaries."""
    session.execute(delete(CanaryAnswer).where(CanaryAnswer.change.in_(changes)))
