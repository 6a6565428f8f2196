"""Rows of customization jobs, made without the checks of a submission."""

from __future__ import annotations

from typing import Any

from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, new_id, now
from luthier.server.tables.jobs import QUEUED, Job

ACCOUNT, OTHER = "000000000000", "111111111111"


def add_job(database: Database, name: str = "one", **fields: Any) -> Job:
    """Add a job, which is ready to start, and the reserved name of its model."""
    moment = now()
    job = Job(
        **{
            "id": new_id(), "account": ACCOUNT, "name": name, "model_name": name, "api": "bedrock",
            "customization_type": "FINE_TUNING", "foundation": "luthier.tiny", "base_model": "arn",
            "command": "tune", "recipe": {}, "request": {}, "validators": [], "state": QUEUED,
            "details": {}, "created": moment, "modified": moment, "cores": 1, "memory": 1, **fields,
        }
    )  # fmt: skip
    model = CustomModel(
        id=new_id(), account=job.account, name=job.model_name, foundation="luthier.tiny",
        root="luthier.tiny", base_model="arn", job_id=job.id, details={}, created=moment,
    )  # fmt: skip
    with database.write() as session:
        session.add(job)
        session.flush()
        session.add(model)
    return job
