"""``luthier worker``: the process that a server starts for queued work. Not for users."""

from __future__ import annotations

import faulthandler
import logging
import os
from typing import Annotated

import typer

from luthier.cli.console import heavy_imports

Quotas = Annotated[
    list[str] | None,
    typer.Option("--limit", help="NAME=VALUE of a limit of the server; may be repeated."),
]


def worker(
    kind: Annotated[str, typer.Option(help="Of the work: training, import or export.")],
    row_id: Annotated[str, typer.Option("--id", help="Of the job, the model or the export.")],
    lease: Annotated[str, typer.Option(help="Token by which the worker holds it.")],
    memory: Annotated[
        int | None, typer.Option(help="Bytes that all workers may take together.")
    ] = None,
    region: Annotated[str, typer.Option(help="Region that ARNs name.")] = "us-east-1",
    s3_endpoint: Annotated[str | None, typer.Option(help="Where s3:// addresses are.")] = None,
    limit: Quotas = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of this machine that share a training.")
    ] = 1,
    until_stdin_closes: Annotated[
        bool, typer.Option(help="End at once where standard input does: its starter is gone.")
    ] = False,
) -> None:
    """Run one queued work of a server."""
    _prepare_process()
    if until_stdin_closes:
        from luthier.processes import on_stdin_end
        from luthier.server.jobs.processes import LOST

        on_stdin_end(lambda: os._exit(LOST))  # where the process stands
    from luthier.server.jobs.kinds import WORK_KINDS

    configure_logging()
    with heavy_imports():
        from luthier.limits import parse_limits
        from luthier.server.jobs.admission import Capacity
        from luthier.server.jobs.processes import inherited_database
        from luthier.server.tables.arns import Arns
        from luthier.server.tables.locations import Locations

        worker_class = WORK_KINDS[kind].worker_class()
        database = inherited_database()

    quotas = parse_limits(limit or ())
    locations = Locations(database, s3_endpoint, quotas=quotas)
    capacity = Capacity() if memory is None else Capacity(memory)
    made = worker_class(
        database, locations, row_id, lease,
        arns=Arns(region), capacity=capacity, quotas=quotas, processes=processes,
    )  # fmt: skip
    raise typer.Exit(made.run())


def _prepare_process() -> None:
    """Restrict new files to the owner, and lower the process priority below the server's."""
    faulthandler.enable()  # a crash in a library leaves its Python lines in the log of the job
    os.umask(0o077)
    os.nice(5)


def configure_logging() -> None:
    """Log to standard error, which the server redirects to the log of the job."""
    from luthier.server.jobs.processes import LOG_FORMAT

    logging.getLogger("alembic").setLevel(logging.WARNING)  # logs the names of its plugins
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
