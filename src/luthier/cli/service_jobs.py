"""``luthier admin jobs``: customization jobs of all accounts, their failures and their logs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from luthier.cli.bridge import CommandGroup
from luthier.cli.console import print_text
from luthier.cli.options import Json
from luthier.cli.service import (
    FIRST,
    Account,
    OnlyAccount,
    ServiceDatabase,
    open_database,
    print_outcome,
    print_records,
)
from luthier.errors import RecipeError

service_jobs_app = CommandGroup("Customization jobs of all accounts.", extra="server")
COLUMNS = ("account", "name", "suffix", "model", "state", "created")


@service_jobs_app.command("list")
def list_service_jobs(
    account: OnlyAccount = None, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """List the jobs of accounts, the newest first."""
    from sqlalchemy import select

    from luthier.server.tables.jobs import Job

    query = select(Job).order_by(Job.seq.desc())
    if account is not None:
        query = query.where(Job.account == account)
    with open_database(database) as service, service.read() as session:
        records = [_record(job) for job in session.scalars(query)]
    print_records("jobs", COLUMNS, records, json_)


@service_jobs_app.command("show")
def show(
    job: Annotated[str, typer.Argument(help="Name or id of the job.")],
    account: Account = FIRST,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Show a job: its state, its failure and the last lines of its log."""
    from luthier.server.jobs.folders import JobFolders
    from luthier.server.tables.jobs import get

    with open_database(database) as service, service.read() as session:
        found = get(session, account, job)
        if found is None:
            raise RecipeError(
                f"account {account} has no job {job!r}: `luthier admin jobs list` shows the jobs"
            )
        record = {**_record(found), "id": found.id, "failure": found.failure}
    log = JobFolders(record["id"]).log_tail()
    print_outcome(json_, **record, **({"log": log} if json_ else {}))
    if not json_:
        print_text("\n".join(["", "The end of the log:", *log]) if log else "\nThe log is empty.")


def _record(job: Any) -> dict[str, Any]:
    return {
        "account": job.account,
        "name": job.name,
        "suffix": job.suffix,
        "model": job.model_name,
        "state": job.state,
        "created": job.created.isoformat(timespec="seconds"),
    }
