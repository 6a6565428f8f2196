"""Drafts of retrainings that the server prepares: after new ratings, or after drift."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.errors import LuthierError, RefusedInput
from luthier.limits import AccountQuotas
from luthier.server import retraining
from luthier.server.identifiers import model_name, stored_id_of
from luthier.server.live.feedback import RATINGS
from luthier.server.live.rows import requests_to
from luthier.server.promotion import find_deployment
from luthier.server.stores.locations import Locations
from luthier.server.tables import jobs
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import now
from luthier.server.tables.endpoints import DEPLOYMENT, AutoRetraining, Endpoint
from luthier.server.tables.live.alerts import add_alert
from luthier.server.tables.live.captures import DAYS, CapturedRequest, CaptureSettings, Feedback


def set_rule(
    locations: Locations, arns: Arns, account: str, deployment: str, rows: int | None,
    on_alert: bool, auto: bool,
) -> None:  # fmt: skip
    """Prepare drafts for a deployment from now on; neither ``rows`` nor ``on_alert`` ends this.

    Args:
        rows: number of rated requests since the last draft.
        on_alert: if drift, a fall of ratings, or a fall of a scheduled evaluation causes a draft.
        auto: if the draft starts without approval.

    Raises:
        UnknownName: for an unknown deployment.
        RefusedInput: for a model that cannot be retrained, or a missing condition.
    """
    if rows is not None and rows < retraining.LEAST_NEW:
        raise RefusedInput(f"`rows` must be at least {retraining.LEAST_NEW}", setting="rows")
    if auto and rows is None and not on_alert:
        raise RefusedInput("`auto` needs `rows` or `on_alert`", setting="auto")
    database = locations.uploads.database
    with database.read() as session:
        name = find_deployment(session, arns, account, deployment).name
        if rows or on_alert:
            retraining.check_supported(retraining.find_active(session, arns, account, name))
    rule = AutoRetraining(
        rows=rows, on_alert=on_alert, auto=auto, since=now().isoformat(), reason=None, note=None
    )
    with database.write() as session:
        endpoint = find_deployment(session, arns, account, deployment, lock=True)
        endpoint.retraining = rule if rows or on_alert else None


def describe(endpoint: Endpoint) -> dict[str, Any]:
    """Return the rule of a deployment."""
    off = {"rows": None, "on_alert": False, "auto": False, "reason": None, "note": None}
    return {"deployment": endpoint.name, **off, **(endpoint.retraining or {})}


def request_draft(session: Session, account: str, stored_id: str, reason: str) -> None:
    """Note a reason for the drafts of deployments of a model, in the caller's transaction."""
    own = Endpoint.account == account, Endpoint.retraining.is_not(None)
    for endpoint in session.scalars(select(Endpoint).where(*own)):
        rule = endpoint.retraining
        if rule and rule["on_alert"] and stored_id_of(session, endpoint.model) == stored_id:
            endpoint.retraining = {**rule, "reason": reason}


def prepare_drafts(locations: Locations, arns: Arns, limits: AccountQuotas) -> None:
    """Prepare the due drafts of all accounts, and add alerts."""
    database = locations.uploads.database
    with database.read() as session:
        ruled = Endpoint.kind == DEPLOYMENT, Endpoint.retraining.is_not(None)
        due = [
            each.id for each in session.scalars(select(Endpoint).where(*ruled))
            if _reason(session, each)
        ]  # fmt: skip
    for name in due:
        with database.write() as session:
            endpoint = session.scalars(
                select(Endpoint).filter_by(id=name).with_for_update()
            ).one_or_none()
            rule, reason = endpoint and endpoint.retraining, endpoint and _reason(session, endpoint)
            if not (endpoint and rule and reason):
                continue  # another server prepares the draft
            endpoint.retraining = {**rule, "since": now().isoformat(), "reason": None}
            settings = session.get(CaptureSettings, endpoint.account)
            quotas = quotas_of(session, endpoint.account, limits)
        account, deployment = endpoint.account, endpoint.name
        since = now() - timedelta(days=settings.days if settings else DAYS)
        try:
            job = retraining.draft(locations, arns, account, deployment, since, quotas=quotas)
            counts = job.details["retraining"]["rows"]
            text = f"The draft {job.name} with {counts['new']} new rows is ready: {reason}. "
            if rule["auto"]:
                retraining.start(database, arns, account, deployment)
                text += "Its training has started."
            else:
                text += "Resume the job to start its training."
        except LuthierError as error:
            text = f"No draft of a retraining ({reason}): {error}"
        with database.write() as session:
            found = session.scalar(select(Endpoint).filter_by(id=name))
            if found is not None and found.retraining:
                found.retraining = {**found.retraining, "note": text}
            key = f"retraining {name} {now().isoformat()}"
            add_alert(session, account, "retraining", deployment, text, key)


def _reason(session: Session, endpoint: Endpoint) -> str | None:
    """Return the reason for a draft; None if no draft is due."""
    rule = endpoint.retraining
    job = retraining.latest(session, endpoint.account, endpoint.name)
    running = job is not None and job.state not in jobs.ENDED and not retraining.is_draft(job)
    if rule is None or running:
        return None
    reason, rows = rule["reason"], rule["rows"]
    # Drift and falls last until another model serves: without new ratings, a second draft for the same
    # model would be the first again.
    serving = stored_id_of(session, endpoint.model)
    tried = None if job is None or retraining.is_draft(job) else job.details["retraining"]
    if reason and (tried is None or tried["stored_id"] != serving):
        return reason
    if not reason and rows is None:
        return None
    name = model_name(session, endpoint.model)
    requests = requests_to(endpoint.account, name).order_by(None)
    count = session.scalar(
        select(func.count(Feedback.request_seq.distinct())).where(
            Feedback.request_seq.in_(requests.with_only_columns(CapturedRequest.seq)),
            Feedback.created > datetime.fromisoformat(rule["since"]),
            Feedback.name.in_(RATINGS),
        )
    )
    if reason and (count or 0) >= retraining.LEAST_NEW:
        return reason
    return f"{count} newly rated requests" if rows is not None and (count or 0) >= rows else None
