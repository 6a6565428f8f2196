"""Report of an eval run: scores, comparison with earlier runs, failed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.evaluation.significance import RowScores, differences
from luthier.pages import shorten
from luthier.server.openai.protocol import JsonObject
from luthier.server.tables.openai import evaluations as store
from luthier.server.tables.openai.evaluations import EvaluationRow, EvaluationRun

MOST_RUNS = 20
MOST_ROWS = 50


def report_object(session: Session, run: EvaluationRun) -> JsonObject:
    """Return the report as JSON. The console shows the tables in the same order."""
    graded = run.graded_rows
    tables = (_criterion_table(run), _run_table(session, run), _failing_table(session, run))
    return {
        "name": run.name,
        "model": run.request["data_source"].get("model"),
        "facts": [
            ("rows", f"{graded:,}", f"of {run.total:,}" if run.total > graded else ""),
            ("passed", *_share(run.passed, graded)),
            ("status", run.status, run.error_message or ""),
        ],
        "tables": [table for table in tables if table["rows"]],
    }


def _table(
    caption: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]], further: int = 0
) -> JsonObject:
    named = [{"name": name, "kind": kind} for name, kind in columns.items()]
    return {"caption": caption, "columns": named, "rows": rows, "further": further}


def _share(passed: int, rows: int) -> tuple[str, str]:
    """Return the share of rows that pass, and the 95 % confidence interval."""
    if not rows:
        return "–", "–"
    low, high = RowScores.of([1.0] * passed + [0.0] * (rows - passed)).interval
    return f"{passed / rows:.1%}", f"{low:.1%} to {high:.1%}"


def _criterion_table(run: EvaluationRun) -> JsonObject:
    columns = {"criterion": "name", "passed": "number", "failed": "number", "not graded": "number"}
    columns |= {"share": "number", "with 95 % confidence": "number", "": "bar"}
    rows = [
        [
            name, f"{passed:,}", f"{failed:,}", f"{errored:,}", *_share(passed, passed + failed),
            f"{100 * passed / max(1, passed + failed):.1f}",
        ]
        for name, (passed, failed, errored) in run.tallies.get("criteria", {}).items()
    ]  # fmt: skip
    return _table("Criteria", columns, rows)


def _run_table(session: Session, run: EvaluationRun) -> JsonObject:
    """Return the table of completed runs of the same eval, with differences to ``run``."""
    query = select(EvaluationRun).where(
        EvaluationRun.eval_id == run.eval_id, EvaluationRun.status == store.COMPLETED
    )
    runs = list(session.scalars(query.order_by(EvaluationRun.seq.desc()).limit(MOST_RUNS)))
    changes = _changes(session, run, [other for other in runs if other.id != run.id])
    columns = {"run": "name", "model": "text", "when (UTC)": "text", "rows": "number"}
    columns |= {"passed": "number", "with 95 % confidence": "number", "beside this run": "text"}
    rows = [
        [
            other.name + (" (this one)" if other.id == run.id else ""),
            other.request["data_source"].get("model") or "",
            f"{other.created:%Y-%m-%d %H:%M}",
            f"{other.graded_rows:,}",
            *_share(other.passed, other.graded_rows),
            changes.get(other.id, ""),
        ]
        for other in runs
    ]
    return _table("Runs of this eval", columns, rows if runs != [run] else [])


def _changes(
    session: Session, run: EvaluationRun, others: Sequence[EvaluationRun]
) -> dict[str, str]:
    """Return the differences of pass rates to ``run``, for runs of the same rows."""
    own = _passes(session, run)
    source = run.request["data_source"]["source"]
    scores = {
        other.id: RowScores.of([passes[number] for number in own])
        for other in others
        # Scores of other rows are no comparison.
        if other.request["data_source"]["source"] == source
        and (passes := _passes(session, other)).keys() == own.keys()
    }
    if not own or not scores:
        return {}
    return {
        name: f"{100 * each.value:+.1f} points "
        f"({'more than chance' if each.significant else 'may be chance'})"
        for name, each in differences(RowScores.of([*own.values()]), scores).items()
    }


def _passes(session: Session, run: EvaluationRun) -> dict[int, float]:
    query = select(EvaluationRow.number, EvaluationRow.status)
    statuses = session.execute(query.where(EvaluationRow.run_id == run.id))
    return {number: float(status == store.PASS) for number, status in statuses}


def _failing_table(session: Session, run: EvaluationRun) -> JsonObject:
    """Return the table of failed rows, beginning with rows that have an error."""
    failing = [
        row
        for status in (store.ERROR, store.FAIL)
        for row in store.list_rows(session, run.id, MOST_ROWS, status=status)
    ][:MOST_ROWS]
    rows = []
    for row in failing:
        sample = row.record["sample"]
        reply = "".join(each["content"] or "" for each in sample["output"])
        why = str(sample["error"]["message"]) if sample["error"] else _why(row.record["results"])
        rows.append([f"{row.number:,}", shorten(row.record["item"]), shorten(reply), why])
    columns = {"row": "number", "item": "code", "answer": "text", "why": "text"}
    further = max(0, run.failed + run.errored - MOST_ROWS)
    return _table("Rows that do not pass", columns, rows, further)


def _why(results: Sequence[Mapping[str, Any]]) -> str:
    reasons = {
        each["name"]: each["error"]["message"] if "error" in each else f"{each['score']:.3g}"
        for each in results
        if not each["passed"]
    }
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
