"""``luthier admin audit``: print the audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from luthier.cli.options import Json
from luthier.cli.service import ServiceDatabase, open_database, print_records


def audit(
    account: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    user: Annotated[str | None, typer.Option(help="Only of this user.")] = None,
    action: Annotated[str | None, typer.Option(help="Only actions that contain this.")] = None,
    since: Annotated[
        datetime | None, typer.Option(help="Only from this time on, UTC: 2026-01-31T12:00:00.")
    ] = None,
    before: Annotated[int | None, typer.Option(help="Only entries before this number.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Entries at most.")] = 50,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Print the audit log, newest entries first."""
    from luthier.server.tables.audit import entries, entry_values

    from_ = since.replace(tzinfo=UTC) if since else None
    with open_database(database) as service, service.read() as session:
        found = entries(session, account, user, action, from_, before, limit)
        rows = [entry_values(entry) for entry in found]
    if not json_:
        for row in rows:
            row["at"] = row["at"][:19]
    columns = ("seq", "at", "account", "user", "action", "outcome", "resource", "details")
    print_records("entries", columns, rows, json_)
