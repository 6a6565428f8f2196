"""``luthier admin jobs``: customization jobs of all accounts, with failures and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    OnlyAccount,
    Record,
    ServiceDatabase,
    open_database,
    show_record,
)
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import print_text
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.server.tables.jobs import Job


def list_service_jobs(*, account: OnlyAccount = None, database: ServiceDatabase = None) -> Record:
    """List the jobs of accounts, newest first."""
    from sqlalchemy import select

    from luthier.server.tables.jobs import Job

    query = select(Job).order_by(Job.seq.desc())
    if account is not None:
        query = query.where(Job.account == account)
    with open_database(database) as service, service.read() as session:
        return {"jobs": [_record(job) for job in session.scalars(query)]}


def show_job(
    job: str, *, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
) -> Record:
    """Show a job: state, failure and the end of the log.

    Args:
        job: Name or id of the job.
    """
    from luthier.server.jobs.folders import JobFolders
    from luthier.server.tables.jobs import get

    with open_database(database) as service, service.read() as session:
        found = get(session, account, job)
        if found is None:
            raise RecipeError(
                f"account {account} has no job {job!r}: `luthier admin jobs list` shows the jobs"
            )
        record = {**_record(found), "id": found.id, "failure": found.failure}
    return {**record, "log": JobFolders(record["id"]).log_tail()}


def print_job(record: Record) -> None:
    """Print the state of a job, then the end of the log."""
    log = record["log"]
    show_record({name: value for name, value in record.items() if name != "log"})
    print_text("\n".join(["", "End of the log:", *log]) if log else "\nThe log is empty.")


def _record(job: Job) -> Record:
    return {
        "account": job.account,
        "name": job.name,
        "suffix": job.suffix,
        "model": job.model_name,
        "state": job.state,
        "created": job.created.isoformat(timespec="seconds"),
    }


service_jobs_app = CommandGroup("Customization jobs of all accounts.", extra="server")
service_jobs_app.add(Command(list_service_jobs, show_record, "list"))
service_jobs_app.add(Command(show_job, print_job, "show"))
