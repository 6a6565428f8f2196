"""``luthier worker``: the process that a server starts for queued work. Not for users."""

from __future__ import annotations

import faulthandler
import logging
import os
from typing import Annotated

import typer

from luthier.cli.terminal.console import heavy_imports

Quotas = Annotated[
    list[str] | None,
    typer.Option("--limit", help="Limit of the server, NAME=VALUE; repeatable."),
]


def worker(
    kind: Annotated[str, typer.Option(help="Kind of work, such as training.")],
    row_id: Annotated[str, typer.Option("--id", help="Id of the work.")],
    lease: Annotated[str, typer.Option(help="Token of the lease.")],
    memory: Annotated[int | None, typer.Option(help="Memory for all workers, in bytes.")] = None,
    region: Annotated[str, typer.Option(help="Region in ARNs.")] = "us-east-1",
    s3_endpoint: Annotated[str | None, typer.Option(help="S3 endpoint of s3:// addresses.")] = None,
    limit: Quotas = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes per training.")] = 1,
    until_stdin_closes: Annotated[
        bool, typer.Option(help="End when standard input closes.")
    ] = False,
) -> None:
    """Run one queued work of a server."""
    _prepare_process()
    if until_stdin_closes:
        from luthier.processes import on_stdin_end
        from luthier.server.jobs.processes import LOST

        # At any point: the process that started this worker has ended.
        on_stdin_end(lambda: os._exit(LOST))
    from luthier.server.jobs.kinds import WORK_KINDS

    configure_logging()
    with heavy_imports():
        from luthier.limits import parse_limits
        from luthier.server.jobs.admission import Capacity
        from luthier.server.jobs.processes import inherited_database
        from luthier.server.stores.locations import Locations
        from luthier.server.tables.arns import Arns

        worker_class = WORK_KINDS[kind].worker_class()
        database = inherited_database()

    quotas = parse_limits(limit or ())
    locations = Locations(database, s3_endpoint, quotas=quotas)
    capacity = Capacity() if memory is None else Capacity(memory)
    work = worker_class(
        database, locations, row_id, lease,
        arns=Arns(region), capacity=capacity, quotas=quotas, processes=processes,
    )  # fmt: skip
    raise typer.Exit(work.run())


def _prepare_process() -> None:
    """Restrict new files to the owner, and lower the process priority below the server's."""
    faulthandler.enable()  # after a crash in a library, the job log shows Python lines
    os.umask(0o077)
    os.nice(5)


def configure_logging() -> None:
    """Log to standard error, which the server redirects to the log of the job."""
    from luthier.server.jobs.processes import LOG_FORMAT

    logging.getLogger("alembic").setLevel(logging.WARNING)  # logs the names of its plugins
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
