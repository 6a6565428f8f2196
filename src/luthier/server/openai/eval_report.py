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
    found = list(session.scalars(query.order_by(EvaluationRun.seq.desc()).limit(MOST_RUNS)))
    if all(each.id == run.id for each in found):
        return None
    apart = _differences(session, run, found)
    rows = []
    for each in found:
        graded = each.passed + each.failed + each.errored
        rows.append(
            [
                each.name + (" (this one)" if each.id == run.id else ""),
                each.request["data_source"].get("model") or "",
                f"{each.created:%Y-%m-%d %H:%M}",
                f"{graded:,}",
                _share(each.passed, graded),
                _between(each.passed, graded),
                _words(apart.get(each.id)),
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
        each.id: RowScores.of([float(found[number]) for number in sorted(own)])
        for each in others
        if each.id != run.id
        and each.request["data_source"]["source"] == source
        and (found := _passes(session, each)).keys() == own.keys()
    }
    if not own or not scores:
        return {}
    return differences(RowScores.of([float(own[number]) for number in sorted(own)]), scores)


def _passes(session: Session, run: EvaluationRun) -> dict[int, bool]:
    query = select(EvaluationRow.number, EvaluationRow.status)
    found = session.execute(query.where(EvaluationRow.run_id == run.id))
    return {number: status == store.PASS for number, status in found}


def _words(apart: Difference | None) -> str:
    if apart is None:
        return ""
    sure = "more than chance" if apart.significant else "may be chance"
    return f"{100 * apart.value:+.1f} points ({sure})"


def _failing_table(session: Session, run: EvaluationRun) -> Table | None:
    """Return the table of failed rows, beginning with rows that have an error."""
    found = [
        row
        for status in (store.ERROR, store.FAIL)
        for row in store.rows_of(session, run.id, MOST_ROWS, status=status)
    ]
    rows = []
    for row in found[:MOST_ROWS]:
        record = row.record
        said = "".join(each["content"] or "" for each in record["sample"]["output"])
        rows.append([f"{row.number:,}", shorten(record["item"]), shorten(said), _why(record)])
    columns = {"row": "number", "item": "code", "answer": "text", "why": "text"}
    further = max(0, run.failed + run.errored - MOST_ROWS)
    return Table.of("Rows that do not pass", columns, rows, further) if rows else None


def _why(record: dict[str, Any]) -> str:
    if record["sample"]["error"]:
        return str(record["sample"]["error"]["message"])
    said = [
        (each["name"], each["error"]["message"] if "error" in each else f"{each['score']:.3g}")
        for each in record["results"]
        if not each["passed"]
    ]
    return "; ".join(f"{name}: {why}" for name, why in said)


def _usage_table(run: EvaluationRun) -> Table | None:
    rows = [
        [model, f"{calls:,}", f"{read:,}", f"{written:,}"]
        for model, (calls, read, written) in run.tallies.get("usage", {}).items()
    ]
    columns = {"model": "name", "calls": "number", "tokens read": "number"}
    return Table.of("Models", columns | {"tokens written": "number"}, rows) if rows else None
