"""``luthier worker`` and ``import-worker``: processes that a server starts. People do not call them."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.console import heavy_imports

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
DATABASE = "LUTHIER_DATABASE"
"""Variable with the address of the database: it may hold a password, which no command line may."""

Quotas = Annotated[
    list[str] | None,
    typer.Option("--limit", help="NAME=VALUE of a limit of the server; may be repeated."),
]


def worker(
    job: Annotated[str, typer.Option(help="Id of the job.")],
    lease: Annotated[str, typer.Option(help="Token by which the worker holds it.")],
    s3_endpoint: Annotated[str | None, typer.Option(help="Where s3:// addresses are.")] = None,
    file_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that file:// may name; may be repeated.")
    ] = None,
    limit: Quotas = None,
) -> None:
    """Train one job of the service."""
    _prepare_process()
    configure_logging(job)
    with heavy_imports():
        from luthier.jobs.worker import Worker
        from luthier.limits import parse_limits
        from luthier.store.database import Database
        from luthier.store.locations import Locations
        from luthier.store.schema import METADATA

    assert METADATA.tables  # importing it has declared every table
    database = Database(os.environ.get(DATABASE) or None)
    quotas = parse_limits(limit or ())
    locations = Locations(database, s3_endpoint, file_root or (), quotas=quotas)
    raise typer.Exit(Worker(database, locations, job, lease, quotas).run())


def import_worker(
    model: Annotated[str, typer.Option(help="Id of the custom model.")],
    lease: Annotated[str, typer.Option(help="Token by which the process holds it.")],
    memory: Annotated[
        int | None, typer.Option(help="Bytes that jobs and imports may take together.")
    ] = None,
    region: Annotated[str, typer.Option(help="Region that ARNs name.")] = "us-east-1",
    s3_endpoint: Annotated[str | None, typer.Option(help="Where s3:// addresses are.")] = None,
    file_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that file:// may name; may be repeated.")
    ] = None,
    limit: Quotas = None,
) -> None:
    """Take one model from outside into the store."""
    _prepare_process()
    configure_logging(f"import-{model}")
    # Where memory ends, this process is the one to go.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with heavy_imports():
        from luthier.jobs.admission import Capacity
        from luthier.jobs.import_worker import ImportWorker
        from luthier.limits import parse_limits
        from luthier.store.arns import Arns
        from luthier.store.database import Database
        from luthier.store.locations import Locations
        from luthier.store.schema import METADATA

    assert METADATA.tables  # importing it has declared every table
    database = Database(os.environ.get(DATABASE) or None)
    quotas = parse_limits(limit or ())
    locations = Locations(database, s3_endpoint, file_root or (), quotas=quotas)
    capacity = Capacity() if memory is None else Capacity(memory)
    worker = ImportWorker(database, locations, Arns(region), model, lease, capacity, quotas)
    raise typer.Exit(worker.run())


def _prepare_process() -> None:
    """Let nobody else read what it writes, and the server go first."""
    from luthier.encryption import keys, memory

    os.umask(0o077)
    os.nice(5)
    keys.taken_over()
    memory.hold_temporary_files()


def configure_logging(job: str) -> None:
    """Where a worker's messages go: standard error, or line by line into an encrypted log.

    ``job`` is its id, or ``import-`` and a model's.
    """
    from luthier.encryption.keys import keyring

    if keyring() is None:
        logging.basicConfig(level=logging.INFO, format=FORMAT)
        return
    from luthier.jobs.folders import JobFolders, SealedLog

    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=[SealedLog(JobFolders(job))])
    # What nobody catches would be written to standard error, which leads nowhere.
    sys.excepthook = lambda kind, error, trace: logging.critical(
        "the worker ends", exc_info=(kind, error, trace)
    )
