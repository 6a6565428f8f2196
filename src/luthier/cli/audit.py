"""``luthier audit``: read the audit log, and check that nobody has changed it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from luthier.cli.console import CommandGroup, note, print_json
from luthier.cli.options import Json
from luthier.cli.service import ServiceDatabase, open_database, print_records
from luthier.errors import CorruptFile

audit_app = CommandGroup("The service's audit log.", extra="server")


@audit_app.command("verify")
def verify_log(
    expect_head: Annotated[
        str | None,
        typer.Option(
            "--expect-head", help="Hash that was the last one once: it has to be there still."
        ),
    ] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Check every entry against the chain, and its end against what the store notes; 1 where broken."""
    from luthier.files import luthier_home
    from luthier.store.audit import last, read_mark, verify

    mark = read_mark(luthier_home())
    with open_database(database) as service, service.read() as session:
        broken = verify(session, expect_head, mark)
        try:
            number, hash_ = last(session)
        except CorruptFile:
            number, hash_ = 0, ""
    if json_:
        found = {"seq": broken.seq, "reason": broken.reason} if broken else None
        print_json({"intact": broken is None, "broken": found, "entries": number, "last": hash_})
    elif broken:
        note(f"luthier: the audit log is broken at entry {broken.seq}: {broken.reason}")
    else:
        typer.echo(f"{number} entries, intact; the last hash is\n{hash_}")
    if broken:
        raise typer.Exit(1)


@audit_app.command("list")
def list_entries(
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
    """Print entries, the newest first."""
    from luthier.store.audit import entries, entry_values

    from_ = since.replace(tzinfo=UTC) if since else None
    with open_database(database) as service, service.read() as session:
        found = entries(session, account, user, action, from_, before, limit)
        rows = [entry_values(entry) for entry in found]
    if not json_:
        for row in rows:
            row["at"] = row["at"][:19]
    columns = ("seq", "at", "account", "user", "action", "outcome", "resource", "details")
    print_records("entries", columns, rows, json_)
