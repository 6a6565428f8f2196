"""Jobs of the native API: create, read, stop and delete jobs, and stream events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.formatting import map_code
from luthier.graders import parse_graders
from luthier.server.http.messages import Fault, parse_digits
from luthier.server.http.routes import STREAM_SLOT, Name
from luthier.server.jobs import deletion
from luthier.server.jobs.data import check_first_rows
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.forecast import QueuePlace
from luthier.server.jobs.submit import Submission, check_client_grader, submit
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    Page,
    View,
    native_router,
    not_found,
    setting_name,
)
from luthier.server.tables import jobs as queue
from luthier.server.tables.custom_models import LONGEST_NAME, NAME
from luthier.server.tables.jobs import ENDED, QUEUED, Job, JobEvent

router = native_router()
_NAME = r"[a-zA-Z0-9](-*[a-zA-Z0-9+\-.])*"
POLL_SECONDS = 0.5
"""Interval between database queries for new events of a job, in seconds."""
State = Literal["Queued", "Running", "Paused", "Stopping", "Completed", "Failed", "Stopped"]
"""State of a job; see :data:`luthier.server.tables.jobs.TRANSITIONS`."""
CustomizationType = Literal[
    "FINE_TUNING", "CONTINUED_PRE_TRAINING", "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
]


class NewJob(Input):
    """Data, base model and settings of a new job."""

    name: str = Field(min_length=1, max_length=63, pattern=f"^{_NAME}$")
    """Name of the job, unique within the account, including ended jobs."""
    model_name: str = Field(min_length=1, max_length=LONGEST_NAME, pattern=f"^{NAME}$")
    """Name of the custom model."""
    base: str = Field(min_length=1, max_length=2048)
    """Base model: id or alias of a foundation model, or name or ARN of a custom model."""
    training: tuple[str, ...] = Field(min_length=1, max_length=100)
    """Addresses of training data: ``s3://bucket/key``, or a key that ends in ``/`` for all objects
    below."""
    validation: tuple[str, ...] = Field(default=(), max_length=10)
    """Addresses of validation data."""
    customization_type: CustomizationType = "FINE_TUNING"
    """Type of customization. For fine-tuning, the objective follows from the shape of the rows."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Recipe fields by group: ``{"training": {"epochs": 2}, "adaptation": {"rank": 8}}``."""
    teacher: str | None = None
    """Teacher of a distillation, named like ``base``."""
    grader: dict[str, Any] | None = None
    """Grader of reinforcement fine-tuning: ``method`` and fields of a grader."""
    output: str | None = None
    """Address for metrics and certificate."""
    priority: int = Field(default=0, ge=-100, le=0)
    """Priority in the queue: jobs with a lower priority start later."""
    time_limit_seconds: int | None = Field(default=None, ge=1, le=10**8)
    """Time limit of the job in seconds. A job over the limit fails."""


class JobView(View):
    """State, settings and result of a job."""

    id: str
    name: str
    model_name: str
    state: State
    api: str
    customization_type: str
    base: str
    """ARN of the base model."""
    created: datetime
    modified: datetime
    started: datetime | None = None
    ended: datetime | None = None
    failure: str | None = None
    priority: int
    queue_position: int | None = None
    """Position among the waiting jobs of the server, from 1; missing for jobs that do not wait."""
    expected_start: datetime | None = None
    """Estimated start of a waiting job, from the ends of running jobs; missing if unknown."""
    attempts: int
    """Number of worker processes started for the job."""
    recipe: dict[str, Any]
    details: dict[str, Any]
    """Progress, chosen settings with reasons, and duration of phases."""
    result: dict[str, Any] | None = None
    suffix: str | None = None
    """Suffix of a job of the OpenAI API."""
    log: list[str] | None = None
    """Last lines of the worker log on this server; missing in lists."""


class JobsView(View):
    """Jobs, newest first."""

    jobs: list[JobView]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class JobsPage(Page):
    """Filter and page of a list of jobs."""

    state: State | None = None


class LabelIssueView(View):
    """A row with a likely wrong label."""

    file: str
    """Address of the file."""
    line: int | None = None
    """Line of the row in a file of lines."""
    row: int | None = None
    """Number of the row, from 1, in any other file."""
    label: str
    likely_label: str
    """Label of similar rows."""
    probability: float
    """Probability of ``likely_label``, from 0 to 1."""
    text: str
    """Beginning of the row, with personal data masked."""


class DeletedJobView(View):
    """Response to the deletion of a job."""

    job: str
    """Id of the job."""


class LabelIssuesView(View):
    """Rows with likely wrong labels, largest difference first."""

    issues: list[LabelIssueView]
    total: int
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class LabelIssuesPage(Input):
    """Page of a list of label issues."""

    limit: int = Field(default=100, ge=1, le=1000)
    position: int = Field(default=0, ge=0, le=2**62)
    """``next`` of the previous page."""


class Since(Input):
    """Start position and mode of an event stream."""

    after: int = Field(default=0, ge=0, le=2**62)
    """``id`` of the last received event."""
    follow: bool = True
    """Keep the stream open until the job ends. Otherwise return the existing events only."""


@router.post("/jobs", status_code=201)
def create_job(call: NativeCall, body: NewJob) -> JobView:
    """Create a job."""
    context = call.context
    call.record("model-customization-job/*")
    if body.output is not None:
        context.locations.check_writable(call.account, body.output)
    grader = check_client_grader(body.grader) if body.grader else None
    if grader is not None:
        parse_graders(
            {"grader": grader}
        )  # compiling patterns and schemas is too slow for a transaction
    base = context.base(call.account, body.base)
    teacher = context.base(call.account, body.teacher) if body.teacher else None
    submission = Submission(
        account=call.account,
        api="native",
        job_name=body.name,
        model_name=body.model_name,
        customization_type=body.customization_type,
        base=base,
        training=body.training,
        validators=body.validation,
        settings=body.settings,
        teacher=teacher,
        grader=grader,
        output=body.output,
        request=body.model_dump(mode="json", exclude_unset=True),
        priority=body.priority,
        time_limit=body.time_limit_seconds,
        hold_out=context.hold_out,
    )
    check_first_rows(context.locations, submission)
    with context.database.write() as session:
        job = submit(session, submission, context.arns, context.quotas(call.account))
        call.record_created(f"model-customization-job/{job.foundation}/{job.id}")
        view = view_job(job)
    context.wake()
    return view


@router.get("/jobs")
def list_jobs(call: NativeCall, page: Annotated[JobsPage, Query()]) -> JobsView:
    """List jobs, newest first."""
    states = (page.state,) if page.state else ()
    with call.context.database.read() as session:
        rows = queue.list_jobs(
            session, call.account, states=states, limit=page.limit + 1, position=page.position
        )
        places = _places(call, session, rows)
    views = [view_job(job, places) for job in rows[: page.limit]]
    return JobsView(jobs=views, next=page.next(rows))


@router.get("/jobs/{job}")
def get_job(call: NativeCall, job: Name) -> JobView:
    """Return a job by name or id."""
    row = _find(call, job)
    with call.context.database.read() as session:
        places = _places(call, session, [row])
    return view_job(row, places, JobFolders(row.id).log_tail())


@router.delete("/jobs/{job}")
def delete_job(call: NativeCall, job: Name) -> DeletedJobView:
    """Delete an ended job with events and files. The trained model must be deleted first."""
    row = _find(call, job)
    deletion.delete_job(call.context.database, call.context.arns, row)
    return DeletedJobView(job=row.id)


@router.post("/jobs/{job}/stop")
def stop_job(call: NativeCall, job: Name) -> JobView:
    """Stop a job. Stopping an ended job is a conflict."""
    return _change(call, job, queue.stop)


@router.post("/jobs/{job}/pause")
def pause_job(call: NativeCall, job: Name) -> JobView:
    """Pause a job. Pausing an ended job is a conflict."""
    return _change(call, job, queue.pause)


@router.post("/jobs/{job}/resume")
def resume_job(call: NativeCall, job: Name) -> JobView:
    """Resume a job. Resuming an ended job is a conflict."""
    return _change(call, job, queue.resume)


@router.get("/jobs/{job}/label-issues")
def list_label_issues(
    call: NativeCall, job: Name, page: Annotated[LabelIssuesPage, Query()]
) -> LabelIssuesView:
    """List rows with likely wrong labels."""
    row = _find(call, job)
    result = row.result
    records = [] if result is None else run_of(result["stored_id"]).read_label_issues()
    if result is not None and not records and result.get("label_issues", {}).get("issues"):
        raise Fault(
            "Conflict",
            f"The label issues of the job {row.name} are on another machine. Read {LABEL_ISSUES} "
            "below the `output` of the job.",
        )
    end = page.position + page.limit
    return LabelIssuesView(
        issues=[LabelIssueView(**each) for each in records[page.position : end]],
        total=len(records),
        next=end if end < len(records) else None,
    )


def _read_job(call: NativeCall, job: Name) -> Job:
    return _find(call, job)


@router.get("/jobs/{job}/events", response_class=EventSourceResponse, dependencies=[STREAM_SLOT])
async def job_events(
    call: NativeCall,
    job: Annotated[Job, Depends(_read_job)],
    since: Annotated[Since, Query()],
    last_event_id: Annotated[str, Header()] = "",
) -> AsyncIterator[ServerSentEvent]:
    """Stream states, messages and metrics of a job as server-sent events."""
    last = parse_digits(last_event_id)
    # The maximum of the query field; databases store 63 bits.
    after = min(since.after if last is None else last, 2**62)
    while True:
        state, events = await run_in_threadpool(_events, call, job, after)
        for event in events:
            after = event.seq
            message = map_code(event.message, setting_name)
            entry = {"at": event.at.isoformat(), "message": message, **event.data}
            yield ServerSentEvent(data=entry, event=event.kind, id=str(event.seq))
        if not events:
            if state in ENDED or not since.follow:
                return
            await asyncio.sleep(POLL_SECONDS)


def _events(call: Call, job: Job, after: int) -> tuple[str, Sequence[JobEvent]]:
    """Return the state of ``job`` and the events after ``after``."""
    with call.context.database.read() as session:
        # Read the state first, so that the last events cannot be missed.
        state = session.get_one(Job, job.seq).state
        return state, queue.events(session, job, limit=500, position=after, ascending=True)


def _change(call: Call, name: str, act: Callable[[Session, Job], Job]) -> JobView:
    with call.context.database.write() as session:
        job = queue.get(session, call.account, name, lock=True)
        view = view_job(act(session, _existing(call, name, job)))
    call.context.wake()
    return view


def _find(call: Call, name: str) -> Job:
    with call.context.database.read() as session:
        job = queue.get(session, call.account, name)
    return _existing(call, name, job)


def _existing(call: Call, name: str, job: Job | None) -> Job:
    """Return the job with this name, and record the job's ARN for the audit log."""
    path = f"{job.foundation}/{job.id}" if job else name
    call.record(f"model-customization-job/{path}")
    if job is None:
        raise not_found("job", name)
    return job


def _places(call: NativeCall, session: Session, rows: Sequence[Job]) -> Mapping[str, QueuePlace]:
    """Return the queue places of the waiting jobs among ``rows``, by id."""
    waits = any(job.state == QUEUED for job in rows)
    return call.context.queue_places(session) if waits else {}


def view_job(
    job: Job, places: Mapping[str, QueuePlace] | None = None, log: list[str] | None = None
) -> JobView:
    """Return a job for a response."""
    fields: dict[str, Any] = {"base": job.base_model, "log": log}
    place = (places or {}).get(job.id)
    fields["queue_position"] = place and place.position
    fields["expected_start"] = place and place.expected_start
    fields |= {name: getattr(job, name) for name in JobView.model_fields.keys() - fields.keys()}
    if job.failure is not None:
        fields["failure"] = map_code(job.failure, setting_name)
    return JobView(**fields)
