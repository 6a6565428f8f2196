"""Endpoints: models that answer under ARNs of their own. Deployments and provisioned throughput are two
kinds of them; what differs is how Bedrock calls their members and states.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import UniqueConstraint, and_, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base, now

DEPLOYMENT, PROVISIONED = "custom-model-deployment", "provisioned-model"
"""The kinds, as ARNs name them."""
CREATING, READY, FAILED = "Creating", "Ready", "Failed"
UPDATING, UPDATED, NOT_UPDATED = "Updating", "UpdateCompleted", "UpdateFailed"


class Endpoint(Base):
    """One endpoint. A deleted one has no row."""

    __tablename__ = "endpoints"
    __table_args__ = (UniqueConstraint("account", "kind", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
    account: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    """``DEPLOYMENT`` or ``PROVISIONED``."""
    name: Mapped[str]
    foundation: Mapped[str]
    """``provider.name`` of the foundation model at the bottom; a stand-in where it is none of ours."""
    model: Mapped[str] = mapped_column(index=True)
    """ARN of who answers: a custom model of the account or, where provisioned, a foundation model."""
    next_model: Mapped[str | None] = mapped_column(index=True)
    """ARN of who is to answer, or was to in the last update."""
    status: Mapped[str] = mapped_column(default=CREATING)
    """``CREATING``, ``READY`` or ``FAILED``."""
    update_status: Mapped[str | None]
    """``UPDATING``, ``UPDATED`` or ``NOT_UPDATED``; none before the first update."""
    failure: Mapped[str | None]
    description: Mapped[str | None]
    """Of a deployment."""
    units: Mapped[int | None]
    """Of provisioned throughput."""
    commitment: Mapped[str | None]
    """Of provisioned throughput, ``OneMonth`` or ``SixMonths``: recorded, it binds nobody."""
    created: Mapped[datetime]
    modified: Mapped[datetime]

    @property
    def pending_model(self) -> str | None:
        """ARN of the model that it waits for."""
        if self.status == CREATING:
            return self.model
        return self.next_model if self.update_status == UPDATING else None

    def finish_update(self, model: str, failure: str | None) -> None:
        """What came of preparing ``model``: it answers now, or ``failure`` says why not.

        Nothing changes where another model is waited for meanwhile. After an update that failed the old
        model goes on answering.
        """
        if self.pending_model != model:
            return
        if self.status == CREATING:
            self.status = FAILED if failure else READY
        elif failure:
            self.update_status = NOT_UPDATED
        else:
            self.model, self.update_status = model, UPDATED
        self.failure, self.modified = failure, now()


def unfinished_ids(session: Session) -> list[str]:
    """Ids of those that wait for a model, of all accounts: a server that starts goes on with them."""
    waits = or_(Endpoint.status == CREATING, Endpoint.update_status == UPDATING)
    return list(session.scalars(select(Endpoint.id).where(waits).order_by(Endpoint.seq)))


def endpoint_that_uses(session: Session, model: str) -> Endpoint | None:
    """An endpoint that answers with the ARN ``model``, or is about to; deployments first."""
    about_to = and_(Endpoint.next_model == model, Endpoint.update_status == UPDATING)
    found = select(Endpoint).where(or_(Endpoint.model == model, about_to))
    endpoint: Endpoint | None = session.scalar(found.order_by(Endpoint.kind, Endpoint.seq).limit(1))
    return endpoint
