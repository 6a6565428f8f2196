"""Usage of the quotas of an account."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.server.tables import queue
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import count_rows
from luthier.server.tables.endpoints import DEPLOYMENT, PROVISIONED, Endpoint
from luthier.server.tables.jobs import Job
from luthier.server.tables.storage import stored_by


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
