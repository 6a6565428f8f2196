"""Usage of the quotas of an account."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.store import queue
from luthier.store.custom_models import CustomModel
from luthier.store.database import count_rows
from luthier.store.endpoints import DEPLOYMENT, PROVISIONED, Endpoint
from luthier.store.jobs import Job
from luthier.store.storage import stored_by


def quota_usage(session: Session, account: str) -> dict[str, int]:
    """Return the usage by the fields of :class:`luthier.limits.AccountQuotas`."""
    kinds = select(Endpoint.kind, func.count()).where(Endpoint.account == account)
    endpoints = dict(session.execute(kinds.group_by(Endpoint.kind)).all())
    return {
        "stored_bytes": stored_by(session, account),
        "jobs_in_flight": queue.in_flight(session, Job, account),
        "custom_models": count_rows(session, CustomModel.account == account),
        "deployments": endpoints.get(DEPLOYMENT, 0),
        "provisioned_throughputs": endpoints.get(PROVISIONED, 0),
    }
