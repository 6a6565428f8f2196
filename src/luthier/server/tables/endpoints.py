"""Endpoints: models that serve requests under their own ARNs.

Deployments and provisioned throughput are two kinds of endpoints with different member and state
names in Bedrock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import UniqueConstraint, and_, delete, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables import audit
from luthier.server.tables.arns import Arn
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Base, Plain, now
from luthier.server.tables.live.canaries import delete_answers

DEPLOYMENT, PROVISIONED = "custom-model-deployment", "provisioned-model"
"""Kinds of endpoints, as in ARNs."""
CREATING, READY, FAILED = "Creating", "Ready", "Failed"
UPDATING, UPDATED, NOT_UPDATED = "Updating", "UpdateCompleted", "UpdateFailed"
PREPARING, CANARY, SWITCHED, ENDED = "preparing", "canary", "switched", "ended"
"""States of a change: loading, answering a share of the requests, successful, without success."""
CREATE, PROMOTE, ROLL_BACK = "create", "promote", "rollback"
"""Actions of a change."""


class AutoRetraining(TypedDict):
    """Rule for the drafts of retrainings that the server prepares."""

    rows: int | None
    """Number of newly rated requests for a draft."""
    on_alert: bool
    """True if drift or a fall of ratings or scores causes a draft."""
    auto: bool
    """True if drafts start without approval."""
    since: str
    """Time from which new ratings count, in ISO 8601."""
    reason: str | None
    """Reason of an alert for the next draft."""
    note: str | None
    """Outcome of the last draft."""


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
    canary_share: Mapped[float | None]
    """Share of the requests that ``next_model`` answers; none without a running canary."""
    retraining: Mapped[AutoRetraining | None] = mapped_column(Plain, nullable=True)
    created: Mapped[datetime]
    modified: Mapped[datetime]

    @property
    def pending_model(self) -> str | None:
        """ARN of the next model during an update."""
        if self.status == CREATING:
            return self.model
        updating = self.update_status == UPDATING and self.canary_share is None
        return self.next_model if updating else None

    def begin_change(self, session: Session, change: DeploymentChange) -> None:
        """Make ``change`` the pending change. An unfinished change ends."""
        self.end_change(session, f"Replaced by {change.user} with a later change.")
        session.add(change)
        self.next_model, self.update_status = change.model, UPDATING
        self.failure, self.modified = None, now()

    def finish_update(self, session: Session, model: str, failure: str | None) -> None:
        """Finish the update to ``model``, start the model as a canary, or record the ``failure``.

        Nothing changes if the endpoint prepares a different model meanwhile. After a failed update,
        the previous model continues to serve.
        """
        if self.pending_model != model:
            return
        change = open_change(session, self.id)
        if self.status == CREATING:
            self.status = FAILED if failure else READY
            self.failure, self.modified = failure, now()
            if change is not None:
                change.end(failure)
        elif failure:
            self.end_change(session, failure)
            self.update_status, self.failure, self.modified = NOT_UPDATED, failure, now()
        elif change is not None and change.share is not None:
            self.canary_share, change.state, self.modified = change.share, CANARY, now()
            self._audit(session, change, "canary")
        else:
            self.switch(session)

    def switch(self, session: Session, note: str | None = None, user: str | None = None) -> None:
        """Make the next model the serving model. The audit log has ``user``, or else the user of the
        change."""
        change, model = open_change(session, self.id), self.next_model
        if model is None:
            return
        arn = Arn.parse(model)
        custom = arn and session.scalar(select(CustomModel).where(CustomModel.id == arn.id))
        if custom:
            self.foundation = custom.bottom
        self.model, self.update_status, self.canary_share = model, UPDATED, None
        self.failure, self.modified = None, now()
        if change is not None:
            change.end(None, note)
            delete_answers(session, [change.seq])
            self._audit(session, change, "switch", user)

    def end_change(self, session: Session, note: str, user: str | None = None) -> None:
        """End the pending change or canary, if any. The serving model stays."""
        change = open_change(session, self.id)
        if change is not None:
            change.end(note)
            delete_answers(session, [change.seq])
            self._audit(session, change, "end", user)
            self.update_status, self.failure, self.canary_share = NOT_UPDATED, note, None
            self.modified = now()

    def _audit(
        self, session: Session, change: DeploymentChange, event: str, user: str | None = None
    ) -> None:
        details = {
            "model": change.model, "previous": change.previous, "share": change.share,
            "note": change.note,
        }  # fmt: skip
        audit.append(
            session,
            audit.Event(
                f"luthier:deployment.{event}", f"{self.account}/{self.name}", account=self.account,
                user=user or change.user,
                details={name: value for name, value in details.items() if value is not None},
            ),
        )  # fmt: skip


class DeploymentChange(Base):
    """A change of a deployment's model: a row of the deployment's history."""

    __tablename__ = "deployment_changes"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    endpoint: Mapped[str] = mapped_column(index=True)
    """Id of the deployment."""
    action: Mapped[str]
    """``CREATE``, ``PROMOTE`` or ``ROLL_BACK``."""
    model: Mapped[str]
    """ARN of the new model."""
    previous: Mapped[str | None]
    """ARN of the model that a rollback of this change returns to."""
    user: Mapped[str]
    requested: Mapped[datetime]
    finished: Mapped[datetime | None]
    """Time of the switch, or of the end without a switch."""
    state: Mapped[str]
    """``PREPARING``, ``CANARY``, ``SWITCHED`` or ``ENDED``."""
    note: Mapped[str | None]
    """Reason for the end, or figures of the canary."""
    share: Mapped[float | None]
    """Share of the requests for the new model before the switch."""
    answers: Mapped[int | None]
    """Number of the canary's answers after which the new model serves all requests."""

    @staticmethod
    def of(
        endpoint: str, action: str, model: str, previous: str | None, user: str, **values: Any
    ) -> DeploymentChange:
        """Return a new change that is being prepared."""
        return DeploymentChange(
            endpoint=endpoint, action=action, model=model, previous=previous, user=user,
            requested=now(), state=PREPARING, **values,
        )  # fmt: skip

    def end(self, failure: str | None, note: str | None = None) -> None:
        """End the change, with the ``failure`` or as the switch to the model."""
        self.state, self.finished = ENDED if failure else SWITCHED, now()
        self.note = failure or note


def open_change(session: Session, endpoint: str) -> DeploymentChange | None:
    """Return the change of the deployment that has not finished."""
    session.flush()
    unfinished = DeploymentChange.state.in_((PREPARING, CANARY))
    found: DeploymentChange | None = session.scalar(
        select(DeploymentChange).where(DeploymentChange.endpoint == endpoint, unfinished)
    )
    return found


def changes_of(session: Session, endpoint: str) -> Sequence[DeploymentChange]:
    """Return the changes of a deployment, oldest first."""
    mine = DeploymentChange.endpoint == endpoint
    return session.scalars(
        select(DeploymentChange).where(mine).order_by(DeploymentChange.seq)
    ).all()


def delete_changes(session: Session, endpoint: str) -> None:
    """Delete the history of a deployment."""
    delete_answers(session, [each.seq for each in changes_of(session, endpoint)])
    session.execute(delete(DeploymentChange).where(DeploymentChange.endpoint == endpoint))


def unfinished_ids(session: Session) -> list[str]:
    """Return the ids of endpoints of all accounts whose next model must be prepared."""
    updating = and_(Endpoint.update_status == UPDATING, Endpoint.canary_share.is_(None))
    waits = or_(Endpoint.status == CREATING, updating)
    return list(session.scalars(select(Endpoint.id).where(waits).order_by(Endpoint.seq)))


def endpoint_that_uses(session: Session, model: str) -> Endpoint | None:
    """Return an endpoint of the ARN ``model``, serving or updating, deployments first."""
    about_to = and_(Endpoint.next_model == model, Endpoint.update_status == UPDATING)
    found = select(Endpoint).where(or_(Endpoint.model == model, about_to))
    endpoint: Endpoint | None = session.scalar(found.order_by(Endpoint.kind, Endpoint.seq).limit(1))
    return endpoint
