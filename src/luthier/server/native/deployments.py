"""Deployments: list, creation, history, promotion and rollback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.server import promotion
from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.identifiers import model_name
from luthier.server.native.operations import Input, NativeCall, Page, View, native_router
from luthier.server.tables.custom_models import LONGEST_NAME, NAME
from luthier.server.tables.database import lock_by_name
from luthier.server.tables.endpoints import DEPLOYMENT, UPDATING, Endpoint

router = native_router()


class NewDeployment(Input):
    """Name and model of a new deployment."""

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=f"^{NAME}$")]
    """Name that clients send as the model."""
    model: Annotated[str, Field(min_length=1)]
    """Name, id or ARN of a custom model."""


class DeploymentSummary(View):
    """A deployment without its history."""

    deployment: str
    status: str
    failure: str | None = None
    model: str
    """Name of the serving model."""
    next_model: str | None = None
    """Name of the model of a running update or canary."""
    canary_share: float | None = None
    """Share of users or sessions that the canary answers."""
    created: datetime
    modified: datetime


class DeploymentsView(View):
    """Deployments, newest first."""

    deployments: list[DeploymentSummary]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class PromotionRequest(Input):
    """The new model of a deployment."""

    model: Annotated[str, Field(min_length=1)]
    """Name, id or ARN of a custom model with the same task."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of users or sessions that the model answers first, as a canary."""
    answers: int | None = Field(default=None, ge=1)
    """Number of answers of the canary before the model serves all requests."""


class ChangeView(View):
    """A change of a deployment's model."""

    model: str
    """Name of the new model; the ARN of a deleted model."""
    action: str
    """``create``, ``promote`` or ``rollback``."""
    user: str
    state: str
    """``preparing``, ``canary``, ``switched`` or ``ended``."""
    requested: datetime
    finished: datetime | None = None
    """Time of the switch, or of the end without a switch."""
    note: str | None = None
    """Reason for the end."""


class ComparisonView(View):
    """A measure of canary and serving model."""

    measure: str
    """``errors``, ``latency``, ``rating``, ``thumb`` or ``outcome.NAME``."""
    canary: str
    serving: str
    evidence: float
    """Evidence for a worse canary; 1 is none."""
    needed: int
    """Evidence for a rollback."""


class CanaryView(View):
    """A running canary."""

    model: str
    share: float
    answers: int
    """Number of counted answers: one of each user or session."""
    promoted_at: int
    """Number of answers for the promotion."""
    comparisons: list[ComparisonView]


class DeploymentView(View):
    """A deployment with its history."""

    deployment: str
    status: str
    model: str
    """Name of the serving model."""
    model_arn: str
    earlier: str | None = None
    """Name of the model that a rollback restores; missing without an earlier model."""
    canary: CanaryView | None = None
    history: list[ChangeView]
    """Changes, oldest first."""


@router.get("/deployments")
def list_deployments(call: NativeCall, page: Annotated[Page, Query()]) -> DeploymentsView:
    """List deployments, newest first."""
    own = select(Endpoint).where(Endpoint.account == call.account, Endpoint.kind == DEPLOYMENT)
    if page.position is not None:
        own = own.where(Endpoint.seq < page.position)
    with call.context.database.read() as session:
        rows = session.scalars(own.order_by(Endpoint.seq.desc()).limit(page.limit + 1)).all()
        views = [
            DeploymentSummary(
                deployment=row.name, status=row.status, failure=row.failure,
                model=model_name(session, row.model),
                next_model=_next_model(session, row),
                canary_share=row.canary_share, created=row.created, modified=row.modified,
            )
            for row in rows[: page.limit]
        ]  # fmt: skip
    return DeploymentsView(deployments=views, next=page.next(rows))


@router.post("/deployments", status_code=201)
def create_deployment(call: NativeCall, body: NewDeployment) -> DeploymentView:
    """Deploy a custom model under a name. The server loads the model first."""
    context, quotas = call.context, call.context.quotas(call.account)
    call.record("custom-model-deployment/*")
    with context.database.write() as session, deployment_faults():
        lock_by_name(session, f"endpoints {call.account}")
        endpoint = promotion.deploy(
            session, context.arns, call.account, body.name, body.model, call.caller.user, quotas
        )
        call.record_created(f"custom-model-deployment/{endpoint.id}")
        return _view(call, session, body.name)


@router.get("/deployments/{deployment}")
def get_deployment_history(call: NativeCall, deployment: Name) -> DeploymentView:
    """Return a deployment with the history of its models."""
    with call.context.database.read() as session, deployment_faults():
        return _view(call, session, deployment)


@router.post("/deployments/{deployment}/promote")
def promote_deployment(
    call: NativeCall, deployment: Name, body: PromotionRequest
) -> DeploymentView:
    """Switch a deployment to a new model, after the server has loaded the model."""
    call.record(f"custom-model-deployment/{deployment}")
    with call.context.database.write() as session, deployment_faults():
        arns, user = call.context.arns, call.caller.user
        promotion.promote(
            session, arns, call.account, deployment, body.model, user, body.share, body.answers
        )
        return _view(call, session, deployment)


@router.post("/deployments/{deployment}/rollback")
def roll_back_deployment(call: NativeCall, deployment: Name) -> DeploymentView:
    """End the pending change of a deployment, or return to the model before."""
    call.record(f"custom-model-deployment/{deployment}")
    with call.context.database.write() as session, deployment_faults():
        arns, user = call.context.arns, call.caller.user
        promotion.roll_back(session, arns, call.account, deployment, user)
        return _view(call, session, deployment)


def _next_model(session: Session, row: Endpoint) -> str | None:
    updating = row.update_status == UPDATING and row.next_model is not None
    return model_name(session, row.next_model or "") if updating else None


def _view(call: NativeCall, session: Session, name: str) -> DeploymentView:
    endpoint = promotion.find_deployment(session, call.context.arns, call.account, name)
    return DeploymentView.model_validate(promotion.describe(session, endpoint))


@contextmanager
def deployment_faults() -> Iterator[None]:
    """Translate an unknown deployment or model to `ResourceNotFound`."""
    try:
        yield
    except promotion.UnknownName as unknown:
        raise Fault("ResourceNotFound", unknown.text) from unknown
