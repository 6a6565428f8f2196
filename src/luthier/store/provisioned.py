"""Provisioned throughput: a model that answers under an ARN of its own with a share set aside."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import UniqueConstraint, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.store.database import Base, now

CREATING, IN_SERVICE, UPDATING, FAILED = "Creating", "InService", "Updating", "Failed"


class Provisioned(Base):
    """One of them. A deleted one has no row."""

    __tablename__ = "provisioned"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    foundation: Mapped[str]
    """``provider.name`` of the foundation model at the bottom; a stand-in where it is none of ours."""
    model: Mapped[str] = mapped_column(index=True)
    """ARN of who answers: a foundation model, or a custom model of the account."""
    next_model: Mapped[str] = mapped_column(index=True)
    """ARN of who is to answer; the same where nothing is being changed."""
    units: Mapped[int]
    commitment: Mapped[str | None]
    """``OneMonth`` or ``SixMonths``: recorded, it binds nobody."""
    status: Mapped[str] = mapped_column(default=CREATING)
    failure: Mapped[str | None]
    created: Mapped[datetime]
    modified: Mapped[datetime]


def unfinished(session: Session) -> list[str]:
    """Ids of those that wait for a model, of all accounts."""
    waits = Provisioned.status.in_((CREATING, UPDATING))
    return list(session.scalars(select(Provisioned.id).where(waits).order_by(Provisioned.seq)))


def awaited(provisioned: Provisioned) -> str | None:
    """ARN of the model that it waits for."""
    return provisioned.next_model if provisioned.status in (CREATING, UPDATING) else None


def settle(provisioned: Provisioned, model: str, failure: str | None) -> None:
    """What came of preparing ``model``: it answers now, or ``failure`` says why not.

    Nothing changes where another model is waited for meanwhile. After a failed update the old one
    goes on answering.
    """
    if awaited(provisioned) != model:
        return
    first = provisioned.status == CREATING
    if failure is None:
        provisioned.model, provisioned.status = model, IN_SERVICE
    else:
        provisioned.next_model = provisioned.model
        provisioned.status = FAILED if first else IN_SERVICE
    provisioned.failure, provisioned.modified = failure, now()


def uses(session: Session, model: str) -> bool:
    """Whether the ARN ``model`` is one that somebody's throughput answers with, or is about to."""
    found = select(Provisioned.seq)
    found = found.where(or_(Provisioned.model == model, Provisioned.next_model == model))
    return session.scalar(found.limit(1)) is not None
