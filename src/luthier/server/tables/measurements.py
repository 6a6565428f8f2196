"""Measurements: evaluations and comparisons of models, each with a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, TypedDict, TypeVar

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import WrongState
from luthier.server.tables import storage
from luthier.server.tables.database import Base, JSONText, QuotingText, new_id, now
from luthier.server.tables.jobs import ENDED
from luthier.server.tables.queue import next_turn
from luthier.server.tables.results import ResultWork

EVALUATION, COMPARISON = "evaluation", "comparison"
PERIODS = {"day": timedelta(days=1), "week": timedelta(weeks=1)}


class MeasuredModel(TypedDict):
    """A model of a measurement."""

    name: str
    """Name that the client sent."""
    arn: str
    """ARN of the foundation model or custom model."""
    stored_id: str


class ReportWork(ResultWork):
    """Work that ends with a report."""

    plural: ClassVar[str]
    """Name of several works of the table, for messages."""

    request: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """Body of the request."""
    models: Mapped[list[Any]]
    """Each :class:`MeasuredModel`; in a comparison, the base last."""
    result: Mapped[dict[str, Any] | None] = mapped_column(JSONText, deferred=True)
    """The report."""
    page: Mapped[str | None] = mapped_column(QuotingText, deferred=True)
    """The report as an HTML page."""
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)


Report = TypeVar("Report", bound=ReportWork)


class Measurement(ReportWork, Base):
    """An evaluation or a comparison."""

    __tablename__ = "measurements"
    noun = "the measurement"
    plural = "evaluations and comparisons"
    unknown_memory = 1 << 29
    prefix = "measurement-"

    kind: Mapped[str]
    schedule: Mapped[str | None] = mapped_column(index=True)
    """Id of the :class:`EvaluationSchedule` that created the evaluation."""
    row_scores: Mapped[dict[str, Any] | None] = mapped_column(JSONText, deferred=True)
    """``measure``, ``rows`` (SHA-256 of the rows) and the first score of a scheduled evaluation."""
    change: Mapped[dict[str, Any] | None]
    """Difference to the first evaluation of the schedule on the same rows, and ``is_fall``."""


class EvaluationSchedule(Base):
    """Rows and graders on which the model of a deployment is evaluated regularly."""

    __tablename__ = "evaluation_schedules"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(index=True)
    endpoint: Mapped[str] = mapped_column(unique=True)
    """Id of the deployment."""
    every: Mapped[str]
    """A key of :data:`PERIODS`."""
    request: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """Body of the evaluations."""
    next_run: Mapped[datetime]
    announced: Mapped[int] = mapped_column(default=0)
    """Number (``seq``) of the last evaluation whose result was announced."""
    file: Mapped[str | None]
    """Id of an uploaded file that belongs to the schedule."""
    skipped: Mapped[str | None]
    """Reason for the last evaluation, if skipped."""
    created: Mapped[datetime]


def create(
    session: Session,
    table: type[Report],
    account: str,
    request: Mapping[str, Any],
    models: Sequence[MeasuredModel],
    **columns: Any,
) -> Report:
    """Queue work that ends with a report."""
    moment = now()
    fields: dict[str, Any] = {
        "id": new_id(),
        "account": account,
        "turn": next_turn(session, table, account),
        "since": moment,
        "created": moment,
        "request": dict(request),
        "models": list(models),
        **columns,
    }
    made = table(**fields)
    session.add(made)
    session.flush()
    return made


def is_measured(session: Session, table: type[ReportWork], account: str, arn: str) -> bool:
    """Return whether unfinished work of the account reads the model of this ARN."""
    unfinished = select(table.models).where(table.account == account, table.is_unfinished())
    return any(each["arn"] == arn for models in session.scalars(unfinished) for each in models)


def runs_of(session: Session, schedule: str, after: int = 0) -> list[Measurement]:
    """Return the evaluations of a schedule since the number ``after``, the oldest first."""
    query = select(Measurement).where(Measurement.schedule == schedule, Measurement.seq > after)
    return list(session.scalars(query.order_by(Measurement.seq)))


def delete(session: Session, row: ReportWork) -> None:
    """Delete ended work with its report. The caller has locked the row.

    Raises:
        WrongState: if the work has not ended.
    """
    if row.state not in ENDED:
        raise WrongState(f"{row.noun} {row.id} is {row.state}. Stop {row.noun} first.")
    session.delete(row)
    session.flush()
    storage.release(session, row.account, stored_bytes=row.stored_bytes)
