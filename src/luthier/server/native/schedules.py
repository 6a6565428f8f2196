"""Scheduled evaluations of the native API."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from luthier.server import schedules
from luthier.server.auto_retraining import describe, set_rule
from luthier.server.http.routes import Name
from luthier.server.native.deployments import deployment_faults
from luthier.server.native.measurements import EvaluationFields, request_of
from luthier.server.native.operations import Input, NativeCall, View, native_router
from luthier.server.promotion import find_deployment
from luthier.server.retraining import LEAST_NEW

router = native_router()


class NewSchedule(EvaluationFields):
    """Rows and graders of the evaluations of a deployment."""

    every: Literal["day", "week"]
    """Time between two evaluations. The first evaluation starts at once."""


class ScheduledResultView(View):
    """Result of a scheduled evaluation."""

    evaluation: str
    """Id of the evaluation."""
    created: datetime
    model: str
    """Model that was active."""
    state: str
    failure: str | None = None
    rows: int | None = None
    measure: str | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the score."""
    change: dict[str, Any] | None = None
    """Paired ``difference`` to the first evaluation on the same rows (``reference``), with ``error``,
    ``p_value``, ``significant`` and ``is_fall``."""


class ScheduleView(View):
    """Schedule of a deployment with results."""

    deployment: str
    every: str
    request: dict[str, Any]
    next_run: datetime
    skipped: str | None = None
    """Time and reason, if the last evaluation was skipped because of a quota."""
    results: list[ScheduledResultView]
    """The newest 100 results, oldest first."""


class DeletedScheduleView(View):
    """Response to the deletion of a schedule."""

    deployment: str


class RetrainingRule(Input):
    """Conditions for a draft of a retraining. Without a condition, the server prepares none."""

    rows: int | None = Field(default=None, ge=LEAST_NEW)
    """Number of newly rated requests."""
    on_alert: bool = False
    """After drift, a fall of ratings, or a fall of a scheduled evaluation."""
    auto: bool = False
    """Start the draft without approval."""


class RetrainingRuleView(View):
    """Conditions and the outcome of the last draft."""

    deployment: str
    rows: int | None = None
    on_alert: bool
    auto: bool
    note: str | None = None
    """Outcome of the last draft."""


@router.put("/deployments/{deployment}/retraining")
def set_retraining(call: NativeCall, deployment: Name, body: RetrainingRule) -> RetrainingRuleView:
    """Prepare drafts of retrainings from now on."""
    call.record(f"custom-model-deployment/{deployment}")
    context = call.context
    with deployment_faults():
        set_rule(
            context.locations, context.arns, call.account, deployment, body.rows, body.on_alert,
            body.auto,
        )  # fmt: skip
    return get_retraining(call, deployment)


@router.get("/deployments/{deployment}/retraining")
def get_retraining(call: NativeCall, deployment: Name) -> RetrainingRuleView:
    """Return the conditions for drafts of retrainings."""
    with call.context.database.read() as session, deployment_faults():
        endpoint = find_deployment(session, call.context.arns, call.account, deployment)
        return RetrainingRuleView.model_validate(describe(endpoint))


@router.put("/deployments/{deployment}/schedule")
def set_schedule(call: NativeCall, deployment: Name, body: NewSchedule) -> ScheduleView:
    """Evaluate a deployment now and regularly. Replaces the schedule and begins a new series."""
    call.record(f"custom-model-deployment/{deployment}")
    context, account = call.context, call.account
    request = request_of(context.locations, account, body)
    every = request.pop("every")
    with deployment_faults():
        schedules.set_schedule(context.locations, context.arns, account, deployment, every, request)
    return get_schedule(call, deployment)


@router.get("/deployments/{deployment}/schedule")
def get_schedule(call: NativeCall, deployment: Name) -> ScheduleView:
    """Return the schedule of a deployment with the series of results."""
    arns = call.context.arns
    with call.context.database.read() as session, deployment_faults():
        found = schedules.find_schedule(session, arns, call.account, deployment)
        view = schedules.describe(session, *found)
    return ScheduleView.model_validate(view)


@router.delete("/deployments/{deployment}/schedule")
def delete_schedule(call: NativeCall, deployment: Name) -> DeletedScheduleView:
    """End the scheduled evaluations of a deployment. The evaluations stay."""
    call.record(f"custom-model-deployment/{deployment}")
    context = call.context
    with deployment_faults():
        schedules.end_schedule(context.locations, context.arns, call.account, deployment)
    return DeletedScheduleView(deployment=deployment)
