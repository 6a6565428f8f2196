"""Customization jobs as the database keeps them: what was asked, where each stands, what happened.

A job's state changes in :func:`move` and nowhere else: one conditional update, one event, one look
into ``TRANSITIONS``. What people ask of a job (stop, pause, resume) comes first, then what its worker
writes by its lease (``luthier.server.tables.queue``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NotRequired, TypedDict, Unpack

from sqlalchemy import ColumnElement, ForeignKey, UniqueConstraint, delete, insert, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column, synonym

from luthier.errors import LeaseLost, WrongState
from luthier.library.folders import JOB_PREFIX
from luthier.limits import AccountQuotas
from luthier.server.tables import custom_models, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.custom_models import ACTIVE, RESERVED, CustomModel
from luthier.server.tables.database import Base, Plain, QuotingText, find_row, now, page_of
from luthier.server.tables.queue import QueuedWork, hold
from luthier.server.tables.queue import renew as renew_lease
from luthier.server.tables.usage import Usage, add_usage

QUEUED, RUNNING, PAUSED, STOPPING = "Queued", "Running", "Paused", "Stopping"
COMPLETED, FAILED, STOPPED = "Completed", "Failed", "Stopped"
ENDED = (COMPLETED, FAILED, STOPPED)
"""States that nothing leaves."""
GOING_ON = (QUEUED, RUNNING)
"""States of jobs that take part in turns."""
TRANSITIONS: Mapping[str, frozenset[str]] = {
    QUEUED: frozenset((RUNNING, PAUSED, STOPPING, STOPPED, FAILED)),
    # Back to the queue: its worker died, or gave it back at a checkpoint.
    RUNNING: frozenset((QUEUED, PAUSED, STOPPING, COMPLETED, FAILED)),
    PAUSED: frozenset((QUEUED, STOPPING, STOPPED, FAILED)),
    STOPPING: frozenset((STOPPED,)),
    COMPLETED: frozenset(),
    FAILED: frozenset(),
    STOPPED: frozenset(),
}
"""Where a job may go from each state; every change of a state is looked up here."""


MOST_CRASHES = 3
"""Deaths of workers at one step after which the job fails."""


class JobPart(TypedDict):
    """How far one part of the work is."""

    status: str
    """In Bedrock's words."""
    created: str
    modified: str
    """Moments in ISO 8601."""


class JobProgress(TypedDict):
    """Where the training stands."""

    step: int
    steps: int
    loss: float | None
    """Of that step."""
    estimated_finish: NotRequired[str]
    """A moment in ISO 8601; from the second step of a worker on."""


class JobResult(TypedDict):
    """What came of a completed job; the model's own record tells the rest."""

    stored_id: str
    """Id under which the store opens the custom model."""
    steps: int
    tokens: int
    """Trained on, over all epochs."""
    train_loss: float
    """Of the last step."""
    validation_losses: list[float | None]
    """One for each validator, in their order; null where it is no finite number."""
    verdicts: NotRequired[list[str]]
    """What the evaluation says of the model, and what to do about it."""
    label_issues: NotRequired[dict[str, int]]
    """Number of ``issues``, labels worth a look, and of the ``rows`` that were examined."""


class JobDetails(TypedDict, total=False):
    """What is known of a job beside its state, as its worker writes it."""

    sources: list[str]
    """Addresses of the training files, in their order."""
    chosen: dict[str, Any]
    """Settings that the request left open, by their names."""
    reasons: dict[str, str]
    """Why they were chosen so, by the same names."""
    parts: dict[str, JobPart]
    """``validation``, ``data_processing`` and ``training``."""
    progress: JobProgress
    crashed_at: int
    """The step of the last crash."""


class Job(QueuedWork, Base):
    """One customization job. It is made by ``luthier.server.jobs.submit`` and by nobody else."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("account", "name"),)
    noun = "job"
    memory_advice = "choose a smaller batch, shorter rows or a smaller model."

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
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
    failure: Mapped[str | None] = mapped_column(QuotingText)
    """Why it failed: names file, line and rule where it was the data."""
    result: Mapped[JobResult | None] = mapped_column(Plain)
    """What the run gave back: losses, steps, tokens, the model's id in the store."""
    details: Mapped[JobDetails] = mapped_column(Plain, default=dict)
    attempts: Mapped[int] = mapped_column(default=0)
    """Workers that were started for it."""
    cores: Mapped[int] = mapped_column(default=1)
    """Threads that it computes with; part of what its bits depend on."""
    worked: Mapped[float] = mapped_column(default=0.0)
    """Seconds that workers spent on it."""
    time_limit: Mapped[int | None]
    """Seconds of work after which it is stopped and failed."""
    has_working_files: Mapped[bool] = mapped_column(default=False)
    """Whether working files of it may be on disk."""
    created: Mapped[datetime]
    modified: Mapped[datetime]
    since: Mapped[datetime] = synonym("modified")
    """A job that waits is changed by nothing but what ends its waiting."""
    started: Mapped[datetime | None]
    """When the first worker began."""
    ended: Mapped[datetime | None]

    def setting(self, name: str) -> Any:
        """A field of the recipe, such as ``training.epochs``: as it was chosen, else as given."""
        group, field = name.split(".")
        given = (self.recipe.get(group) or {}).get(field)
        return self.details.get("chosen", {}).get(name, given)

    @property
    def suffix(self) -> str | None:
        """Suffix that a client of the OpenAI API gave the job, to tell its jobs apart."""
        return self.request.get("suffix") if self.face == "openai" else None

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`luthier.server.tables.queue.TakesTurns.is_unfinished`."""
        return cls.state.not_in(ENDED)

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """Queued, and its memory is estimated."""
        return cls.state == QUEUED, cls.memory > 0

    def start(self, session: Session, lease: str, worker: Mapping[str, Any]) -> None:
        """Let ``worker`` hold it by ``lease``, and say so in an event."""
        again = " to go on with it" if self.attempts else ""
        moment = now()
        move(
            session,
            self,
            RUNNING,
            f"A worker is started{again}.",
            attempts=self.attempts + 1,
            lease=lease,
            lease_ends=moment + self.lease_time,
            has_working_files=True,
            started=self.started or moment,
            worker=dict(worker),
        )

    def give_back(self, session: Session, message: str) -> None:
        """Back after a checkpoint: to the queue, or to where people wanted it meanwhile."""
        nobody: dict[str, Any] = {"lease": None, "lease_ends": None, "worker": None}
        token = self.lease
        if self.state == STOPPING:
            move(session, self, STOPPED, "The job was stopped.", holder=token)
        elif self.state == RUNNING:
            move(session, self, QUEUED, message, holder=token, **nobody)
        else:
            # Paused, or paused and resumed: only its worker was still there.
            mine = Job.id == self.id, Job.lease == token
            session.execute(update(Job).where(*mine).values(**nobody))
            session.refresh(self)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Take the job from a worker that died; another worker resumes it.

        The job fails after :data:`MOST_CRASHES` deaths without a step between them.
        """
        if self.state != RUNNING:
            self.give_back(session, why)
            return f"it is {self.state}"
        step = self.details["progress"]["step"] if "progress" in self.details else 0
        self.crashes = 1 if step > self.details.get("crashed_at", -1) else self.crashes + 1
        self.details = {**self.details, "crashed_at": step}
        session.flush()
        if self.crashes < MOST_CRASHES:
            text = f"{why}; the job goes on from its last checkpoint. {cause}".rstrip()
            record(session, self.id, "warning", text)
            self.give_back(session, "The job is queued again.")
            return f"it is {self.state}"
        failure = f"{self.crashes} workers died one after the other at step {step}: {why}. {cause}"
        failure = failure.rstrip()
        move(session, self, FAILED, failure, holder=self.lease, failure=failure)
        return f"it is {self.state}"


def run_name(job_id: str) -> str:
    """Name of the run and of the model of a job: no tenant's names ever meet in the store."""
    return f"{JOB_PREFIX}{job_id}"


def job_of_run(name: str) -> str:
    """Id of the job that has the run of this name; where none has, the name."""
    return name.removeprefix(JOB_PREFIX)


class JobEvent(Base):
    """Something that happened to a job; events are only ever added."""

    __tablename__ = "job_events"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[datetime]
    kind: Mapped[str]
    """``state``, ``message``, ``warning``, ``error`` or ``metrics``."""
    message: Mapped[str] = mapped_column(QuotingText)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Of ``metrics``: ``step``, ``train_loss`` or ``valid_loss``, and what else the run recorded."""


def move(
    session: Session,
    job: Job,
    target: str,
    message: str,
    *,
    holder: str | None = None,
    **changes: Any,
) -> Job:
    """Bring ``job`` to the state ``target``, with an event that says why; other columns with it.

    ``holder`` is the lease of the worker that writes. A job that failed or was stopped gives the name
    of its model back.

    Raises:
        WrongState: where ``TRANSITIONS`` has no such way, or somebody else moved it meanwhile.
        LeaseLost: where another worker holds it now.
    """
    if target not in TRANSITIONS[job.state]:
        raise WrongState(f"job {job.name} is {job.state}, which does not lead to {target}")
    values = {"state": target, "modified": now(), **changes}
    if target in ENDED:
        values |= {"ended": values["modified"], "lease": None, "lease_ends": None, "worker": None}
    conditions = [Job.id == job.id, Job.state == job.state]
    if holder is not None:
        conditions.append(Job.lease == holder)
    statement = update(Job).where(*conditions).values(**values).returning(Job.seq)
    if session.execute(statement).first() is None:
        if holder is not None:
            raise LeaseLost(f"job {job.name} is held by another worker")
        raise WrongState(f"job {job.name} is no longer {job.state}")
    if target in (FAILED, STOPPED):
        freed = CustomModel.job_id == job.id, CustomModel.status == RESERVED
        session.execute(delete(CustomModel).where(*freed))
    record(session, job.id, "error" if target == FAILED else "state", message, state=target)
    session.refresh(job)
    return job


def record(session: Session, job_id: str, kind: str, message: str, **data: Any) -> None:
    """Add an event."""
    session.add(JobEvent(job_id=job_id, at=now(), kind=kind, message=message, data=data))
    session.flush()


def add_events(session: Session, events: Sequence[Mapping[str, Any]]) -> None:
    """Add events by their columns."""
    if events:
        session.execute(insert(JobEvent), events)


def get(session: Session, account: str, identifier: str, *, lock: bool = False) -> Job | None:
    """The account's job of this id or name; ``lock`` keeps it as it is until the transaction ends."""
    found = select(Job).where(Job.account == account)
    found = found.where((Job.id == identifier) | (Job.name == identifier))
    # A name may look like another job's id: ids come first.
    found = found.order_by((Job.id == identifier).desc()).limit(1)
    return find_row(session, found, lock=lock)


def stop(session: Session, job: Job) -> Job:
    """End a job without a model: at once, or as soon as its worker has let go of it.

    ``job`` was read with ``lock``. One that is stopping or stopped stays as it is.

    Raises:
        WrongState: where it is completed or failed.
    """
    if job.state in (STOPPING, STOPPED):
        return job
    if job.state in ENDED:
        raise WrongState(f"job {job.name} is {job.state} and cannot be stopped")
    if job.lease is not None:
        return move(session, job, STOPPING, "The job is being stopped.")
    return move(session, job, STOPPED, "The job was stopped.")


def pause(session: Session, job: Job) -> Job:
    """Keep a job from being worked on; its worker makes a checkpoint and lets go of it.

    Raises:
        WrongState: where it is being stopped, or has ended.
    """
    if job.state == PAUSED:
        return job
    if job.state not in (QUEUED, RUNNING):
        raise WrongState(f"job {job.name} is {job.state} and cannot be paused")
    return move(session, job, PAUSED, "The job was paused.")


def resume(session: Session, job: Job) -> Job:
    """Queue a paused job again; it goes on from its last checkpoint.

    Raises:
        WrongState: where it is being stopped, or has ended.
    """
    if job.state in (QUEUED, RUNNING):
        return job
    if job.state != PAUSED:
        raise WrongState(f"job {job.name} is {job.state} and cannot be resumed")
    return move(session, job, QUEUED, "The job was resumed.")


def renew(
    session: Session,
    job_id: str,
    lease: str,
    *,
    worked: float | None = None,
    worker: Mapping[str, Any] | None = None,
    **details: Unpack[JobDetails],
) -> Job:
    """Hear from the worker: the lease is longer, ``details`` are noted. The job, for its state.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    job = renew_lease(session, Job, job_id, lease)
    if worked is not None:
        seconds = max(0.0, worked - job.worked)
        used = Usage(training_seconds=seconds)
        add_usage(session, {(now().date(), job.account, ""): used})
        job.worked = worked
    if worker is not None:
        job.worker = dict(worker)
    if details:
        job.details = {**job.details, **details}
        job.modified = now()
    session.flush()
    return job


def complete(
    session: Session,
    job_id: str,
    lease: str,
    result: JobResult,
    stored_bytes: int = 0,
    defaults: AccountQuotas | None = None,
    withheld: str | None = None,
) -> Job:
    """End a job whose model is stored and verified: in one transaction the model is there, too.

    A model that is ``withheld`` has failed for that reason, as it cannot be used; its files are kept.

    It takes ``stored_bytes`` of the account's quota, which is that of ``defaults`` where it has none
    of its own.

    Raises:
        QuotaExceeded: where the account has no room for it.
        LeaseLost: where ``lease`` does not hold it.
        WrongState: where it was stopped or paused meanwhile.
    """
    job = hold(session, Job, job_id, lease)
    move(session, job, COMPLETED, "The job is completed.", holder=lease, result=result)
    made = update(CustomModel).where(CustomModel.job_id == job_id, CustomModel.status == RESERVED)
    state = (
        {"status": custom_models.FAILED, "failure": withheld} if withheld else {"status": ACTIVE}
    )
    stored = {**state, "stored_id": result["stored_id"], "created": job.ended}
    session.execute(made.values(**stored, stored_bytes=stored_bytes))
    quotas = quotas_of(session, job.account, defaults or AccountQuotas())
    storage.charge(session, job.account, quotas, stored_bytes=stored_bytes)
    return job


def fail(session: Session, job_id: str, lease: str, failure: str) -> Job:
    """End a job that cannot be done; one that was being stopped is stopped.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    job = hold(session, Job, job_id, lease)
    if job.state == STOPPING:
        return move(session, job, STOPPED, "The job was stopped.", holder=lease)
    return move(session, job, FAILED, failure, holder=lease, failure=failure)


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list holds; everything that is said has to hold."""

    states: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Values that ``request["metadata"]`` has."""

    def conditions(self) -> list[Any]:
        """The same for a query."""
        wanted: list[Any] = []
        if self.states:
            wanted.append(Job.state.in_(self.states))
        for key, value in self.metadata.items():
            wanted.append(Job.request["metadata"][key].as_string() == value)
        return wanted


def list_jobs(
    session: Session,
    account: str,
    wanted: JobFilter,
    *,
    limit: int,
    position: int | None = None,
) -> list[Job]:
    """At most ``limit`` jobs, the newest first, those before the one whose ``seq`` is ``position``."""
    query = select(Job).where(Job.account == account, *wanted.conditions())
    return page_of(session, query, Job.seq, limit=limit, position=position)


def events(
    session: Session,
    job: Job,
    *,
    kinds: Sequence[str] = (),
    limit: int,
    position: int | None = None,
    ascending: bool = False,
) -> list[JobEvent]:
    """At most ``limit`` events of a job, those that follow the one whose ``seq`` is ``position``."""
    query = select(JobEvent).where(JobEvent.job_id == job.id)
    if kinds:
        query = query.where(JobEvent.kind.in_(kinds))
    return page_of(
        session, query, JobEvent.seq, limit=limit, position=position, ascending=ascending
    )
