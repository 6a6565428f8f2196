"""Shared parts of commands for a service: database, audited changes, operator name, options."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.terminal.console import note, print_rows, print_text
from luthier.errors import LuthierError
from luthier.formatting import one_line

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from luthier.server.tables.database import Database

ServiceDatabase = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        # Without the variable, a command in a container with PostgreSQL would create a second database.
        envvar="LUTHIER_DATABASE",
        show_envvar=False,
        help="Database of the service; LUTHIER_DATABASE by default.",
    ),
]
Record = dict[str, Any]
Account = Annotated[str, typer.Option(help="Twelve digits.")]
OnlyAccount = Annotated[str | None, typer.Option("--account", help="Only this account.")]
Region = Annotated[str, typer.Option(help="Region of the server, in ARNs.")]
FIRST_ACCOUNT = "000000000000"
"""Account of the first start of a service."""


@contextmanager
def open_database(url: str | None) -> Iterator[Database]:
    """Open the service's database and create missing tables."""
    from luthier.server.tables.database import Database
    from luthier.server.tables.schema import upgrade

    database = Database(url)
    try:
        upgrade(database)
        yield database
    finally:
        database.close()


def service_names(url: str | None) -> dict[str, dict[str, str]]:
    """Return ``account`` and ``name`` of each model of the service, by its id in the library.

    The function creates and migrates no database. Without a readable database the result is empty.
    """
    if find_spec("sqlalchemy") is None:  # of the extra `server`
        return {}
    from sqlalchemy import select
    from sqlalchemy.exc import SQLAlchemyError

    from luthier.server.tables.custom_models import RESERVED, CustomModel
    from luthier.server.tables.database import Database, is_database_here

    columns = (CustomModel.stored_id, CustomModel.account, CustomModel.name)
    query = select(*columns).where(
        CustomModel.status != RESERVED, CustomModel.stored_id.is_not(None)
    )
    try:
        if not is_database_here(url):
            return {}
        database = Database(url)
        try:
            with database.read() as session:
                rows = session.execute(query).all()
        finally:
            database.close()
    except (LuthierError, SQLAlchemyError, OSError) as error:
        note(f"Names in the service are omitted: the database cannot be read: {error}")
        return {}
    return {str(id_): {"account": account, "name": name} for id_, account, name in rows}


def operator() -> str:
    """Return the operator's name for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


@contextmanager
def audited_write(
    url: str | None, action: str, account: str, name: str, details: dict[str, Any] | None = None
) -> Iterator[Session]:
    """Open a transaction that also writes an entry of the audit log.

    The block may fill ``details``, which must not contain secrets.
    """
    with open_database(url) as database, database.write() as session:
        yield session
        audit(session, action, account, name, details)


def audit(
    session: Session, action: str, account: str, name: str, details: dict[str, Any] | None = None
) -> None:
    """Write an entry of the operator's action to the audit log."""
    from luthier.server.tables.audit import Event, append

    resource = f"{account}/{name}".strip("/")
    event = Event(
        f"luthier:admin.{action}", resource, user=operator(), account=account,
        address="local", details=details or {},
    )  # fmt: skip
    append(session, event)


def plain_record(row: Any, *names: str) -> Record:
    """Return columns of a row as JSON values: moments become text."""
    values = {name: getattr(row, name) for name in names}
    return {
        name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
        for name, value in values.items()
    }


def show_record(record: Record) -> None:
    """Print names and values, and lists of records as tables."""
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = dict.fromkeys(column for each in value for column in each)
            print_rows([*columns], value)
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}={each}" for key, each in value.items())
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "", [], (), False):
            print_text(f"{name:<18} {one_line(str(value))}")
