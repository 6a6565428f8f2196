"""What commands about the service share: its database, who calls, tables for people."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from luthier.printable import one_line
from luthier.store.database import Database

WIDE = 240
"""Characters of a line that no terminal breaks."""


@contextmanager
def opened(url: str | None) -> Iterator[Database]:
    """The service's database, its tables made where there are none."""
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


def table_of(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows for people."""
    from rich.markup import escape
    from rich.table import Table

    from luthier.cli.console import new_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(one_line(_text(row.get(column)))) for column in columns))
    out = new_console()
    # Into a pipe or file nothing has to be broken.
    (out if out.is_terminal else new_console(width=WIDE)).print(table)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return str(value)
