"""``luthier live``: capture of requests, feedback, and changes of deployed models."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    Record,
    Region,
    ServiceDatabase,
    audited_write,
    open_database,
    operator,
    plain_record,
    show_record,
)
from luthier.cli.service.live_schedules import auto_retrain, schedule_app, show_rule
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import note, print_rows, print_text
from luthier.formatting import format_duration

if TYPE_CHECKING:
    from luthier.server.live.health import Health, PeriodHealth
    from luthier.server.tables.database import Database
    from luthier.server.tables.jobs import Job

_NEEDED = {
    "sft": "The rows need requests with text.",
    "dpo": "The rows need preferred or corrected answers, or ratings of several answers to a prompt.",
    "kto": "The rows need thumbs, or ratings of at most 2 or at least 4.",
    "classification": "The rows need labels as feedback, or a filter by rating or outcome.",
    "regression": "The rows need labels as feedback, or a filter by rating or outcome.",
}
"""Needs of an export, by kind of rows."""
LOADING_SECONDS = 60.0
"""Time limit for the loading of a new model, in seconds."""
IMPORTED_ROWS = 200
"""Rows of imported feedback per transaction."""
_SETTINGS = (
    "account", "enabled", "share", "redact", "days", "most_bytes", "bucket", "prefix",
    "second_rater",
)  # fmt: skip


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
    second_rater: Annotated[
        float | None, typer.Option(help="Share of answers for two raters.")
    ] = None,
    account: Account = FIRST_ACCOUNT,
    database: ServiceDatabase = None,
) -> Record:
    """Capture requests to models, or change the settings of the capture."""
    from luthier.server.live.settings import enable

    given = {"share": share, "days": days, "most_bytes": most_bytes, "redact": redact}
    given["second_rater"] = second_rater
    values = {name: value for name, value in given.items() if value is not None}
    with audited_write(database, "capture.on", account, "", values) as session:
        return plain_record(enable(session, account, **values), *_SETTINGS)


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

    from luthier.server.tables.live.captures import CapturedRequest, CaptureSettings

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
        **(plain_record(found, *_SETTINGS) if found else {"account": account, "enabled": False}),
        "records": count,
        "bytes": int(size or 0),
        "first": first and first.isoformat(timespec="seconds"),
        "last": last and last.isoformat(timespec="seconds"),
        "requests": [{"model": m, "operation": o, "requests": number} for m, o, number in models],
    }


def capture_export(
    *,
    model: str,
    to: Literal["sft", "dpo", "kto", "classification", "regression"] = "sft",
    output: Path | None = None,
    since: str | None = None,
    rating: str | None = None,
    outcome: Sequence[str] = (),
    account: Account = FIRST_ACCOUNT,
    database: ServiceDatabase = None,
) -> Record:
    """Write captured requests of a model as training rows.

    Args:
        model: Name that clients sent, or a custom model.
        to: Kind of rows.
        output: New file (JSON Lines); named after the kind by default.
        since: Only requests of this period: 7d, 12h or 2026-01-31.
        rating: Only answers with this mean rating, e.g. ">=4".
        outcome: Only answers with this outcome, e.g. "sale>=10".
    """
    from luthier.errors import RefusedInput
    from luthier.files import json_lines, write_bytes
    from luthier.server.live import rows
    from luthier.server.live.health import unknown_model
    from luthier.server.stores.objects import Objects

    wanted = rows.Condition.parse(rating) if rating else None
    outcomes = {}
    for text in outcome:
        name = re.split("[<>=!]", text, maxsplit=1)[0].strip()
        outcomes[name] = rows.Condition.parse(text.strip()[len(name) :])
    moment = rows.parse_since(since) if since else None
    file = output or Path(f"{to}.jsonl")
    # Rows of an earlier export may have been corrected by hand.
    if file.exists():
        raise RefusedInput(f"{file} exists already. Choose a different name with --output")
    if file.suffix != ".jsonl":
        raise RefusedInput(f"The export writes JSON Lines. Name {file} with the ending .jsonl")
    with open_database(database) as service:
        answers = [*rows.captured_answers(Objects(service), account, model, moment)]
        if not answers:
            with service.read() as session:
                if unknown := unknown_model(session, account, model):
                    raise unknown
    kept = [*rows.filter_answers(answers, wanted, outcomes)]
    found = rows.training_rows(kept, to, rated=bool(wanted or outcomes))
    if not found:
        raise RefusedInput(
            f'No rows of the kind {to}: {len(answers)} captured answers of model "{model}", '
            f"{len(kept)} after the filters. {_NEEDED[to]}"
        )
    write_bytes(file, json_lines(found).encode())
    return {"file": str(file), "rows": len(found), "answers": len(answers), "kept": len(kept)}


def print_export(record: Record, to: str) -> None:
    """Print the counts and the next command."""
    show_record(record)
    objective = "" if to == "sft" else f" --objective {to}"
    print_text(f"\nTrain on the rows: luthier tune {record['file']}{objective}")


def feedback_add(
    request: str,
    *,
    rater: str | None = None,
    thumb: Literal["up", "down"] | None = None,
    rating: int | None = None,
    preferred: str | None = None,
    corrected: str | None = None,
    label: str | None = None,
    comment: str | None = None,
    outcome: Sequence[str] = (),
    lower: Annotated[bool, typer.Option(help="Lower values of the outcomes are better.")] = False,
    position: int = 0,
    account: Account = FIRST_ACCOUNT,
    database: ServiceDatabase = None,
) -> Record:
    """Add feedback about a captured request.

    Args:
        request: Request id, or id of the response.
        rater: Name of the rater; the operator by default.
        thumb: Thumb up or down.
        rating: From 1 (worst) to 5.
        preferred: A better answer.
        corrected: The answer after corrections.
        label: Correct label of a prediction.
        comment: Remark.
        outcome: Named outcome, such as sale=12.5 or reopened=true.
        position: Number of the input or choice, from 0.
    """
    from pydantic import ValidationError

    from luthier.errors import RefusedInput
    from luthier.server.live.feedback import Statement, parse_value, store_feedback
    from luthier.validation import describe_located_error

    outcomes = {}
    for text in outcome:
        name, equals, value = text.partition("=")
        if not equals:
            raise RefusedInput(f"--outcome {text!r}: write NAME=VALUE, such as reopened=true")
        outcomes[name] = {"value": parse_value(value), "higher_is_better": not lower}
    given = {
        "request": request, "position": position, "rater": rater, "thumb": thumb, "rating": rating,
        "preferred": preferred, "corrected": corrected, "label": label, "comment": comment,
        "outcomes": outcomes,
    }  # fmt: skip
    try:
        statement = Statement.model_validate(given)
    except ValidationError as error:
        raise RefusedInput(describe_located_error(error.errors()[0], "the feedback")) from error
    with open_database(database) as service, service.write() as session:
        found, added = store_feedback(session, account, statement, rater or operator())
        return {"request": found.id, "added": len(added)}


def feedback_import(
    file: Path, *, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
) -> Record:
    """Import feedback from a file.

    Checks all rows first; a repeated import adds nothing twice.

    Args:
        file: JSON Lines or CSV with a column request.
    """
    from luthier.errors import DataError, RefusedInput
    from luthier.server.live.feedback import (
        find_request,
        read_statements,
        row_problem,
        store_feedback,
    )

    rows = [*read_statements(file)]
    added, problems = 0, []
    with open_database(database) as service:
        with service.read() as session:
            for line, each in rows:
                try:
                    find_request(session, account, each)
                except RefusedInput as error:
                    problems.append(row_problem(file, line, error.problem.message))
        if problems:
            raise DataError(problems)
        # A transaction of all rows would stop the writes of the server.
        for first in range(0, len(rows), IMPORTED_ROWS):
            with service.write() as session:
                for _, each in rows[first : first + IMPORTED_ROWS]:
                    rater = each.rater or operator()
                    added += len(store_feedback(session, account, each, rater)[1])
    return {"file": str(file), "rows": len(rows), "added": added}


def feedback_agreement(
    model: str, *, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
) -> Record:
    """Show how well the raters of a model's answers agree (Krippendorff's alpha).

    Args:
        model: Name that clients sent, or a custom model.
    """
    from luthier.server.live.agreement import agreements
    from luthier.server.live.health import unknown_model

    with open_database(database) as service, service.read() as session:
        if unknown := unknown_model(session, account, model):
            raise unknown
        return {"agreement": [each.model_dump() for each in agreements(session, account, model)]}


def show_agreement(record: Record) -> None:
    """Print alpha by kind of feedback, and its usual reading."""
    if not record["agreement"]:
        print_text("No answer has two raters. Command: luthier live capture on --second-rater 0.1")
        return
    for each in record["agreement"]:
        alpha = "undefined, because all values are equal"
        if each["alpha"] is not None:
            alpha = "{alpha:.2f} ({low:.2f} to {high:.2f})".format(**each)
        print_text(
            f"{each['name']}: {alpha}, on {each['answers']:,} answers with two or more raters"
        )
    print_text("Usual reading: 0 is chance, and from 0.8 the ratings are reliable.")


def health(
    model: str,
    *,
    since: str = "30d",
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Health:
    """Show requests, errors, latency, ratings and labels of a model by time, and what changed.

    Args:
        model: Name that clients sent, or a custom model.
        since: Only requests of this period: 30d, 12h or 2026-01-31.
    """
    from luthier.server.live.rows import parse_since
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.arns import Arns
    from luthier.server.watch import health_with_drift

    with open_database(database) as service:
        since_moment, arns = parse_since(since), Arns(region)
        return health_with_drift(
            Locations(service), arns, account, model, since_moment, reads_paths=True
        )


def show_health(found: Health) -> None:
    """Print a table of periods, the stability of the labels, and the changes."""
    rows = [_health_row(each) for each in found.periods]
    print_rows([*dict.fromkeys(name for row in rows for name in row)], rows)
    if labels := found.label_stability:
        print_text(
            f"\nPopulation stability index of {labels.predictions:,} labels against the "
            f"{labels.compared_with}: {labels.index:.3f}. Usual reading: below 0.1 no change, from "
            f"0.25 a large change; {labels.by_chance:.3f} is chance."
        )
    print_text(f"\n{found.summary}")
    if drift := found.drift:
        print_text(drift.summary)
        for cluster in drift.clusters:
            print_text(f"  {cluster.inputs:,} inputs such as:")
            for example in cluster.examples:
                print_text(f"    {example}")
    elif found.drift_unknown:
        print_text(f"No drift test: {found.drift_unknown}")


def _health_row(period: PeriodHealth) -> Record:
    from luthier.server.live.health import ERRORS, LABEL, LATENCY

    row = {"from": str(period.first), "requests": f"{period.requests:,}"}
    labels = []
    for name, figure in period.measures.items():
        text = figure.text()
        if name.startswith(LABEL):
            labels.append((figure.value, f"{name.removeprefix(LABEL)} {text}"))
        elif name == ERRORS:
            row[name] = f"{figure.value * figure.count:,.0f} ({text})"
        elif name == LATENCY:
            row["median ms"], row["95 % ms"] = text, f"{period.p95_milliseconds:,.0f}"
        else:
            interval = f"{figure.text(figure.low)} to {figure.text(figure.high)}"
            row[name] = f"{text} ({interval}) of {figure.count:,}"
    if labels:
        row["frequent labels"] = ", ".join(text for _, text in sorted(labels, reverse=True)[:5])
    return row


def retrain(
    model: str,
    *,
    base: str | None = None,
    since: str | None = None,
    start: bool = False,
    show: bool = False,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Draft a retraining on old rows and on captured requests with feedback; start and show the job.

    Args:
        model: Custom model, or a deployment.
        base: New base model; the model's base by default.
        since: Only requests of 30d (default), 12h or 2026-01-31.
        start: Start the draft.
        show: Show the last retraining and its verdict.
    """
    from luthier.errors import RefusedInput
    from luthier.limits import AccountQuotas
    from luthier.server import retraining
    from luthier.server.live.rows import parse_since
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.accounts import quotas_of
    from luthier.server.tables.arns import Arns

    if (since is not None and (start or show)) or (start and show):
        raise RefusedInput(
            "`since` prepares a draft. Use `start` or `show` in a command of its own."
        )
    with open_database(database) as service:
        if start:
            job = retraining.start(service, Arns(region), account, model, base)
        elif show:
            with service.read() as session:
                found = retraining.latest(session, account, model)
            if found is None:
                raise RefusedInput(f'Model "{model}" has no retraining.')
            job = found
        else:
            with service.read() as session:
                quotas = quotas_of(session, account, AccountQuotas())
            job = retraining.draft(
                Locations(service), Arns(region), account, model, parse_since(since or "30d"), base,
                quotas, reads_paths=True,
            )  # fmt: skip
    return _retraining(job)


def _retraining(job: Job) -> Record:
    from luthier.server.retraining import is_draft

    plan = job.details["retraining"]
    seconds = plan["estimated_seconds"]
    compared = job.result["retraining"] if job.result and "retraining" in job.result else {}
    return {
        "model": plan["model"],
        "job": job.name,
        "state": "Draft" if is_draft(job) else job.state,
        "base": job.recipe["base"],
        "rows": plan["rows"],
        "new_labels": plan.get("new_labels"),
        "rare_labels": plan.get("rare_labels"),
        "estimate": None if seconds is None else format_duration(seconds),
        "failure": job.failure,
        "verdict": compared.get("verdict"),
    }


def show_retraining(record: Record) -> None:
    """Print the plan or the verdict, and the next command."""
    show_record(record)
    if record["state"] == "Draft":
        print_text(f"\nTrain on the rows: luthier live retrain {record['model']} --start")
    elif record["state"] in ("Queued", "Running"):
        print_text(f"\nSee the result: luthier live retrain {record['model']} --show")


def promote(
    deployment: str,
    model: str,
    *,
    share: float | None = None,
    answers: int | None = None,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Switch a deployment to a new model, after the server has loaded the model.

    Args:
        deployment: Name or ARN of the deployment.
        model: Name, id or ARN of a model of the account.
        share: Try the model on a share of users or sessions first.
        answers: Answers of the canary before promotion (500).
    """
    from luthier.server.live.canary import ANSWERS
    from luthier.server.promotion import promote
    from luthier.server.tables.arns import Arns

    with open_database(database) as service:
        with service.write() as session:
            promote(session, Arns(region), account, deployment, model, operator(), share, answers)
        if share is not None and answers is None:
            note(
                f"Promotion after {ANSWERS} answers. Fewer often miss a rise of errors from 1 % to 5 %."
            )
        return _wait_for_change(service, account, deployment, region)


def rollback(
    deployment: str,
    *,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Stop the current change of a deployment, or return to the model before.

    Args:
        deployment: Name or ARN of the deployment.
    """
    from luthier.server.promotion import roll_back
    from luthier.server.tables.arns import Arns

    with open_database(database) as service:
        with service.write() as session:
            roll_back(session, Arns(region), account, deployment, operator())
        return _wait_for_change(service, account, deployment, region)


def history(
    deployment: str,
    *,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Show the history of a deployment: models, times and users.

    Args:
        deployment: Name or ARN of the deployment.
    """
    with open_database(database) as service:
        return _describe(service, account, deployment, region)


def _describe(service: Database, account: str, deployment: str, region: str) -> Record:
    from luthier.server.promotion import describe, find_deployment
    from luthier.server.tables.arns import Arns

    with service.read() as session:
        return describe(session, find_deployment(session, Arns(region), account, deployment))


def _wait_for_change(service: Database, account: str, deployment: str, region: str) -> Record:
    """Wait until the server has loaded the model, and return the deployment.

    Raises:
        RefusedInput: If the server could not load the model.
    """
    from luthier.errors import RefusedInput
    from luthier.server.promotion import STOPPED

    # The server loads the model in another process, and the database is the only connection.
    deadline = time.monotonic() + LOADING_SECONDS
    while True:
        found = _describe(service, account, deployment, region)
        last = found["history"][-1]
        if last["state"] != "preparing":
            break
        if time.monotonic() > deadline:
            note("No server has loaded the model yet. A running server switches after loading.")
            break
        time.sleep(0.2)
    if last["state"] == "ended" and not last["note"].startswith(STOPPED):
        raise RefusedInput(f"The deployment still serves {found['model']}: {last['note']}")
    return found


def show_history(record: Record) -> None:
    """Print the serving model and the changes."""
    canary = record.get("canary")
    show_record({name: record[name] for name in ("deployment", "status", "model", "model_arn")})
    if canary:
        print_text(
            f"canary: {canary['model']} answers a share of {canary['share']:g}. It has "
            f"{canary['answers']} answers, and is promoted at {canary['promoted_at']}."
        )
        print_rows([*canary["comparisons"][0]], canary["comparisons"])
    columns = ("finished", "model", "action", "state", "user", "note")
    rows = [
        each | ({"finished": f"{each['finished']:%Y-%m-%d %H:%M:%S}"} if "finished" in each else {})
        for each in record["history"]
    ]
    print_rows([*columns], rows)


def show_settings(record: Record) -> None:
    """Print the settings with a clear first line."""
    from luthier.gate.pii import NOT_SEARCHED

    state = "on" if record["enabled"] else "off"
    shown = {name: value for name, value in record.items() if name != "enabled"}
    if "redact" in record:
        # A false value would not be printed, and a reader would miss that redaction is off.
        shown["redact"] = "yes" if record["redact"] else "no"
    show_record({"capture": state} | shown)
    if record["enabled"] and record.get("redact"):
        print_text(NOT_SEARCHED)


capture_app = CommandGroup("Capture requests to models and the replies.", extra="server")
capture_app.add(Command(capture_on, show_settings, "on"))
capture_app.add(Command(capture_off, show_settings, "off"))
capture_app.add(Command(capture_show, show_settings, "show"))
capture_app.add(Command(capture_export, print_export, "export"))
feedback_app = CommandGroup("Rate captured requests.", extra="server")
feedback_app.add(Command(feedback_add, show_record, "add"))
feedback_app.add(Command(feedback_import, show_record, "import"))
feedback_app.add(Command(feedback_agreement, show_agreement, "agreement"))
live_app = CommandGroup("Keep a deployed model good: capture, rate, watch.", extra="server")
live_app.add_typer(capture_app, name="capture")
live_app.add_typer(feedback_app, name="feedback")
live_app.add_typer(schedule_app, name="schedule")
live_app.add(Command(health, show_health))
live_app.add(Command(retrain, show_retraining))
live_app.add(Command(auto_retrain, show_rule))
live_app.add(Command(promote, show_history))
live_app.add(Command(rollback, show_history))
live_app.add(Command(history, show_history))
