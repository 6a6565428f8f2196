"""Customization jobs as the database keeps them: what was asked, where each stands, who works on it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from luthier.store.database import Base

QUEUED, RUNNING, PAUSED, STOPPING = "Queued", "Running", "Paused", "Stopping"
COMPLETED, FAILED, STOPPED = "Completed", "Failed", "Stopped"
ENDED = (COMPLETED, FAILED, STOPPED)
"""States that nothing leaves."""


class Job(Base):
    """One customization job. It is made by ``luthier.jobs.submit`` and by nobody else."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    """Of the job; stays taken when the job has ended."""
    model_name: Mapped[str]
    """Of the custom model that it is to make."""
    face: Mapped[str]
    """``bedrock``, ``openai`` or ``native``: who asked."""
    customization_type: Mapped[str]
    """``FINE_TUNING``, ``CONTINUED_PRE_TRAINING``, ``DISTILLATION``, ``REINFORCEMENT_FINE_TUNING``."""
    foundation: Mapped[str]
    """``provider.name`` of the foundation model at the bottom of the lineage."""
    base_model: Mapped[str]
    """ARN of what it starts from: that foundation model, or a custom model."""
    command: Mapped[str]
    """``tune`` or ``distil``: which kind of recipe ``recipe`` is."""
    recipe: Mapped[dict[str, Any]]
    """Plain fields of the recipe; its data are addresses, fetched by the worker."""
    request: Mapped[dict[str, Any]]
    """What the face was asked, to be shown again: role, hyper-parameters, locations, ..."""
    output: Mapped[str | None]
    """Address below which metrics and certificate are written; ``None`` for none."""
    validators: Mapped[list[Any]]
    """Addresses of validation files, in their order."""

    state: Mapped[str] = mapped_column(default=QUEUED, index=True)
    failure: Mapped[str | None]
    """Why it failed: names file, line and rule where it was the data."""
    result: Mapped[dict[str, Any] | None]
    """What the run gave back: losses, steps, tokens, the model's id in the store."""
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Settings that were chosen for it, times of its parts, progress (step, steps)."""
    priority: Mapped[int] = mapped_column(default=0)
    """Higher is started first."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Workers that were started for it."""
    memory: Mapped[int] = mapped_column(default=0)
    """Estimated peak in bytes, for admission; 0 while unknown."""
    time_limit: Mapped[int | None]
    """Seconds of work after which it is stopped and failed."""
    lease: Mapped[str | None]
    """Token of the worker that holds it; what any other worker writes is refused."""
    lease_ends: Mapped[datetime | None]
    """The holder is taken for dead after this moment, unless it has been heard from."""
    created: Mapped[datetime]
    modified: Mapped[datetime]
    started: Mapped[datetime | None]
    """When the first worker began."""
    ended: Mapped[datetime | None]


class JobEvent(Base):
    """Something that happened to a job; events are only ever added."""

    __tablename__ = "job_events"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[datetime]
    kind: Mapped[str]
    """``state``, ``message``, ``warning``, ``error`` or ``metrics``."""
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Of ``metrics``: ``step``, ``train_loss`` or ``valid_loss``, and what else the run recorded."""
