"""Report of an eval run: scores, comparison with earlier runs, failed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.evaluation.significance import Difference, RowScores, differences
from luthier.pages import Table, shorten
from luthier.server.openai.protocol import JsonObject
from luthier.server.tables import evaluations as store
from luthier.server.tables.evaluations import EvaluationRow, EvaluationRun

MOST_RUNS = 20
MOST_ROWS = 50


def report_object(session: Session, run: EvaluationRun) -> JsonObject:
    """Return the report as JSON. The console shows the tables in the same order."""
    counts = {"failed": run.failed, "could not be graded": run.errored}
    rows = run.passed + run.failed + run.errored
    facts = [
        ("rows", f"{rows:,}", f"of {run.total:,}" if run.total > rows else ""),
        (
            "passed",
            _share(run.passed, rows),
            ", ".join(f"{count:,} {name}" for name, count in counts.items() if count),
        ),
        ("status", run.status, run.error_message or ""),
    ]
    tables = (
        _criterion_table(run),
        _run_table(session, run),
        _failing_table(session, run),
        _usage_table(run),
    )
    return {
        "name": run.name,
        "model": run.request["data_source"].get("model"),
        "facts": facts,
        "tables": [
            {
                "caption": table.caption,
                "columns": [{"name": name, "kind": kind} for name, kind in table.columns],
                "rows": [[value for value, _ in row] for row in table.rows],
                "further": table.further,
            }
            for table in tables
            if table is not None
        ],
    }


def _share(passed: int, rows: int) -> str:
    return f"{passed / rows:.1%}" if rows else "–"


def _between(passed: int, rows: int) -> str:
    if not rows:
        return "–"
    low, high = RowScores.of([1.0] * passed + [0.0] * (rows - passed)).interval
    return f"{low:.1%} to {high:.1%}"


def _criterion_table(run: EvaluationRun) -> Table:
    rows = []
    for name, (passed, failed, errored) in run.tallies.get("criteria", {}).items():
        graded = passed + failed
        share = f"{100 * passed / graded:.1f}" if graded else "0"
        rows.append(
            [name, f"{passed:,}", f"{failed:,}", f"{errored:,}", _share(passed, graded),
             _between(passed, graded), share]
        )  # fmt: skip
    columns = {"criterion": "name", "passed": "number", "failed": "number"}
    columns |= {
        "not graded": "number",
        "share": "number",
        "with 95 % confidence": "number",
        "": "bar",
    }
    return Table.of("Criteria", columns, rows)


def _run_table(session: Session, run: EvaluationRun) -> Table | None:
    """Return the table of completed runs of the same eval, with differences to ``run``."""
    query = select(EvaluationRun).where(
        EvaluationRun.eval_id == run.eval_id, EvaluationRun.status == store.COMPLETED
    )
    runs = list(session.scalars(query.order_by(EvaluationRun.seq.desc()).limit(MOST_RUNS)))
    if all(other.id == run.id for other in runs):
        return None
    differences_by_run = _differences(session, run, runs)
    rows = []
    for other in runs:
        graded = other.passed + other.failed + other.errored
        rows.append(
            [
                other.name + (" (this one)" if other.id == run.id else ""),
                other.request["data_source"].get("model") or "",
                f"{other.created:%Y-%m-%d %H:%M}",
                f"{graded:,}",
                _share(other.passed, graded),
                _between(other.passed, graded),
                _words(differences_by_run.get(other.id)),
            ]
        )
    columns = {"run": "name", "model": "text", "when (UTC)": "text", "rows": "number"}
    columns |= {"passed": "number", "with 95 % confidence": "number", "beside this run": "text"}
    return Table.of("Runs of this eval", columns, rows)


def _differences(
    session: Session, run: EvaluationRun, others: Sequence[EvaluationRun]
) -> dict[str, Difference]:
    """Return the differences of pass rates to ``run``, for runs of the same rows."""
    own = _passes(session, run)
    source = run.request["data_source"]["source"]
    scores = {
        other.id: RowScores.of([float(passes[number]) for number in sorted(own)])
        for other in others
        if other.id != run.id
        and other.request["data_source"]["source"] == source
        and (passes := _passes(session, other)).keys() == own.keys()
    }
    if not own or not scores:
        return {}
    return differences(RowScores.of([float(own[number]) for number in sorted(own)]), scores)


def _passes(session: Session, run: EvaluationRun) -> dict[int, bool]:
    query = select(EvaluationRow.number, EvaluationRow.status)
    statuses = session.execute(query.where(EvaluationRow.run_id == run.id))
    return {number: status == store.PASS for number, status in statuses}


def _words(difference: Difference | None) -> str:
    if difference is None:
        return ""
    verdict = "more than chance" if difference.significant else "may be chance"
    return f"{100 * difference.value:+.1f} points ({verdict})"


def _failing_table(session: Session, run: EvaluationRun) -> Table | None:
    """Return the table of failed rows, beginning with rows that have an error."""
    failing = [
        row
        for status in (store.ERROR, store.FAIL)
        for row in store.list_rows(session, run.id, MOST_ROWS, status=status)
    ]
    rows = []
    for row in failing[:MOST_ROWS]:
        record = row.record
        reply = "".join(each["content"] or "" for each in record["sample"]["output"])
        rows.append([f"{row.number:,}", shorten(record["item"]), shorten(reply), _why(record)])
    columns = {"row": "number", "item": "code", "answer": "text", "why": "text"}
    further = max(0, run.failed + run.errored - MOST_ROWS)
    return Table.of("Rows that do not pass", columns, rows, further) if rows else None


def _why(record: dict[str, Any]) -> str:
    if record["sample"]["error"]:
        return str(record["sample"]["error"]["message"])
    reasons = [
        (
            result["name"],
            result["error"]["message"] if "error" in result else f"{result['score']:.3g}",
        )
        for result in record["results"]
        if not result["passed"]
    ]
    return "; ".join(f"{name}: {why}" for name, why in reasons)


def _usage_table(run: EvaluationRun) -> Table | None:
    rows = [
        [model, f"{calls:,}", f"{read:,}", f"{written:,}"]
        for model, (calls, read, written) in run.tallies.get("usage", {}).items()
    ]
    columns = {"model": "name", "calls": "number", "tokens read": "number"}
    return Table.of("Models", columns | {"tokens written": "number"}, rows) if rows else None
