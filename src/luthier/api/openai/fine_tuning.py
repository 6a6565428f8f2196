"""``/fine_tuning/jobs``: each is a customization job whose name is its id here."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.api.openai import progress
from luthier.api.openai.asking import Asker
from luthier.api.openai.errors import absent, invalid
from luthier.api.openai.fine_tuning_jobs import organization, shown
from luthier.api.openai.graders import grader_fields
from luthier.api.openai.methods import CreateJob, settings_of, without_effect
from luthier.api.openai.requests import body, number_of, page, text_of
from luthier.api.openai.routing import Operation
from luthier.api.wire import Answer, Call
from luthier.errors import WrongState
from luthier.jobs.submit import FINE_TUNING, REINFORCEMENT, Submission, submit
from luthier.limits import AccountQuotas
from luthier.store import jobs
from luthier.store.arns import Arns
from luthier.store.custom_models import CustomModel
from luthier.store.database import Database, new_id
from luthier.store.foundation import FoundationModel, root_of, writes
from luthier.store.ids import random_id
from luthier.store.jobs import Job
from luthier.store.uploaded_files import UploadedFiles, file_address

FACE = "openai"
MOST = 100
_EVERYTHING = 1_000_000


@dataclass(frozen=True)
class Seen:
    """A job with what belongs to it."""

    job: Job
    model: CustomModel | None
    results: Sequence[str]


class FineTuning:
    """The resource."""

    def __init__(
        self,
        database: Database,
        files: UploadedFiles,
        asker: Asker,
        arns: Arns,
        limits: Callable[[str], AccountQuotas],
        submitted: Callable[[], None] = lambda: None,
    ) -> None:
        """``submitted`` is called after a job was put into the queue."""
        self.database, self.files, self.asker = database, files, asker
        self.catalogue, self.access = asker.catalogue, asker.access
        self.arns, self.limits = arns, limits
        self._submitted = submitted

    def operations(self) -> Iterable[Operation]:
        """What can be done with jobs."""
        root, one = "fine_tuning/jobs", "fine_tuning/jobs/{job}"
        name = "fine_tuning.jobs"
        return (
            Operation("POST", root, f"{name}.create", self.create),
            Operation("GET", root, f"{name}.list", self.list),
            Operation("GET", one, f"{name}.retrieve", self.retrieve),
            Operation("POST", f"{one}/cancel", f"{name}.cancel", self.cancel),
            Operation("POST", f"{one}/pause", f"{name}.pause", self.pause),
            Operation("POST", f"{one}/resume", f"{name}.resume", self.resume),
            Operation("GET", f"{one}/events", f"{name}.list_events", self.events),
            Operation("GET", f"{one}/checkpoints", f"{name}.list_checkpoints", self.checkpoints),
        )

    def create(self, call: Call) -> Answer:
        """Put a job into the queue."""
        asked = body(call, CreateJob)
        self.access.to(call, "fine_tuning.jobs.create", "fine-tuning-job")
        every = self.arns.of(call.caller.account, "model-customization-job", "*")
        self.access.same_as(call, "CreateModelCustomizationJob", every)
        asked.check()
        account = call.caller.account
        base = self.catalogue.base(account, asked.model)
        self._check_file(account, asked.training_file, "training_file")
        if asked.validation_file is not None:
            self._check_file(account, asked.validation_file, "validation_file")
        grader = None
        if asked.method is not None and asked.method.reinforcement is not None:
            grader = grader_fields(
                asked.method.reinforcement.grader,
                "method.reinforcement.grader",
                self.asker.judge(call.caller),
            )
        seed = asked.seed if asked.seed is not None else secrets.randbelow(2**31)
        submission = self._submission(account, asked, base, seed, grader)
        with self.database.write() as session:
            job = submit(session, submission, self.arns, self.limits(account))
            seen = _seen(session, job)
        self._submitted()
        return Answer.of(_shown(seen))

    def _submission(
        self,
        account: str,
        asked: CreateJob,
        base: FoundationModel | CustomModel,
        seed: int,
        grader: dict[str, Any] | None,
    ) -> Submission:
        job_name = "ftjob-" + random_id(24)
        root = root_of(base)
        suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.suffix or "").strip("-")
        name = root.base if root is not None else "imported"
        request = asked.model_dump(mode="json", exclude_none=True)
        return Submission(
            account=account,
            face=FACE,
            job_name=job_name,
            model_name=job_name,
            customization_type=REINFORCEMENT if grader is not None else FINE_TUNING,
            base=base,
            training=[file_address(asked.training_file)],
            validators=[file_address(asked.validation_file)] if asked.validation_file else [],
            settings=settings_of(asked, seed, writes(base)),
            grader=grader,
            request={**request, "seed": seed, "metadata": asked.metadata or {}},
            without_effect=without_effect(asked),
            openai_id=":".join(("ft", name, organization(account), suffix, new_id())),
        )

    def _check_file(self, account: str, file_id: str, parameter: str) -> None:
        found = self.files.get(account, file_id)
        if found is None:
            raise invalid(f"No such file: {file_id}.", parameter, "file_not_found")
        if found.purpose != "fine-tune":
            text = f"File {file_id} was uploaded for '{found.purpose}' and not for 'fine-tune'."
            raise invalid(text, parameter, "invalid_file_purpose")

    def list(self, call: Call) -> Answer:
        """A page of jobs, the newest first."""
        self.access.to(call, "fine_tuning.jobs.list")
        limit, after = number_of(call, "limit", 20, MOST), text_of(call, "after")
        metadata = {
            key[len("metadata[") : -1]: values[-1]
            for key, values in call.query.items()
            if key.startswith("metadata[") and key.endswith("]")
        }
        wanted = jobs.Wanted(face=FACE, metadata=metadata)
        with self.database.read() as session:
            position = None
            if after is not None:
                place = _job(session, call.caller.account, after)
                if place is None:
                    raise invalid(f"No such job: {after}.", "after")
                position = place.seq
            found = jobs.list_jobs(
                session, call.caller.account, wanted, limit=limit + 1, position=position
            )
            seen = [_seen(session, job) for job in found]
        return page([self._with_results(each) for each in seen], limit, _shown)

    def retrieve(self, call: Call) -> Answer:
        """One job."""
        return Answer.of(_shown(self._with_results(self._found(call, "retrieve"))))

    def cancel(self, call: Call) -> Answer:
        """Stop a job: no model is made. It is ``running`` until its worker has let go of it."""
        return self._change(call, "cancel", jobs.stop)

    def pause(self, call: Call) -> Answer:
        """Let a job wait; its worker makes a checkpoint first."""
        return self._change(call, "pause", jobs.pause)

    def resume(self, call: Call) -> Answer:
        """Let a paused job go on."""
        return self._change(call, "resume", jobs.resume)

    def _change(self, call: Call, verb: str, change: Callable[[Session, Job], Job]) -> Answer:
        job_id = call.params["job"]
        self.access.to(call, f"fine_tuning.jobs.{verb}", "fine-tuning-job", job_id)
        with self.database.write() as session:
            job = _job(session, call.caller.account, job_id, lock=True)
            if job is None:
                raise absent("fine-tuning job", job_id, "id")
            if verb != "resume":
                arn = self.arns.job(job.account, job.foundation, job.id)
                self.access.same_as(call, "StopModelCustomizationJob", arn)
            stopping = job.state == jobs.STOPPING
            if job.state in jobs.ENDED or (stopping and verb != "cancel"):
                status = "being cancelled" if stopping else shown(job)["status"]
                text = f"The job {job_id} is {status}; you cannot {verb} it any more."
                raise invalid(text, reason="invalid_state")
            try:
                job = change(session, job)
            except WrongState as refused:
                raise invalid(str(refused), reason="invalid_state") from refused
            return Answer.of(_shown(_seen(session, job)))

    def events(self, call: Call) -> Answer:
        """A page of what happened, the newest first."""
        limit, after = number_of(call, "limit", 20, MOST), text_of(call, "after")
        seen = self._found(call, "list_events")
        position = None
        if after is not None:
            position = progress.position_of(after)
            if position is None:
                raise invalid(f"No such event: {after}.", "after")
        with self.database.read() as session:
            found = jobs.events(session, seen.job, limit=limit + 1, position=position)
        return page(found, limit, progress.shown_event)

    def checkpoints(self, call: Call) -> Answer:
        """A page of the ends of epochs, the newest first; none before there is a model."""
        limit, after = number_of(call, "limit", 10, MOST), text_of(call, "after")
        seen = self._found(call, "list_checkpoints")
        found: Sequence[dict[str, Any]] = ()
        if seen.job.state == jobs.COMPLETED and seen.model is not None:
            name = seen.model.openai_id or seen.model.name
            found = progress.checkpoints(seen.job, self._metrics(seen.job), name)
        if after is not None:
            places = [number for number, each in enumerate(found, 1) if each["id"] == after]
            if not places:
                raise invalid(f"No such checkpoint: {after}.", "after")
            found = found[places[0] :]
        return page(found, limit, dict)

    def _found(self, call: Call, verb: str) -> Seen:
        job_id = call.params["job"]
        self.access.to(call, f"fine_tuning.jobs.{verb}", "fine-tuning-job", job_id)
        with self.database.read() as session:
            job = _job(session, call.caller.account, job_id)
            if job is None:
                raise absent("fine-tuning job", job_id, "id")
            return _seen(session, job)

    def _metrics(self, job: Job) -> Sequence[jobs.JobEvent]:
        with self.database.read() as session:
            return jobs.events(session, job, kinds=("metrics",), limit=_EVERYTHING, ascending=True)

    def _with_results(self, seen: Seen) -> Seen:
        """The same with the file of results, which is written when it is first asked for.

        Its id follows from the job's, so that it is one file however often and by how many it is
        asked for; deleted, it stays so.
        """
        job = seen.job
        if job.state != jobs.COMPLETED:
            return seen
        file_id = f"file-results{job.id}"
        if not self.files.ever(job.account, file_id):
            pieces = progress.result_file(self._metrics(job))
            name = f"{job.name}_results.csv"
            self.files.add(job.account, pieces, name, "fine-tune-results", file_id=file_id)
        there = self.files.get(job.account, file_id)
        return Seen(job, seen.model, [file_id] if there else [])


def _job(session: Session, account: str, job_id: str, *, lock: bool = False) -> Job | None:
    """The job that was created here under this id."""
    found = jobs.get(session, account, job_id, lock=lock)
    return found if found is not None and found.face == FACE and found.name == job_id else None


def _seen(session: Session, job: Job) -> Seen:
    made = select(CustomModel).where(
        CustomModel.account == job.account, CustomModel.job_id == job.id
    )
    return Seen(job, session.scalar(made), [])


def _shown(seen: Seen) -> dict[str, Any]:
    return shown(seen.job, seen.model, seen.results)
