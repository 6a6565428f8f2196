"""``luthier live``: capture of requests, feedback, and rows from both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    Record,
    ServiceDatabase,
    audited_write,
    open_database,
    show_record,
)
from luthier.cli.terminal.bridge import Command, CommandGroup

if TYPE_CHECKING:
    from luthier.server.tables.captures import CaptureSettings

_SETTINGS = ("enabled", "share", "redact", "days", "most_bytes", "bucket", "prefix")


def capture_on(
    *,
    share: Annotated[float | None, typer.Option(help="Share of requests, from 0 to 1.")] = None,
    days: Annotated[int | None, typer.Option(help="Days until records are deleted.")] = None,
    most_bytes: Annotated[
        int | None, typer.Option("--bytes", help="Largest size of all records, in bytes.")
    ] = None,
    redact: Annotated[
        bool | None,
        typer.Option("--redact/--no-redact", help="Replace personal data before writing."),
    ] = None,
    account: Account = FIRST_ACCOUNT,
    database: ServiceDatabase = None,
) -> Record:
    """Capture requests to models, or change the settings of the capture."""
    from luthier.server.live.settings import enable

    given = {"share": share, "days": days, "most_bytes": most_bytes, "redact": redact}
    values = {name: value for name, value in given.items() if value is not None}
    with audited_write(database, "capture.on", account, "", values) as session:
        return _record(enable(session, account, **values))


def capture_off(
    *,
    delete: Annotated[bool, typer.Option(help="Delete all records, too.")] = False,
    account: Account = FIRST_ACCOUNT,
    database: ServiceDatabase = None,
) -> Record:
    """Stop capturing requests. Records stay until they expire."""
    from luthier.server.live.capture import remove_records
    from luthier.server.live.settings import disable
    from luthier.server.stores.objects import Objects

    with audited_write(database, "capture.off", account, "", {"delete": delete}) as session:
        disable(session, account)
    deleted = 0
    if delete:
        with open_database(database) as service:
            deleted = remove_records(Objects(service), account, days=0, most_bytes=0)
    return {"account": account, "enabled": False, "deleted_objects": deleted}


def capture_show(*, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None) -> Record:
    """Show the capture settings and the number of records."""
    from sqlalchemy import func, select

    from luthier.server.tables.captures import CapturedRequest, CaptureSettings

    rows = CapturedRequest
    query = select(
        func.count(), func.sum(rows.size), func.min(rows.created), func.max(rows.created)
    )
    by_model = (
        select(rows.model, rows.operation, func.count())
        .where(rows.account == account)
        .group_by(rows.model, rows.operation)
        .order_by(rows.model, rows.operation)
    )
    with open_database(database) as service, service.read() as session:
        found = session.get(CaptureSettings, account)
        count, size, first, last = session.execute(query.where(rows.account == account)).one()
        models = session.execute(by_model).all()
    return {
        **(_record(found) if found else {"account": account, "enabled": False}),
        "records": count,
        "bytes": int(size or 0),
        "first": first and first.isoformat(timespec="seconds"),
        "last": last and last.isoformat(timespec="seconds"),
        "requests": [{"model": m, "operation": o, "requests": number} for m, o, number in models],
    }


def _record(row: CaptureSettings) -> Record:
    return {"account": row.account} | {name: getattr(row, name) for name in _SETTINGS}


def show_settings(record: Record) -> None:
    """Print the settings with a clear first line."""
    state = "on" if record["enabled"] else "off"
    show_record({"capture": state} | {k: v for k, v in record.items() if k != "enabled"})


capture_app = CommandGroup("Capture requests to models and the replies.", extra="server")
capture_app.add(Command(capture_on, show_settings, "on"))
capture_app.add(Command(capture_off, show_settings, "off"))
capture_app.add(Command(capture_show, show_settings, "show"))
live_app = CommandGroup("Keep a deployed model good: capture, rate, export.", extra="server")
live_app.add_typer(capture_app, name="capture")
