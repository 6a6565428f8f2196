"""Deletion of a customization job: files first, then database rows."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from luthier.errors import WrongState
from luthier.inference.reply_log import forget
from luthier.server.jobs.folders import JobFolders
from luthier.server.tables import tags
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import ENDED, Job, JobEvent, run_name


def delete_job(database: Database, arns: Arns, job: Job) -> None:
    """Delete an ended job with its run, log, events and requested teacher replies.

    The database rows go last: after a crash, a second call finds the job and deletes the remaining
    files.

    Raises:
        WrongState: if the job has not ended, its model still exists, or a process uses its files.
    """
    with database.read() as session:
        model = session.scalar(select(CustomModel.name).where(CustomModel.job_id == job.id))
    if job.state not in ENDED:
        raise WrongState(f"The job {job.name} has not ended. Stop the job first.")
    if model is not None:
        raise WrongState(f"The job {job.name} has the model {model}. Delete the model first.")
    folders = JobFolders(job.id)
    with folders.lock() as is_free:
        if not is_free:
            raise WrongState(f"A process still uses files of the job {job.name}. Try again later.")
        # First, because a running job with the same teacher keeps the replies locked.
        forget(job.account, {run_name(job.id)})
        # The folder of a deleted model stays in models/ while other models are built on the model.
        folders.remove_run()
        folders.log.unlink(missing_ok=True)
    with database.write() as session:
        delete_rows(session, arns, job)


def delete_rows(session: Session, arns: Arns, job: Job) -> None:
    """Delete the rows of a job without files, in the caller's transaction."""
    tags.drop(session, arns.job(job.account, job.foundation, job.id))
    session.execute(delete(JobEvent).where(JobEvent.job_id == job.id))
    session.execute(delete(Job).where(Job.id == job.id))
