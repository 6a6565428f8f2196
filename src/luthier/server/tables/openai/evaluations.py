"""Evals of the OpenAI API, their runs and the graded rows of each run.

An :class:`Eval` defines how rows are graded. A run grades the rows of one source, and one model's
replies to these rows. The server stores each graded row in its own transaction, so that a restarted
server does not grade a row twice. The bytes of the rows count towards the account's storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.limits import AccountQuotas
from luthier.server.tables import storage
from luthier.server.tables.database import (
    Base,
    JSONText,
    QuotingText,
    find_row,
    now,
    page_of,
    random_id,
)
from luthier.server.tables.queue import BackgroundWork, next_turn

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, FAILED, CANCELED = "completed", "failed", "canceled"
ENDED = (COMPLETED, FAILED, CANCELED)
PASS, FAIL, ERROR = "pass", "fail", "error"
"""Statuses of a graded row: all criteria pass, a criterion fails, or a criterion raises an error."""
PATIENCE = timedelta(hours=24)
"""Time limit of a run, including the wait in the queue."""


class Eval(Base):
    """Definition of an evaluation."""

    __tablename__ = "evals"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True, default=lambda: "eval_" + random_id(24))
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    definition: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """``data_source_config`` and ``testing_criteria``, as sent by the client."""
    user_metadata: Mapped[dict[str, Any]]
    stored_bytes: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(default=now)


class EvaluationRun(BackgroundWork, Base):
    """Run of an evaluation."""

    __tablename__ = "evaluation_runs"
    noun = "evaluation"
    ended = ENDED

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True, default=lambda: "evalrun_" + random_id(24))
    eval_id: Mapped[str] = mapped_column(ForeignKey("evals.id"), index=True)
    name: Mapped[str]
    request: Mapped[dict[str, Any]] = mapped_column(JSONText)
    user_metadata: Mapped[dict[str, Any]]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(QuotingText)
    total: Mapped[int] = mapped_column(default=0)
    """Number of rows; 0 before counting."""
    passed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    errored: Mapped[int] = mapped_column(default=0)
    tallies: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Totals of the run.

    ``criteria``: passed, failed and ungraded rows by name. ``usage``: calls, prompt tokens and
    generated tokens by model.
    """
    stored_bytes: Mapped[int] = mapped_column(BigInteger)
    completed: Mapped[datetime | None]
    expires: Mapped[datetime] = mapped_column(default=lambda: now() + PATIENCE)
    """Time limit of the run."""

    @property
    def graded_rows(self) -> int:
        """Number of rows with a result."""
        return self.passed + self.failed + self.errored


class EvaluationRow(Base):
    """Graded row of a run."""

    __tablename__ = "evaluation_rows"
    __table_args__ = (UniqueConstraint("run_id", "number"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("evaluation_runs.id"), index=True)
    number: Mapped[int]
    """Number of the row in the source, from 1."""
    status: Mapped[str]
    record: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """Row as the API returns it."""
    graded: Mapped[datetime] = mapped_column(default=now)


Stored = TypeVar("Stored", Eval, EvaluationRun)


@dataclass(frozen=True)
class GradedRow:
    """Result of a row."""

    status: str
    record: dict[str, Any]
    criteria: Mapping[str, str] = field(default_factory=dict)
    """``pass``, ``fail`` or ``error`` by the name of each criterion."""
    usage: Sequence[tuple[str, int, int]] = ()
    """Model calls: name, prompt tokens, generated tokens."""


def create(session: Session, quotas: AccountQuotas, row: Stored) -> Stored:
    """Store a new eval or a new run; runs of an account are sequential.

    Raises:
        QuotaExceeded: if the account has no space for the definition or the request.
    """
    if isinstance(row, EvaluationRun):
        row.turn = next_turn(session, EvaluationRun, row.account)
        row.stored_bytes = len(json.dumps(row.request))
    else:
        row.stored_bytes = len(json.dumps(row.definition))
    session.add(row)
    session.flush()
    storage.charge(session, row.account, quotas, stored_bytes=row.stored_bytes)
    return row


def get_eval(session: Session, account: str, eval_id: str, *, lock: bool = False) -> Eval | None:
    """Return the account's evaluation; ``lock`` locks the row."""
    found = select(Eval).where(Eval.account == account, Eval.id == eval_id)
    return find_row(session, found, lock=lock)


def get_run(
    session: Session, account: str, eval_id: str, run_id: str, *, lock: bool = False
) -> EvaluationRun | None:
    """Return a run of the account's evaluation; ``lock`` locks the row until the transaction ends."""
    found = select(EvaluationRun).where(
        EvaluationRun.account == account,
        EvaluationRun.eval_id == eval_id,
        EvaluationRun.id == run_id,
    )
    return find_row(session, found, lock=lock)


def done_rows(session: Session, run_id: str) -> set[int]:
    """Return the numbers of the graded rows."""
    return set(session.scalars(select(EvaluationRow.number).where(EvaluationRow.run_id == run_id)))


def record(
    session: Session, run: EvaluationRun, quotas: AccountQuotas, number: int, row: GradedRow
) -> None:
    """Store the result of a row and update the totals.

    Raises:
        QuotaExceeded: if the account has no space for the result.
    """
    # Counted in the transaction that stores the row, so that the quota cannot drift.
    size = len(json.dumps(row.record))
    session.add(EvaluationRow(run_id=run.id, number=number, status=row.status, record=row.record))
    run.passed += row.status == PASS
    run.failed += row.status == FAIL
    run.errored += row.status == ERROR
    graded = [(name, [status == each for each in (PASS, FAIL, ERROR)])
              for name, status in row.criteria.items()]  # fmt: skip
    calls = [(model, [1, read, written]) for model, read, written in row.usage]
    tallies: dict[str, dict[str, list[int]]] = {}
    for group, counted in (("criteria", graded), ("usage", calls)):
        totals = tallies[group] = {**run.tallies.get(group, {})}
        for name, counts in counted:
            old = totals.get(name, (0, 0, 0))
            totals[name] = [total + count for total, count in zip(old, counts, strict=True)]
    run.tallies = tallies
    run.stored_bytes += size
    session.flush()
    storage.charge(session, run.account, quotas, stored_bytes=size)


def list_rows(
    session: Session,
    run_id: str,
    limit: int,
    position: int | None = None,
    *,
    status: str | None = None,
    ascending: bool = True,
) -> list[EvaluationRow]:
    """Return at most ``limit`` rows that follow number ``position`` in the chosen order."""
    query = select(EvaluationRow).where(EvaluationRow.run_id == run_id)
    if status is not None:
        query = query.where(EvaluationRow.status == status)
    number = EvaluationRow.number
    return page_of(session, query, number, limit=limit, position=position, ascending=ascending)


def end(
    run: EvaluationRun, status: str, code: str | None = None, message: str | None = None
) -> None:
    """End an unfinished run."""
    run.status, run.completed = status, now()
    run.error_code, run.error_message = code, message


def delete_run(session: Session, run: EvaluationRun) -> None:
    """Delete a run with all rows. The caller has locked the run."""
    session.execute(delete(EvaluationRow).where(EvaluationRow.run_id == run.id))
    session.delete(run)
    session.flush()
    storage.release(session, run.account, stored_bytes=run.stored_bytes)
