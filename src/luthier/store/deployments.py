"""Deployments: custom models that answer on demand, under ARNs of their own."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import UniqueConstraint, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.store.database import Base, now

CREATING, ACTIVE, FAILED = "Creating", "Active", "Failed"
UPDATING, UPDATED, NOT_UPDATED = "Updating", "UpdateCompleted", "UpdateFailed"


class Deployment(Base):
    """One deployment. A deleted one has no row."""

    __tablename__ = "deployments"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    model: Mapped[str] = mapped_column(index=True)
    """ARN of the custom model that answers."""
    description: Mapped[str | None]
    status: Mapped[str] = mapped_column(default=CREATING)
    failure: Mapped[str | None]
    next_model: Mapped[str | None] = mapped_column(index=True)
    """ARN of who is to answer, or was to in the last update."""
    update_status: Mapped[str | None]
    """``Updating``, ``UpdateCompleted`` or ``UpdateFailed``; none before the first update."""
    created: Mapped[datetime]
    modified: Mapped[datetime]


def unfinished(session: Session) -> list[str]:
    """Ids of those that wait for a model, of all accounts: a server that starts goes on with them."""
    waits = or_(Deployment.status == CREATING, Deployment.update_status == UPDATING)
    return list(session.scalars(select(Deployment.id).where(waits).order_by(Deployment.seq)))


def awaited(deployment: Deployment) -> str | None:
    """ARN of the custom model that a deployment waits for."""
    if deployment.status == CREATING:
        return deployment.model
    return deployment.next_model if deployment.update_status == UPDATING else None


def settle(deployment: Deployment, model: str, failure: str | None) -> None:
    """What came of preparing ``model``: it answers now, or ``failure`` says why not.

    Nothing changes where the deployment waits for another model meanwhile.
    """
    if awaited(deployment) != model:
        return
    if deployment.status == CREATING:
        deployment.status = FAILED if failure else ACTIVE
    elif failure:
        deployment.update_status = NOT_UPDATED
    else:
        deployment.model, deployment.update_status = model, UPDATED
    deployment.failure, deployment.modified = failure, now()


def uses(session: Session, model: str) -> bool:
    """Whether the ARN ``model`` is what a deployment answers with, or is about to."""
    about_to = (Deployment.next_model == model) & (Deployment.update_status == UPDATING)
    found = select(Deployment.seq).where(or_(Deployment.model == model, about_to))
    return session.scalar(found.limit(1)) is not None
