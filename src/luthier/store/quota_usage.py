"""What an account has of each thing that there is a quota of."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.store import batches, imports, jobs
from luthier.store.custom_models import CustomModel
from luthier.store.deployments import Deployment
from luthier.store.provisioned import Provisioned
from luthier.store.storage import stored_by


def quota_usage(session: Session, account: str) -> dict[str, int]:
    """By the fields of :class:`luthier.limits.AccountQuotas`."""
    own = {
        name: session.scalar(select(func.count()).where(table.account == account)) or 0
        for name, table in (
            ("custom_models", CustomModel),
            ("deployments", Deployment),
            ("provisioned_throughputs", Provisioned),
        )
    }
    return {
        **stored_by(session, account),
        "jobs_in_flight": jobs.in_flight(session, account),
        "custom_models": own["custom_models"],
        "imported_models": imports.imported_by(session, account),
        "imports_in_flight": imports.waiting_of(session, account),
        "batches_in_flight": batches.in_flight(session, account),
        "deployments": own["deployments"],
        "provisioned_throughputs": own["provisioned_throughputs"],
    }
