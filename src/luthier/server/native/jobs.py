"""Jobs of the native face: a whole recipe goes in, progress comes out as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Literal

from pydantic import Field
from sqlalchemy.orm import Session

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.escaping import map_code
from luthier.graders import parse_graders
from luthier.server.http.messages import Fault, Request, Response, parse_digits
from luthier.server.jobs.deletion import delete_job
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.submit import Submission, check_client_grader, submit
from luthier.server.native.operations import (
    Context,
    Input,
    NativeOperation,
    View,
    not_found,
    setting_name,
)
from luthier.server.tables import jobs as queue
from luthier.server.tables.custom_models import LONGEST_NAME, NAME
from luthier.server.tables.jobs import ENDED, Job

_NAME = r"[a-zA-Z0-9](-*[a-zA-Z0-9+\-.])*"
State = Literal["Queued", "Running", "Paused", "Stopping", "Completed", "Failed", "Stopped"]
"""Where a job may stand: the states of :data:`luthier.server.tables.jobs.TRANSITIONS`."""
CustomizationType = Literal[
    "FINE_TUNING", "CONTINUED_PRE_TRAINING", "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
]
QUIET_SECONDS = 15.0
"""After so long without an event a comment is sent, so that nothing between closes the stream."""


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


def operations(context: Context) -> list[NativeOperation]:
    """Everything about jobs."""
    jobs = _Jobs(context)
    one = "/api/v1/jobs/{job}"
    acts = {"stop": queue.stop, "pause": queue.pause, "resume": queue.resume}
    changes = [
        NativeOperation(
            f"{name}Job", "POST", f"{one}/{name}", jobs.transition_handler(name, act),
            f"{name.capitalize()} a job; one that has ended is a conflict.", JobView,
        )
        for name, act in acts.items()
    ]  # fmt: skip
    return [
        NativeOperation(
            "createJob", "POST", "/api/v1/jobs", jobs.create, "Put a job into the queue.", JobView,
            body=NewJob, status=201,
        ),
        NativeOperation(
            "listJobs", "GET", "/api/v1/jobs", jobs.list_jobs, "Jobs, the newest first.", JobsView,
            query=JobsPage,
        ),
        NativeOperation("getJob", "GET", one, jobs.get, "One job by its name or id.", JobView),
        NativeOperation(
            "deleteJob", "DELETE", one, jobs.delete,
            "Delete a job that has ended and whose model is deleted, with its events and files.",
            DeletedJobView,
        ),
        *changes,
        NativeOperation(
            "listLabelIssues", "GET", f"{one}/label-issues", jobs.label_issues,
            "Rows whose label is worth a look.", LabelIssuesView, query=LabelIssuesPage,
        ),
        NativeOperation(
            "jobEvents", "GET", f"{one}/events", jobs.events,
            "What happens to a job, as server-sent events: states, messages, metrics of each step.",
            query=Since, media="text/event-stream",
        ),
    ]  # fmt: skip


class _Jobs:
    def __init__(self, context: Context) -> None:
        self.context = context

    def create(self, request: Request, body: NewJob) -> JobView:
        context = self.context
        context.record(request, "CreateJob", "model-customization-job/*")
        for address in (*body.training, *body.validation):
            context.locations.check(request.account, address)
        if body.output is not None:
            context.locations.check_writable(request.account, body.output)
        grader = check_client_grader(body.grader) if body.grader else None
        if grader is not None:
            parse_graders({"grader": grader})  # its patterns and schemas, outside of a transaction
        with context.database.write() as session:
            job = submit(
                session,
                Submission(
                    account=request.account,
                    face="native",
                    job_name=body.name,
                    model_name=body.model_name,
                    customization_type=body.customization_type,
                    base=context.base(session, request.account, body.base),
                    training=body.training,
                    validators=body.validation,
                    settings=body.settings,
                    teacher=context.base(session, request.account, body.teacher)
                    if body.teacher
                    else None,
                    grader=grader,
                    output=body.output,
                    request=body.model_dump(mode="json", exclude_unset=True),
                    priority=body.priority,
                    time_limit=body.time_limit_seconds,
                ),
                context.arns,
                context.quotas(request.account),
            )
            view = _view(job)
        context.wake()
        return view

    def list_jobs(self, request: Request, page: JobsPage) -> JobsView:
        self.context.record(request, "ListJobs", "*")
        wanted = queue.JobFilter(states=(page.state,) if page.state else ())
        with self.context.database.read() as session:
            found = queue.list_jobs(
                session, request.account, wanted, limit=page.limit + 1, position=page.position
            )
        following = found[page.limit - 1].seq if len(found) > page.limit else None
        return JobsView(jobs=[_view(job) for job in found[: page.limit]], next=following)

    def get(self, request: Request) -> JobView:
        job = self._job(request, "GetJob")
        return _view(job, JobFolders(job.id).log_tail())

    def delete(self, request: Request) -> DeletedJobView:
        job = self._job(request, "DeleteJob")
        delete_job(self.context.database, self.context.arns, job)
        return DeletedJobView(job=job.id)

    def label_issues(self, request: Request, page: LabelIssuesPage) -> LabelIssuesView:
        job = self._job(request, "ListLabelIssues")
        result = job.result
        records = [] if result is None else run_of(result["stored_id"]).read_label_issues()
        if result is not None and not records and result.get("label_issues", {}).get("issues"):
            raise Fault(
                "Conflict",
                f"The label issues of the job {job.name} are on the machine that trained it. Read "
                f"{LABEL_ISSUES} below the `output` of the job, or ask the server on that machine.",
            )
        end = page.position + page.limit
        return LabelIssuesView(
            issues=[LabelIssueView(**each) for each in records[page.position : end]],
            total=len(records),
            next=end if end < len(records) else None,
        )

    def transition_handler(
        self, name: str, act: Callable[[Session, Job], Job]
    ) -> Callable[[Request], JobView]:
        """The handler that does ``act`` to a job."""

        def run(request: Request) -> JobView:
            with self.context.database.write() as session:
                job = queue.get(session, request.account, request.params["job"], lock=True)
                job = self._existing(request, f"{name.capitalize()}Job", job)
                view = _view(act(session, job))
            self.context.wake()
            return view

        return run

    def events(self, request: Request, since: Since) -> Response:
        job = self._job(request, "GetJob")
        # A number beyond what databases hold is nobody's event.
        known = parse_digits(request.headers.get("last-event-id", ""))
        after = since.after if known is None else known
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        return Response(200, self._stream(job, min(after, 2**62), since.follow), headers)

    def _stream(self, job: Job, after: int, follow: bool) -> Iterator[bytes]:
        quiet = time.monotonic()
        while True:
            with self.context.database.read() as session:
                # The state is read first: events of the end are never missed.
                state = session.get_one(Job, job.seq).state
                found = queue.events(session, job, limit=500, position=after, ascending=True)
            for event in found:
                after, quiet = event.seq, time.monotonic()
                message = map_code(event.message, setting_name)
                entry = {"at": event.at.isoformat(), "message": message, **event.data}
                line = json.dumps(entry, ensure_ascii=False)
                yield f"id: {event.seq}\nevent: {event.kind}\ndata: {line}\n\n".encode()
            if not found and (state in ENDED or not follow):
                return
            if not found:
                if time.monotonic() - quiet > QUIET_SECONDS:
                    quiet = time.monotonic()
                    yield b": still here\n\n"
                # Nothing yet: the application asks again, and no thread waits.
                yield b""

    def _job(self, request: Request, action: str) -> Job:
        with self.context.database.read() as session:
            job = queue.get(session, request.account, request.params["job"])
        return self._existing(request, action, job)

    def _existing(self, request: Request, action: str, job: Job | None) -> Job:
        """Return the job that the path names, and record its ARN for the audit log."""
        path = f"{job.foundation}/{job.id}" if job else request.params["job"]
        self.context.record(request, action, f"model-customization-job/{path}")
        if job is None:
            raise not_found("job", request.params["job"])
        return job


def _view(job: Job, log: list[str] | None = None) -> JobView:
    own = JobView.model_fields.keys() - {"base", "log"}
    fields = {name: getattr(job, name) for name in own}
    if job.failure is not None:
        fields["failure"] = map_code(job.failure, setting_name)
    return JobView(**fields, base=job.base_model, log=log)
