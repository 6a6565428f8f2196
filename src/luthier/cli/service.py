"""What commands about a service share: its database, who calls, and options."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.store.database import Database

ServiceDatabase = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        # As the server has it: in a container with PostgreSQL a command would make another one.
        envvar="LUTHIER_DATABASE",
        show_envvar=False,
        help="The service's database; LUTHIER_DATABASE, or the one in LUTHIER_HOME, if not given.",
    ),
]
FIRST = "000000000000"
"""The account that the first start of a service makes."""


@contextmanager
def open_database(url: str | None) -> Iterator[Database]:
    """The service's database, its tables made where there are none."""
    from luthier.store.database import Database
    from luthier.store.schema import upgrade

    database = Database(url)
    try:
        upgrade(database)
        yield database
    finally:
        database.close()


def operator() -> str:
    """Who runs the command, as the audit log names them."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def print_records(
    name: str, columns: Sequence[str], records: Sequence[dict[str, Any]], as_json: bool
) -> None:
    """Print records as a table, or as an object that holds them under ``name``."""
    if as_json:
        print_json({name: records})
    else:
        print_rows(columns, records)
