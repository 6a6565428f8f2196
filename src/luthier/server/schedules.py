"""Scheduled evaluations: the model behind a deployment, on the same rows every day or week.

The evaluations are leased work. The results are a series with intervals, and a significant fall is
announced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.server.auto_retraining import request_draft
from luthier.server.identifiers import model_name, stored_id_of
from luthier.server.jobs.measurements import check_measurement, columns_of, learned_columns
from luthier.server.jobs.submit import submit_report
from luthier.server.periodic import PeriodicThread
from luthier.server.promotion import UnknownName, find_deployment
from luthier.server.stores.locations import Locations
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import new_id, now
from luthier.server.tables.endpoints import Endpoint
from luthier.server.tables.jobs import ENDED
from luthier.server.tables.live.alerts import add_alert
from luthier.server.tables.measurements import (
    EVALUATION,
    PERIODS,
    EvaluationSchedule,
    MeasuredModel,
    Measurement,
    runs_of,
)

MOST_RESULTS = 100
"""Number of results in the view of a schedule."""
TICK = 5.0
"""Interval between two searches for due evaluations, in seconds."""


def set_schedule(
    locations: Locations, arns: Arns, account: str, deployment: str, every: str,
    request: Mapping[str, Any], file: str | None = None,
) -> None:  # fmt: skip
    """Evaluate a deployment now and then every ``day`` or ``week``.

    Replaces the schedule of the deployment, and begins a new series. Without ``columns``, the columns
    of the model's training rows apply if the rows have them. The file with the id ``file`` is deleted
    together with the schedule.

    Raises:
        RefusedInput: for an unknown deployment, or for evaluations that would fail.
    """
    database = locations.uploads.database
    with database.read() as session:
        endpoint = find_deployment(session, arns, account, deployment)
        measured = _model_of(session, endpoint)
    columns = request["columns"] or columns_of(
        locations, account, learned_columns(measured), request["rows"]
    )
    request = {**request, "columns": columns}
    check_measurement(locations, account, EVALUATION, request, [measured])
    made = EvaluationSchedule(
        id=new_id(), account=account, endpoint=endpoint.id, every=every, request=request,
        next_run=now(), created=now(), file=file,
    )  # fmt: skip
    with database.write() as session:
        find_deployment(session, arns, account, deployment, lock=True)
        old = session.scalar(select(EvaluationSchedule).filter_by(endpoint=endpoint.id))
        if old is not None:
            session.delete(old)
            session.flush()
        session.add(made)
    _delete_file(locations, old)


def end_schedule(locations: Locations, arns: Arns, account: str, deployment: str) -> None:
    """Delete the schedule of a deployment with its file. The evaluations stay.

    Raises:
        UnknownName: see :func:`find_schedule`.
    """
    with locations.uploads.database.write() as session:
        _, schedule = find_schedule(session, arns, account, deployment)
        session.delete(schedule)
    _delete_file(locations, schedule)


def _delete_file(locations: Locations, schedule: EvaluationSchedule | None) -> None:
    if schedule is not None and schedule.file:
        locations.uploads.delete(schedule.account, schedule.file)


def find_schedule(
    session: Session, arns: Arns, account: str, deployment: str
) -> tuple[Endpoint, EvaluationSchedule]:
    """Return a deployment and its schedule.

    Raises:
        UnknownName: for an unknown deployment, or a deployment without a schedule.
    """
    endpoint = find_deployment(session, arns, account, deployment)
    schedule = session.scalar(select(EvaluationSchedule).filter_by(endpoint=endpoint.id))
    if schedule is None:
        raise UnknownName(f'The deployment "{endpoint.name}" has no schedule.')
    return endpoint, schedule


def describe(session: Session, endpoint: Endpoint, schedule: EvaluationSchedule) -> dict[str, Any]:
    """Return a schedule with the series of its newest results, oldest first."""
    return {
        "deployment": endpoint.name,
        "every": schedule.every,
        "request": schedule.request,
        "next_run": schedule.next_run,
        "skipped": schedule.skipped,
        "results": [
            _result(session, each) for each in runs_of(session, schedule.id)[-MOST_RESULTS:]
        ],
    }


def list_schedules(session: Session, account: str) -> list[dict[str, Any]]:
    """Return the schedules of an account, each with the state and score of the last evaluation."""
    own = select(EvaluationSchedule, Endpoint).join(
        Endpoint, Endpoint.id == EvaluationSchedule.endpoint
    )
    found = []
    for schedule, endpoint in session.execute(own.where(Endpoint.account == account)):
        # Only the last report is read.
        last = [_result(session, run) for run in runs_of(session, schedule.id)[-1:]] or [{}]
        view = {
            "deployment": endpoint.name, "every": schedule.every,
            "next_run": schedule.next_run, "skipped": schedule.skipped,
        }  # fmt: skip
        found.append(view | {name: last[0].get(name) for name in ("state", "measure", "score")})
    return found


def _result(session: Session, run: Measurement) -> dict[str, Any]:
    report = run.result or {}
    measure, score = next(iter(report.get("scores", {}).items()), (None, None))
    return {
        "evaluation": run.id,
        "created": run.created,
        "model": model_name(session, run.models[0]["arn"]),
        "state": run.state,
        "failure": run.failure,
        "rows": report.get("rows"),
        "measure": measure,
        "score": score,
        "interval": report.get("intervals", {}).get(measure),
        "change": run.change,
    }


def _model_of(session: Session, endpoint: Endpoint) -> MeasuredModel:
    stored_id = stored_id_of(session, endpoint.model) or ""
    return MeasuredModel(name=endpoint.name, arn=endpoint.model, stored_id=stored_id)


class Schedules:
    """Thread that starts due evaluations and announces results."""

    def __init__(
        self, locations: Locations, limits: AccountQuotas, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.locations, self.limits, self.wake = locations, limits, wake
        self.database = locations.uploads.database
        self._ended: list[EvaluationSchedule] = []
        """Schedules of deleted deployments, whose files are not deleted yet."""
        self.thread = PeriodicThread(
            "schedules", self.tick, TICK, "scheduled evaluations could not be started"
        )

    def tick(self) -> None:
        """Start due evaluations, and announce the results since the last call."""
        ended = (
            select(EvaluationSchedule.id)
            .join(Measurement, Measurement.schedule == EvaluationSchedule.id)
            .where(Measurement.seq > EvaluationSchedule.announced, Measurement.state.in_(ENDED))
        )
        with self.database.read() as session:
            due = session.scalars(
                select(EvaluationSchedule.id).where(EvaluationSchedule.next_run <= now())
            ).all()
            new = session.scalars(ended.distinct()).all()
        for name, act in [
            *((each, self._start) for each in due),
            *((each, self._announce) for each in new),
        ]:
            with self.database.write() as session:
                # Another server may have done this since.
                schedule = session.get(EvaluationSchedule, name, with_for_update=True)
                if schedule is not None:
                    act(session, schedule)
        while self._ended:
            _delete_file(self.locations, self._ended.pop())
        if due:
            self.wake()

    def _start(self, session: Session, schedule: EvaluationSchedule) -> None:
        endpoint = session.scalar(select(Endpoint).where(Endpoint.id == schedule.endpoint))
        if endpoint is None:
            session.delete(schedule)
            self._ended.append(schedule)
            return
        moment = now()
        if schedule.next_run > moment:
            return
        period = PERIODS[schedule.every]
        # After a pause of the server, one evaluation stands for the missed evaluations.
        schedule.next_run += period * ((moment - schedule.next_run) // period + 1)
        try:
            submit_report(
                session, Measurement, schedule.account, schedule.request,
                [_model_of(session, endpoint)],
                quotas_of(session, schedule.account, self.limits),
                kind=EVALUATION, schedule=schedule.id,
            )  # fmt: skip
            schedule.skipped = None
        except QuotaExceeded as error:
            schedule.skipped = f"{moment:%Y-%m-%d %H:%M}: {error}"
            text = f"The scheduled evaluation of {endpoint.name} was skipped: {error}"
            key = f"skipped {schedule.id} {moment.isoformat()}"
            add_alert(session, schedule.account, "evaluation", endpoint.name, text, key)

    def _announce(self, session: Session, schedule: EvaluationSchedule) -> None:
        endpoint = session.scalar(select(Endpoint).where(Endpoint.id == schedule.endpoint))
        for run in runs_of(session, schedule.id, schedule.announced):
            if run.state not in ENDED:
                return
            schedule.announced = run.seq
            if endpoint is not None and (run.failure or (run.change or {}).get("is_fall")):
                text, key = alert_text(endpoint, run), f"evaluation {run.id}"
                add_alert(session, schedule.account, "evaluation", endpoint.name, text, key)
                if not run.failure:
                    reason, stored_id = "a scheduled evaluation fell", run.models[0]["stored_id"]
                    request_draft(session, schedule.account, stored_id, reason)


def alert_text(endpoint: Endpoint, run: Measurement) -> str:
    """Return the sentence of an alert: a significant fall, or a failed evaluation."""
    if run.change is None or not run.change["is_fall"]:
        return f"The scheduled evaluation {run.id} of {endpoint.name} failed: {run.failure}"
    measure, score = next(iter((run.result or {})["scores"].items()))
    difference, error = run.change["difference"], run.change["error"]
    return (
        f"{measure} of {endpoint.name} fell significantly to {score:.3g} "
        f"({difference:+.3g} \N{PLUS-MINUS SIGN} {error:.2g} since the evaluation "
        f"{run.change['reference']}). See the evaluation {run.id}."
    )
