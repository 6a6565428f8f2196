"""Recurring work of ``luthier live``: scheduled evaluations, and drafts of retrainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    Record,
    Region,
    ServiceDatabase,
    audit,
    open_database,
    show_record,
)
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import print_rows, print_text


def auto_retrain(
    deployment: str,
    *,
    rows: int | None = None,
    on_alert: bool = False,
    auto: bool = False,
    off: bool = False,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Let the server draft retrainings of a deployment; show the setting and the last draft.

    Args:
        deployment: Name or ARN of the deployment.
        rows: Draft after this number of newly rated requests.
        on_alert: Draft after drift or a fall of ratings or scores.
        auto: Start the drafts without approval.
        off: Prepare no more drafts.
    """
    from luthier.server.auto_retraining import describe, set_rule
    from luthier.server.promotion import find_deployment
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.arns import Arns

    arns = Arns(region)
    with open_database(database) as service:
        if rows is not None or on_alert or auto or off:
            wanted = (None, False, False) if off else (rows, on_alert, auto)
            set_rule(Locations(service, None), arns, account, deployment, *wanted)
            details = dict(zip(("rows", "on_alert", "auto"), wanted, strict=True))
            with service.write() as session:
                audit(session, "retraining.set", account, deployment, details)
        with service.read() as session:
            found = describe(find_deployment(session, arns, account, deployment))
    names = "deployment", "rows", "on_alert", "auto", "note"
    return {"drafts": bool(found["rows"] or found["on_alert"])} | {n: found[n] for n in names}


def show_rule(record: Record) -> None:
    """Print the rule with a clear first line."""
    show_record({**record, "drafts": "on" if record["drafts"] else "off"})


def schedule_set(
    deployment: str,
    rows: str,
    *,
    every: Literal["day", "week"] = "week",
    grader: Sequence[str] = (),
    max_tokens: int = 128,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Evaluate a deployment now, then every day or week.

    Args:
        deployment: Name or ARN of the deployment.
        rows: Held-out rows: a file, s3:// address or file id.
        every: Time between two evaluations.
        grader: Grader of replies, such as exact; repeatable.
        max_tokens: Token limit of a reply.
    """
    from luthier.errors import RefusedInput
    from luthier.server.native.measurements import request_of
    from luthier.server.native.schedules import NewSchedule
    from luthier.server.promotion import find_deployment
    from luthier.server.schedules import set_schedule
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.arns import Arns

    arns, file = Arns(region), Path(rows)
    if not file.is_file() and not rows.startswith(("s3://", "file-")):
        raise RefusedInput(f"{rows} is no file. Name a file, an s3:// address or the id of a file.")
    with open_database(database) as service:
        locations = Locations(service, None)
        with service.read() as session:
            find_deployment(session, arns, account, deployment)
        stored = None
        if file.is_file():
            content = [file.read_bytes()]
            stored = rows = locations.uploads.add(account, content, file.name, "evals").id
        body = NewSchedule(rows=rows, every=every, graders=list(grader), max_tokens=max_tokens)
        request = request_of(locations, account, body)
        try:
            set_schedule(
                locations, arns, account, deployment, request.pop("every"), request, stored
            )
        except BaseException:
            if stored:
                locations.uploads.delete(account, stored)
            raise
        details = {"every": every, "rows": request["rows"]}
        with service.write() as session:
            audit(session, "schedule.set", account, deployment, details)
    return schedule_show(deployment, account=account, region=region, database=database)


def schedule_show(
    deployment: str,
    *,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Show the schedule of a deployment and its results.

    Args:
        deployment: Name or ARN of the deployment.
    """
    from luthier.server.schedules import describe, find_schedule
    from luthier.server.tables.arns import Arns

    with open_database(database) as service, service.read() as session:
        return describe(session, *find_schedule(session, Arns(region), account, deployment))


def schedule_list(*, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None) -> Record:
    """List the schedules, and the last result of each."""
    from luthier.server.schedules import list_schedules

    with open_database(database) as service, service.read() as session:
        return {"schedules": list_schedules(session, account)}


def show_schedules(record: Record) -> None:
    """Print a row for each schedule."""
    show_record(record)
    if not record["schedules"]:
        print_text("No deployment has a schedule.")


def schedule_remove(
    deployment: str,
    *,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """End the scheduled evaluations of a deployment. The evaluations stay.

    Args:
        deployment: Name or ARN of the deployment.
    """
    from luthier.server.schedules import end_schedule
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.arns import Arns

    with open_database(database) as service:
        end_schedule(Locations(service, None), Arns(region), account, deployment)
        with service.write() as session:
            audit(session, "schedule.remove", account, deployment)
    return {"deployment": deployment, "schedule": "removed"}


def show_schedule(record: Record) -> None:
    """Print the schedule, and a row for each result."""
    show_record({name: record[name] for name in ("deployment", "every", "next_run", "skipped")})
    rows = []
    for each in record["results"]:
        row = {"created": f"{each['created']:%Y-%m-%d %H:%M}", "model": each["model"]}
        row |= {"state": each["state"], "score": "", "95 % interval": "", "since the first": ""}
        if each["score"] is not None:
            row["score"] = f"{each['measure']} {each['score']:.3g}"
        if each["interval"] is not None:
            row["95 % interval"] = "{:.3g} to {:.3g}".format(*each["interval"])
        if (change := each["change"]) is not None:
            mark = ", significant" if change["significant"] else ""
            row["since the first"] = f"{change['difference']:+.3g}{mark}"
        rows.append(row | {"failure": each["failure"] or ""})
    if rows:
        print_rows([*rows[0]], rows)


schedule_app = CommandGroup("Evaluate a deployment every day or week.", extra="server")
schedule_app.add(Command(schedule_set, show_schedule, "set"))
schedule_app.add(Command(schedule_show, show_schedule, "show"))
schedule_app.add(Command(schedule_list, show_schedules, "list"))
schedule_app.add(Command(schedule_remove, show_record, "remove"))
