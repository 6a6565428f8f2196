"""Jobs of the native API: create, read, stop and delete jobs, and stream their events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.escaping import map_code
from luthier.graders import parse_graders
from luthier.server.http.messages import Fault, parse_digits
from luthier.server.http.routes import STREAM_TURN, Name
from luthier.server.jobs import deletion
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.submit import Submission, check_client_grader, submit
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    View,
    native_router,
    not_found,
    setting_name,
)
from luthier.server.tables import jobs as queue
from luthier.server.tables.custom_models import LONGEST_NAME, NAME
from luthier.server.tables.jobs import ENDED, Job, JobEvent

router = native_router()
_NAME = r"[a-zA-Z0-9](-*[a-zA-Z0-9+\-.])*"
POLL_SECONDS = 0.5
"""Interval between two looks for new events of a job, in seconds."""
State = Literal["Queued", "Running", "Paused", "Stopping", "Completed", "Failed", "Stopped"]
"""Where a job may stand: the states of :data:`luthier.server.tables.jobs.TRANSITIONS`."""
CustomizationType = Literal[
    "FINE_TUNING", "CONTINUED_PRE_TRAINING", "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
]


class NewJob(Input):
    """What is to be trained, from what, and how."""

    name: str = Field(min_length=1, max_length=63, pattern=f"^{_NAME}$")
    """Of the job; no other of the account has it, ended or not."""
    model_name: str = Field(min_length=1, max_length=LONGEST_NAME, pattern=f"^{NAME}$")
    """Of the custom model."""
    base: str = Field(min_length=1, max_length=2048)
    """A foundation model's id or alias, or a custom model's name or ARN."""
    training: tuple[str, ...] = Field(min_length=1, max_length=100)
    """Addresses of rows: ``s3://bucket/key``, a key that ends in ``/`` for all below it."""
    validation: tuple[str, ...] = Field(default=(), max_length=10)
    """Addresses of rows to measure on."""
    customization_type: CustomizationType = "FINE_TUNING"
    """What is made of the rows; fine-tuning goes by their shape."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Fields of a recipe by group: ``{"training": {"epochs": 2}, "adaptation": {"rank": 8}}``."""
    teacher: str | None = None
    """Of a distillation: named as ``base`` is."""
    grader: dict[str, Any] | None = None
    """Of reinforcement fine-tuning: ``method`` and fields of a grader."""
    output: str | None = None
    """Address below which metrics and certificate are written."""
    priority: int = Field(default=0, ge=-100, le=0)
    """Lower is started later than the jobs of others."""
    time_limit_seconds: int | None = Field(default=None, ge=1, le=10**8)
    """Seconds of work after which it is failed."""


class JobView(View):
    """Where a job stands."""

    id: str
    name: str
    model_name: str
    state: State
    face: str
    customization_type: str
    base: str
    """ARN of what it starts from."""
    created: datetime
    modified: datetime
    started: datetime | None = None
    ended: datetime | None = None
    failure: str | None = None
    priority: int
    attempts: int
    """Workers that were started for it."""
    recipe: dict[str, Any]
    details: dict[str, Any]
    """Progress, settings that were chosen and why, times of its parts."""
    result: dict[str, Any] | None = None
    suffix: str | None = None
    """Suffix of a job of the OpenAI API."""
    log: list[str] | None = None
    """Last lines of the log of its workers on this server; only where one job is read."""


class JobsView(View):
    """Jobs, the newest first."""

    jobs: list[JobView]
    next: int | None = None
    """``position`` of the next page; none at the end."""


class JobsPage(Input):
    """Which jobs are wanted."""

    state: State | None = None
    limit: int = Field(default=100, ge=1, le=1000)
    position: int | None = Field(default=None, ge=0, le=2**62)
    """``next`` of the page before."""


class LabelIssueView(View):
    """A row whose label is worth a look."""

    file: str
    """Address of the file."""
    line: int
    label: str
    likely_label: str
    """Label of similar rows."""
    probability: float
    """Probability of ``likely_label``, from 0 to 1."""
    text: str
    """Beginning of the row, with personal data masked."""


class DeletedJobView(View):
    """A job that was deleted."""

    job: str
    """Id of the job."""


class LabelIssuesView(View):
    """Rows whose label is worth a look, the largest difference first."""

    issues: list[LabelIssueView]
    total: int
    next: int | None = None
    """``position`` of the next page; none at the end."""


class LabelIssuesPage(Input):
    """The wanted page of label issues."""

    limit: int = Field(default=100, ge=1, le=1000)
    position: int = Field(default=0, ge=0, le=2**62)
    """``next`` of the previous page."""


class Since(Input):
    """Which events are wanted."""

    after: int = Field(default=0, ge=0, le=2**62)
    """``id`` of the last event that is known."""
    follow: bool = True
    """Stay until the job has ended; else only what is there now."""


@router.post("/jobs", status_code=201)
def create_job(call: NativeCall, body: NewJob) -> JobView:
    """Put a job into the queue."""
    context = call.context
    call.record("model-customization-job/*")
    for address in (*body.training, *body.validation):
        context.locations.check(call.account, address)
    if body.output is not None:
        context.locations.check_writable(call.account, body.output)
    grader = check_client_grader(body.grader) if body.grader else None
    if grader is not None:
        parse_graders({"grader": grader})  # its patterns and schemas, outside of a transaction
    with context.database.write() as session:
        job = submit(
            session,
            Submission(
                account=call.account,
                face="native",
                job_name=body.name,
                model_name=body.model_name,
                customization_type=body.customization_type,
                base=context.base(session, call.account, body.base),
                training=body.training,
                validators=body.validation,
                settings=body.settings,
                teacher=context.base(session, call.account, body.teacher) if body.teacher else None,
                grader=grader,
                output=body.output,
                request=body.model_dump(mode="json", exclude_unset=True),
                priority=body.priority,
                time_limit=body.time_limit_seconds,
            ),
            context.arns,
            context.quotas(call.account),
        )
        view = _view(job)
    context.wake()
    return view


@router.get("/jobs")
def list_jobs(call: NativeCall, page: Annotated[JobsPage, Query()]) -> JobsView:
    """List jobs, the newest first."""
    states = (page.state,) if page.state else ()
    with call.context.database.read() as session:
        found = queue.list_jobs(
            session, call.account, states=states, limit=page.limit + 1, position=page.position
        )
    following = found[page.limit - 1].seq if len(found) > page.limit else None
    return JobsView(jobs=[_view(job) for job in found[: page.limit]], next=following)


@router.get("/jobs/{job}")
def get_job(call: NativeCall, job: Name) -> JobView:
    """Return a job by its name or id."""
    found = _find(call, job)
    return _view(found, JobFolders(found.id).log_tail())


@router.delete("/jobs/{job}")
def delete_job(call: NativeCall, job: Name) -> DeletedJobView:
    """Delete a job that has ended and whose model is deleted, with its events and files."""
    found = _find(call, job)
    deletion.delete_job(call.context.database, call.context.arns, found)
    return DeletedJobView(job=found.id)


@router.post("/jobs/{job}/stop")
def stop_job(call: NativeCall, job: Name) -> JobView:
    """Stop a job; a job that has ended is a conflict."""
    return _change(call, job, queue.stop)


@router.post("/jobs/{job}/pause")
def pause_job(call: NativeCall, job: Name) -> JobView:
    """Pause a job; a job that has ended is a conflict."""
    return _change(call, job, queue.pause)


@router.post("/jobs/{job}/resume")
def resume_job(call: NativeCall, job: Name) -> JobView:
    """Resume a job; a job that has ended is a conflict."""
    return _change(call, job, queue.resume)


@router.get("/jobs/{job}/label-issues")
def list_label_issues(
    call: NativeCall, job: Name, page: Annotated[LabelIssuesPage, Query()]
) -> LabelIssuesView:
    """List rows whose label is worth a look."""
    found = _find(call, job)
    result = found.result
    records = [] if result is None else run_of(result["stored_id"]).read_label_issues()
    if result is not None and not records and result.get("label_issues", {}).get("issues"):
        raise Fault(
            "Conflict",
            f"The label issues of the job {found.name} are on the machine that trained it. Read "
            f"{LABEL_ISSUES} below the `output` of the job, or ask the server on that machine.",
        )
    end = page.position + page.limit
    return LabelIssuesView(
        issues=[LabelIssueView(**each) for each in records[page.position : end]],
        total=len(records),
        next=end if end < len(records) else None,
    )


def _read_job(call: NativeCall, job: Name) -> Job:
    return _find(call, job)


@router.get("/jobs/{job}/events", response_class=EventSourceResponse, dependencies=[STREAM_TURN])
async def job_events(
    call: NativeCall,
    job: Annotated[Job, Depends(_read_job)],
    since: Annotated[Since, Query()],
    last_event_id: Annotated[str, Header()] = "",
) -> AsyncIterator[ServerSentEvent]:
    """Stream states, messages and metrics of each step as server-sent events."""
    known = parse_digits(last_event_id)
    # Databases hold no larger number.
    after = min(since.after if known is None else known, 2**62)
    while True:
        state, found = await run_in_threadpool(_events, call, job, after)
        for event in found:
            after = event.seq
            message = map_code(event.message, setting_name)
            entry = {"at": event.at.isoformat(), "message": message, **event.data}
            yield ServerSentEvent(data=entry, event=event.kind, id=str(event.seq))
        if not found:
            if state in ENDED or not since.follow:
                return
            await asyncio.sleep(POLL_SECONDS)


def _events(call: Call, job: Job, after: int) -> tuple[str, Sequence[JobEvent]]:
    """Return the state of ``job`` and its events behind ``after``."""
    with call.context.database.read() as session:
        # The state is read first: events of the end are never missed.
        state = session.get_one(Job, job.seq).state
        return state, queue.events(session, job, limit=500, position=after, ascending=True)


def _change(call: Call, name: str, act: Callable[[Session, Job], Job]) -> JobView:
    with call.context.database.write() as session:
        job = queue.get(session, call.account, name, lock=True)
        view = _view(act(session, _existing(call, name, job)))
    call.context.wake()
    return view


def _find(call: Call, name: str) -> Job:
    with call.context.database.read() as session:
        job = queue.get(session, call.account, name)
    return _existing(call, name, job)


def _existing(call: Call, name: str, job: Job | None) -> Job:
    """Return the job of this name, and record its ARN for the audit log."""
    path = f"{job.foundation}/{job.id}" if job else name
    call.record(f"model-customization-job/{path}")
    if job is None:
        raise not_found("job", name)
    return job


def _view(job: Job, log: list[str] | None = None) -> JobView:
    own = JobView.model_fields.keys() - {"base", "log"}
    fields = {name: getattr(job, name) for name in own}
    if job.failure is not None:
        fields["failure"] = map_code(job.failure, setting_name)
    return JobView(**fields, base=job.base_model, log=log)
