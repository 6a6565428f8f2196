"""Health with input drift, and the weekly check of all captured models."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import or_, select, update

from luthier.errors import LuthierError, RefusedInput
from luthier.library import models
from luthier.library.models import StoredModel
from luthier.limits import AccountQuotas
from luthier.server.auto_retraining import prepare_drafts, request_draft
from luthier.server.live import drift
from luthier.server.live.health import RATING, Health, health
from luthier.server.live.rows import input_text, read_answers, requests_to
from luthier.server.periodic import PeriodicThread
from luthier.server.retraining import find_active, old_rows
from luthier.server.stores.locations import Locations
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import now
from luthier.server.tables.live.alerts import add_alert
from luthier.server.tables.live.captures import CapturedRequest, CaptureSettings

RECENT = timedelta(days=7)
"""Age of the oldest request of the drift test."""
CHECKED = timedelta(days=35)
"""Period of the weekly check."""
CHECK_SECONDS = 600.0
_log = logging.getLogger("luthier.server")


def health_with_drift(
    locations: Locations,
    arns: Arns,
    account: str,
    model: str,
    since: datetime,
    until: datetime | None = None,
    *,
    reads_paths: bool = False,
) -> Health:
    """Return the health of a model. For a tuned model, the inputs are compared with the training rows.

    Args:
        reads_paths: if the caller may read files of this machine, such as the training rows of a
            registered model. Otherwise, such a model needs a stored sample.

    Raises:
        NoRequests: for an unknown model, and without captured requests.
    """
    found = health(locations.uploads.objects, account, model, since, until)
    try:
        compared, why = _drift(locations, arns, account, model, until or now(), reads_paths)
    except LuthierError as error:
        compared, why = None, str(error)
    return found.model_copy(update={"drift": compared, "drift_unknown": why})


def _drift(
    locations: Locations,
    arns: Arns,
    account: str,
    model: str,
    until: datetime,
    reads_paths: bool,
) -> tuple[drift.Drift | None, str | None]:
    """Return the drift of the last week, or the reason for none."""
    objects = locations.uploads.objects
    query = requests_to(account, model, until - RECENT).where(
        CapturedRequest.error == "", CapturedRequest.created < until
    )
    with objects.database.read() as session:
        rows = session.scalars(query).all()
    stored_id = next((row.stored_id for row in reversed(rows) if ":" in row.stored_id), None)
    if stored_id is None:
        return None, None  # no tuned model
    texts = []
    for row in rows[:: math.ceil(len(rows) / drift.MOST)]:
        try:
            texts += [each.text for each in read_answers(objects, row) if each.text]
        except LuthierError:  # a client deleted or replaced the object
            continue
    texts = [*dict.fromkeys(texts)][: drift.MOST]  # a copy in the other fold looks like drift
    if len(texts) < drift.LEAST:
        return None, f"{len(texts)} inputs in the last 7 days; {drift.LEAST} are needed."
    stored = models.find(stored_id)
    sample = drift.read_sample(stored)
    if sample is None:
        _store_sample(locations, arns, account, stored, reads_paths)
        sample = drift.read_sample(stored)
    if sample is None or len(sample[1]) < drift.LEAST:
        return None, f"the training rows have fewer than {drift.LEAST} texts."
    return drift.drift_of(*sample, texts), None


def _store_sample(
    locations: Locations, arns: Arns, account: str, stored: StoredModel, reads_paths: bool
) -> None:
    with locations.uploads.database.read() as session:
        active = find_active(session, arns, account, stored.id)
    if active.job is None and not reads_paths:
        raise RefusedInput(
            f"No sample of the training rows is stored with {active.model.name}. Run `luthier live "
            f"health {active.model.name}` on the server's machine once."
        )
    with TemporaryDirectory() as folder:
        rows, _ = old_rows(locations, account, active, Path(folder))
    drift.store_sample(stored, [*dict.fromkeys(text for row in rows if (text := input_text(row)))])


def _reason_to_retrain(state: Health) -> str | None:
    if state.drift and state.drift.drifted:
        return "the inputs have drifted"
    falls = [e for e in state.changes if e.measure == RATING and e.last.value < e.before.value]
    return f"the mean rating fell to {falls[0].last.text()}" if falls else None


class Watch:
    """Thread that checks all captured models each Monday, 00:00 UTC, and adds alerts.

    The thread also prepares drafts of retrainings.
    The checked period is fixed, so that a second server comes to the same alerts.
    """

    def __init__(self, locations: Locations, arns: Arns, limits: AccountQuotas) -> None:
        self.locations, self.arns, self.limits = locations, arns, limits
        self.thread = PeriodicThread(
            "watch", self.tick, CHECK_SECONDS, "the health of models could not be checked",
            first=1.0,
        )  # fmt: skip

    def check(self, account: str, until: datetime) -> None:
        """Add alerts on significant changes and on drift in the week before ``until``."""
        database = self.locations.uploads.database
        recent = CapturedRequest.created >= until - RECENT, CapturedRequest.created < until
        named = CapturedRequest.account == account, CapturedRequest.stored_id != ""
        with database.read() as session:
            query = select(CapturedRequest.stored_id).where(*recent, *named).distinct()
            found = session.scalars(query).all()
        for model in found:
            if self.thread.closed.is_set():
                return
            try:
                state = health_with_drift(
                    self.locations, self.arns, account, model, until - CHECKED, until
                )
            except Exception:  # of one model: the others are checked
                _log.exception("the health of %s cannot be checked", model)
                continue
            alerts = {"health": state.summary} if state.changes else {}
            if state.drift and state.drift.drifted:
                alerts["drift"] = state.drift.summary
            reason = _reason_to_retrain(state)
            with database.write() as session:
                if reason:
                    request_draft(session, account, model, reason)
                for kind, text in alerts.items():
                    key = f"{kind} {model} {until:%Y-%m-%d}"
                    add_alert(session, account, kind, model, text, key)

    def tick(self) -> None:
        """Check the accounts that were not checked since Monday, and prepare due retrainings."""
        today = datetime.combine(now().date(), datetime.min.time(), UTC)
        monday = today - timedelta(days=today.weekday())
        database, checked = self.locations.uploads.database, CaptureSettings.checked
        with database.read() as session:
            due = session.scalars(
                select(CaptureSettings.account).where(or_(checked.is_(None), checked < monday))
            ).all()
        for account in due:
            self.check(account, monday)
            if self.thread.closed.is_set():
                return
            with database.write() as session:
                session.execute(
                    update(CaptureSettings).filter_by(account=account).values(checked=monday)
                )
        prepare_drafts(self.locations, self.arns, self.limits)
