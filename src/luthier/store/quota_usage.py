"""What an account has of each thing that there is a quota of."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.store import batches, imports, jobs
from luthier.store.custom_models import CustomModel
from luthier.store.endpoints import DEPLOYMENT, PROVISIONED, Endpoint
from luthier.store.storage import stored_by


def quota_usage(session: Session, account: str) -> dict[str, int]:
    """By the fields of :class:`luthier.limits.AccountQuotas`."""
    models = select(func.count()).where(CustomModel.account == account)
    kinds = select(Endpoint.kind, func.count()).where(Endpoint.account == account)
    endpoints = dict(session.execute(kinds.group_by(Endpoint.kind)).all())
    return {
        **stored_by(session, account),
        "jobs_in_flight": jobs.in_flight(session, account),
        "custom_models": session.scalar(models) or 0,
        "imported_models": imports.imported_by(session, account),
        "imports_in_flight": imports.waiting_of(session, account),
        "batches_in_flight": batches.in_flight(session, account),
        "deployments": endpoints.get(DEPLOYMENT, 0),
        "provisioned_throughputs": endpoints.get(PROVISIONED, 0),
    }
