"""Endpoints: models that serve requests under their own ARNs.

Deployments and provisioned throughput are two kinds of endpoints with different member and state
names in Bedrock.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import UniqueConstraint, and_, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base, now

DEPLOYMENT, PROVISIONED = "custom-model-deployment", "provisioned-model"
"""Kinds of endpoints, as in ARNs."""
CREATING, READY, FAILED = "Creating", "Ready", "Failed"
UPDATING, UPDATED, NOT_UPDATED = "Updating", "UpdateCompleted", "UpdateFailed"


class Endpoint(Base):
    """Endpoint. A deleted endpoint has no row."""

    __tablename__ = "endpoints"
    __table_args__ = (UniqueConstraint("account", "kind", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    account: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    """``DEPLOYMENT`` or ``PROVISIONED``."""
    name: Mapped[str]
    foundation: Mapped[str]
    """``provider.name`` of the foundation model, or a placeholder for a foreign root."""
    model: Mapped[str] = mapped_column(index=True)
    """ARN of the serving model: a custom model, or a foundation model with provisioned throughput."""
    next_model: Mapped[str | None] = mapped_column(index=True)
    """ARN of the next model, or of the model in the last update."""
    status: Mapped[str] = mapped_column(default=CREATING)
    """``CREATING``, ``READY`` or ``FAILED``."""
    update_status: Mapped[str | None]
    """``UPDATING``, ``UPDATED`` or ``NOT_UPDATED``; none before the first update."""
    failure: Mapped[str | None]
    description: Mapped[str | None]
    units: Mapped[int | None]
    """Model units of provisioned throughput."""
    commitment: Mapped[str | None]
    """Commitment of provisioned throughput: ``OneMonth`` or ``SixMonths``. Recorded without effect."""
    created: Mapped[datetime]
    modified: Mapped[datetime]

    @property
    def pending_model(self) -> str | None:
        """ARN of the next model during an update."""
        if self.status == CREATING:
            return self.model
        return self.next_model if self.update_status == UPDATING else None

    def finish_update(self, model: str, failure: str | None) -> None:
        """Finish the update to ``model``, or record the ``failure``.

        Nothing changes if the endpoint prepares a different model meanwhile. After a failed update,
        the previous model continues to serve.
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
    """Return the ids of updating endpoints of all accounts, for a starting server."""
    waits = or_(Endpoint.status == CREATING, Endpoint.update_status == UPDATING)
    return list(session.scalars(select(Endpoint.id).where(waits).order_by(Endpoint.seq)))


def endpoint_that_uses(session: Session, model: str) -> Endpoint | None:
    """Return an endpoint of the ARN ``model``, serving or updating, deployments first."""
    about_to = and_(Endpoint.next_model == model, Endpoint.update_status == UPDATING)
    found = select(Endpoint).where(or_(Endpoint.model == model, about_to))
    endpoint: Endpoint | None = session.scalar(found.order_by(Endpoint.kind, Endpoint.seq).limit(1))
    return endpoint
