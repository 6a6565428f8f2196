"""Customization jobs: request, state, progress and events.

Only :func:`move` changes the state of a job: one conditional update by :data:`TRANSITIONS`, and one
event. Clients stop, pause and resume jobs. Workers write under a lease
(:mod:`luthier.server.tables.queue`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

from sqlalchemy import ColumnElement, ForeignKey, UniqueConstraint, delete, insert, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column, synonym

from luthier.errors import LeaseLost, WrongState
from luthier.library.folders import JOB_PREFIX
from luthier.limits import AccountQuotas
from luthier.server.tables import custom_models, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.custom_models import ACTIVE, RESERVED, CustomModel
from luthier.server.tables.database import Base, Plain, QuotingText, find_row, now, page_of
from luthier.server.tables.queue import QueuedWork, lock_leased
from luthier.server.tables.queue import renew as renew_lease
from luthier.server.tables.usage import Usage, add_usage

if TYPE_CHECKING:
    from luthier.engine.metrics import ShownReply

QUEUED, RUNNING, PAUSED, STOPPING = "Queued", "Running", "Paused", "Stopping"
COMPLETED, FAILED, STOPPED = "Completed", "Failed", "Stopped"
ENDED = (COMPLETED, FAILED, STOPPED)
"""Final states."""
QUEUED_OR_RUNNING = (QUEUED, RUNNING)
"""States of jobs that count in the turns of accounts."""
TRANSITIONS: Mapping[str, frozenset[str]] = {
    QUEUED: frozenset((RUNNING, PAUSED, STOPPING, STOPPED, FAILED)),
    # Back to Queued if the worker died or released the job at a checkpoint.
    RUNNING: frozenset((QUEUED, PAUSED, STOPPING, COMPLETED, FAILED)),
    PAUSED: frozenset((QUEUED, STOPPING, STOPPED, FAILED)),
    STOPPING: frozenset((STOPPED,)),
    COMPLETED: frozenset(),
    FAILED: frozenset(),
    STOPPED: frozenset(),
}
"""Next states of each state."""


MOST_CRASHES = 3
"""Maximum number of worker deaths at a step before the job fails."""


class JobPart(TypedDict):
    """Progress of one part of the job."""

    status: str
    """Status in Bedrock's words."""
    created: str
    modified: str


class JobProgress(TypedDict):
    """Progress of the training."""

    step: int
    steps: int
    loss: float | None
    estimated_finish: NotRequired[str]
    """Time in ISO 8601, from the second step of a worker."""


class JobRefit(TypedDict):
    """Start of the refit, the second training on all rows."""

    step: int
    """Last step of the first training."""
    rows: int


class Retraining(TypedDict):
    """Plan of a retraining: the model, and rows for the comparison with the model."""

    model: str
    """Name of the model."""
    stored_id: str
    """Library id of the model."""
    deployment: str | None
    """Deployment of the model, if any."""
    base_changed: bool
    fresh: str
    """Address of new rows that neither model was trained on."""
    frozen: str | None
    """Address of old rows that neither model was trained on, if any."""
    rows: dict[str, int]
    """Number of ``old`` and ``new`` training rows, and of ``fresh`` and ``frozen`` rows."""
    new_labels: dict[str, int]
    """Number of new rows by label that the model does not have."""
    rare_labels: dict[str, str]
    """Labels with too few new rows, which are left out, with the reason."""
    estimated_seconds: float | None
    """Duration by the training of the model; None for a different base."""


class JobResult(TypedDict):
    """Result of a completed job."""

    stored_id: str
    steps: int
    tokens: int
    """Trained tokens, over all epochs."""
    train_loss: float
    validation_losses: list[float | None]
    """Loss of each validator in order; null if not finite."""
    verdicts: NotRequired[list[str]]
    """Verdicts of the evaluation, with advice."""
    label_issues: NotRequired[dict[str, int]]
    """Number of suspicious labels (``issues``) and of examined ``rows``."""
    retraining: NotRequired[dict[str, Any]]
    """Comparison with the retrained model: ``verdict``, and figures for ``fresh`` and ``frozen``."""
    examples: NotRequired[list[dict[str, Any]]]
    """Validation rows that were not trained: ``messages`` or ``text``, and the answer ``wanted``."""


class StepReplies(TypedDict):
    """Replies after the measurement of a step."""

    step: int
    replies: list[ShownReply]


class JobDetails(TypedDict, total=False):
    """Details from the worker of a job."""

    sources: list[str]
    """Addresses of the training files."""
    retraining: Retraining
    """For a retraining."""
    chosen: dict[str, Any]
    """Settings chosen by the engine, by name."""
    reasons: dict[str, str]
    """Reasons of the chosen settings, by name."""
    parts: dict[str, JobPart]
    """``validation``, ``data_processing`` and ``training``."""
    progress: JobProgress
    replies: list[StepReplies]
    """Replies to held-out rows during training."""
    refit: JobRefit
    crashed_at: int
    """Step of the last crash."""


class Job(QueuedWork, Base):
    """A customization job, created by :mod:`luthier.server.jobs.submit`."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("account", "name"),)
    noun = "job"
    memory_advice = "choose a smaller batch, shorter rows or a smaller model."

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    """Name of the job, reserved beyond the end."""
    model_name: Mapped[str]
    api: Mapped[str]
    """API of the request: ``bedrock``, ``openai`` or ``native``."""
    customization_type: Mapped[str]
    """``FINE_TUNING``, ``CONTINUED_PRE_TRAINING``, ``DISTILLATION``, ``REINFORCEMENT_FINE_TUNING``."""
    foundation: Mapped[str]
    """``provider.name`` of the foundation model at the bottom of the lineage."""
    base_model: Mapped[str]
    """ARN of the base: the foundation model or a custom model."""
    command: Mapped[str]
    """Kind of the recipe: ``tune`` or ``distil``."""
    recipe: Mapped[dict[str, Any]]
    """Fields of the recipe, with addresses as data."""
    request: Mapped[dict[str, Any]]
    """Request members that the API returns: role, hyperparameters, locations, ..."""
    output: Mapped[str | None]
    """Address of the folder for metrics and certificate."""
    validators: Mapped[list[Any]]

    state: Mapped[str] = mapped_column(default=QUEUED, index=True)
    failure: Mapped[str | None] = mapped_column(QuotingText)
    """Reason of the failure, with file, line and rule for problems of the data."""
    result: Mapped[JobResult | None] = mapped_column(Plain)
    details: Mapped[JobDetails] = mapped_column(Plain, default=dict)
    attempts: Mapped[int] = mapped_column(default=0)
    # Sums of floating-point numbers depend on how many threads share them.
    cores: Mapped[int] = mapped_column(default=1)
    """Number of threads, which determines the bits of the model."""
    worked: Mapped[float] = mapped_column(default=0.0)
    time_limit: Mapped[int | None]
    """Seconds of work after which the job fails."""
    has_working_files: Mapped[bool] = mapped_column(default=False)
    """Whether working files may exist on disk."""
    created: Mapped[datetime]
    modified: Mapped[datetime]
    since: Mapped[datetime] = synonym("modified")
    """Start of the wait of a waiting job."""
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]

    def setting(self, name: str) -> Any:
        """Return a setting such as ``training.epochs``, requested or chosen by the engine."""
        group, field = name.split(".")
        given = (self.recipe.get(group) or {}).get(field)
        return self.details.get("chosen", {}).get(name, given)

    @property
    def suffix(self) -> str | None:
        """Suffix in the request of an OpenAI client."""
        return self.request.get("suffix") if self.api == "openai" else None

    @property
    def estimated_finish(self) -> datetime | None:
        """Estimated end of a running job; None if unknown."""
        moment = (
            self.details["progress"].get("estimated_finish") if "progress" in self.details else None
        )
        return datetime.fromisoformat(moment) if moment and self.state == RUNNING else None

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`luthier.server.tables.queue.TakesTurns.is_unfinished`."""
        return cls.state.not_in(ENDED)

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """Return the conditions of queued jobs with estimated memory."""
        # The scheduler estimates the memory after the request, because the estimate loads torch.
        return cls.state == QUEUED, cls.memory > 0

    def start(self, session: Session, lease: str, worker: Mapping[str, Any]) -> None:
        """Give the lease to ``worker``, with an event."""
        again = " again" if self.attempts else ""
        moment = now()
        move(
            session,
            self,
            RUNNING,
            f"A worker started{again}.",
            attempts=self.attempts + 1,
            lease=lease,
            lease_ends=moment + self.lease_time,
            # In the same statement as the lease: a worker that dies at once may have left files.
            has_working_files=True,
            started=self.started or moment,
            worker=dict(worker),
        )

    def release(self, session: Session, message: str) -> None:
        """Release the job: to the queue, or to the state that a client requested meanwhile."""
        nobody: dict[str, Any] = {"lease": None, "lease_ends": None, "worker": None}
        # Read before `move`, which clears the column.
        token = self.lease
        if self.state == STOPPING:
            move(session, self, STOPPED, "The job was stopped.", holder=token)
        elif self.state == RUNNING:
            move(session, self, QUEUED, message, holder=token, **nobody)
        else:
            # The job was paused, or paused and resumed, while its worker still ran.
            mine = Job.id == self.id, Job.lease == token
            session.execute(update(Job).where(*mine).values(**nobody))
            session.refresh(self)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Expire the lease of a dead worker.

        The job fails after :data:`MOST_CRASHES` deaths without a step between the deaths.
        """
        if self.state != RUNNING:
            self.release(session, why)
            return f"it is {self.state}"
        step = self.details["progress"]["step"] if "progress" in self.details else 0
        # A job that advances between two deaths, such as on a machine that restarts every night,
        # must not fail by their number.
        self.crashes = 1 if step > self.details.get("crashed_at", -1) else self.crashes + 1
        self.details = {**self.details, "crashed_at": step}
        session.flush()
        if self.crashes < MOST_CRASHES:
            text = f"{why}; the job resumes from its last checkpoint. {cause}".rstrip()
            record(session, self.id, "warning", text)
            self.release(session, "The job is queued again.")
            return f"it is {self.state}"
        failure = f"{self.crashes} workers died at step {step}: {why}. {cause}"
        failure = failure.rstrip()
        move(session, self, FAILED, failure, holder=self.lease, failure=failure)
        return f"it is {self.state}"


def run_name(job_id: str) -> str:
    """Return the name of a job's run and model, unique among all accounts."""
    return f"{JOB_PREFIX}{job_id}"


def job_of_run(name: str) -> str:
    """Return the id of the job of a run; the name itself for other runs."""
    return name.removeprefix(JOB_PREFIX)


class JobEvent(Base):
    """An event of a job. Events are only added."""

    __tablename__ = "job_events"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[datetime]
    kind: Mapped[str]
    """``state``, ``message``, ``warning``, ``error`` or ``metrics``."""
    message: Mapped[str] = mapped_column(QuotingText)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Values of a ``metrics`` event: ``step``, ``train_loss`` or ``valid_loss``, and additional
    metrics."""


def move(
    session: Session,
    job: Job,
    target: str,
    message: str,
    *,
    holder: str | None = None,
    **changes: Any,
) -> Job:
    """Change the state of ``job`` to ``target`` and columns by ``changes``, with an event.

    ``holder`` is the lease of a worker. A failed or stopped job releases the name of its model.

    Raises:
        WrongState: if the transition is illegal, or the state changed meanwhile.
        LeaseLost: if the lease ``holder`` has expired.
    """
    if target not in TRANSITIONS[job.state]:
        raise WrongState(f"job {job.name} is {job.state} and cannot become {target}")
    values = {"state": target, "modified": now(), **changes}
    if target in ENDED:
        values |= {"ended": values["modified"], "lease": None, "lease_ends": None, "worker": None}
    # The condition on the state makes the change atomic without a lock: of two processes that read
    # the same state, one changes it.
    conditions = [Job.id == job.id, Job.state == job.state]
    if holder is not None:
        conditions.append(Job.lease == holder)
    statement = update(Job).where(*conditions).values(**values).returning(Job.seq)
    if session.execute(statement).first() is None:
        if holder is not None:
            raise LeaseLost(f"a different worker owns job {job.name}")
        raise WrongState(f"job {job.name} is no longer {job.state}")
    # The user may start a job with the same model name again at once.
    if target in (FAILED, STOPPED):
        freed = CustomModel.job_id == job.id, CustomModel.status == RESERVED
        session.execute(delete(CustomModel).where(*freed))
    record(session, job.id, "error" if target == FAILED else "state", message, state=target)
    session.refresh(job)
    return job


def record(session: Session, job_id: str, kind: str, message: str, **data: Any) -> None:
    """Add an event of a job."""
    session.add(JobEvent(job_id=job_id, at=now(), kind=kind, message=message, data=data))
    session.flush()


def add_events(session: Session, events: Sequence[Mapping[str, Any]]) -> None:
    """Add events by their columns."""
    if events:
        session.execute(insert(JobEvent), events)


def get(session: Session, account: str, identifier: str, *, lock: bool = False) -> Job | None:
    """Return the account's job of this id or name, locked with ``lock``."""
    found = select(Job).where(Job.account == account)
    # APIs accept both, as Bedrock does for `jobIdentifier`.
    found = found.where((Job.id == identifier) | (Job.name == identifier))
    # A job's name may equal a different job's id: ids take precedence.
    found = found.order_by((Job.id == identifier).desc()).limit(1)
    return find_row(session, found, lock=lock)


def job_with_data(session: Session, account: str, address: str) -> Job | None:
    """Return an unfinished job of the account with training or validation data at ``address``."""
    unfinished = select(Job).where(Job.account == account, Job.is_unfinished())
    return next(
        (
            job
            for job in session.scalars(unfinished)
            if address in (*job.details.get("sources", ()), *job.validators)
        ),
        None,
    )


def stop(session: Session, job: Job) -> Job:
    """Stop a job at once, or at the end of its worker. The caller has locked the row.

    Raises:
        WrongState: for a completed or failed job.
    """
    if job.state in (STOPPING, STOPPED):
        return job
    if job.state in ENDED:
        raise WrongState(f"job {job.name} is {job.state} and cannot be stopped")
    if job.lease is not None:
        return move(session, job, STOPPING, "The job is being stopped.")
    return move(session, job, STOPPED, "The job was stopped.")


def pause(session: Session, job: Job) -> Job:
    """Pause a job. Its worker writes a checkpoint and releases the lease.

    Raises:
        WrongState: for a job that is stopping or has ended.
    """
    if job.state == PAUSED:
        return job
    if job.state not in (QUEUED, RUNNING):
        raise WrongState(f"job {job.name} is {job.state} and cannot be paused")
    return move(session, job, PAUSED, "The job was paused.")


def resume(session: Session, job: Job) -> Job:
    """Queue a paused job again, to resume from its last checkpoint.

    Raises:
        WrongState: for a job that is stopping or has ended.
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
    **details: Unpack[JobDetails],
) -> Job:
    """Renew the lease, store ``details`` and the seconds ``worked``, and return the job."""
    job = renew_lease(session, Job, job_id, lease)
    if worked is not None:
        # `worked` is a total, so that a renewal whose reply was lost is not counted twice.
        seconds = max(0.0, worked - job.worked)
        used = Usage(training_seconds=seconds)
        add_usage(session, {(now().date(), job.account, "", ""): used})
        job.worked = worked
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
    """Complete a job with a stored and verified model, and activate the model.

    If ``withheld`` is set, the model fails for this reason and its files stay. ``defaults`` are the
    quotas of accounts without own quotas.

    Raises:
        QuotaExceeded: if the account has no space for ``stored_bytes``.
        LeaseLost: if ``lease`` has expired.
        WrongState: if the job was stopped or paused meanwhile.
    """
    job = lock_leased(session, Job, job_id, lease)
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
    """Fail a job, or stop a stopping job."""
    job = lock_leased(session, Job, job_id, lease)
    # The client asked for the end first; the failure may be a result of it.
    if job.state == STOPPING:
        return move(session, job, STOPPED, "The job was stopped.", holder=lease)
    return move(session, job, FAILED, failure, holder=lease, failure=failure)


def list_jobs(
    session: Session,
    account: str,
    *,
    states: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    limit: int,
    position: int | None = None,
) -> list[Job]:
    """Return at most ``limit`` jobs, the newest first, created before ``position``.

    ``metadata`` selects jobs by the metadata of their requests.
    """
    query = select(Job).where(Job.account == account)
    if states:
        query = query.where(Job.state.in_(states))
    for key, value in (metadata or {}).items():
        query = query.where(Job.request["metadata"][key].as_string() == value)
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
    """Return at most ``limit`` events of a job after ``position``."""
    query = select(JobEvent).where(JobEvent.job_id == job.id)
    if kinds:
        query = query.where(JobEvent.kind.in_(kinds))
    return page_of(
        session, query, JobEvent.seq, limit=limit, position=position, ascending=ascending
    )
