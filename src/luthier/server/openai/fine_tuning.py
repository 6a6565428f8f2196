"""``/fine_tuning/jobs``: all customization jobs of the account, including jobs of other APIs.

The id of a job in the OpenAI API is the job's name.
"""

from __future__ import annotations

import csv
import io
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import DataError, DiskFull, QuotaExceeded, ReadOnlyDisk, WrongState
from luthier.formatting import map_code
from luthier.server.http.messages import parse_digits
from luthier.server.http.routes import Name
from luthier.server.jobs.data import check_first_rows
from luthier.server.jobs.submit import FINE_TUNING, REINFORCEMENT, Submission, submit
from luthier.server.openai.graders import grader_fields
from luthier.server.openai.models import id_of
from luthier.server.openai.operations import (
    Call,
    Limit,
    OpenAICall,
    metadata_filter,
    openai_router,
    page,
    row_before,
)
from luthier.server.openai.protocol import (
    JsonObject,
    Metadata,
    StrictBody,
    existing,
    invalid,
    seconds,
)
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables import jobs
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import MIXED, Database, new_id, random_id
from luthier.server.tables.foundation import (
    FoundationModel,
    foundation_model,
    foundation_models,
    root_of,
    writes,
)
from luthier.server.tables.jobs import Job, JobEvent, JobResult

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=100)]
MOST_EPOCHS = 100
ARMS = ("supervised", "dpo", "reinforcement")
STATUSES = {
    jobs.QUEUED: "queued",
    jobs.RUNNING: "running",
    jobs.PAUSED: "paused",
    # Clients poll until the status is final, which must include the end of the worker.
    jobs.STOPPING: "running",
    jobs.STOPPED: "cancelled",
    jobs.COMPLETED: "succeeded",
    jobs.FAILED: "failed",
}
_RULE = re.compile(r"\[[a-z_]+\.[a-z_]+\]")
"""Rule id in an error of the data checks."""
_LEVELS = {"warning": "warn", "error": "error"}
_COLUMNS = ("step", "train_loss", "valid_loss")
API = "openai"
router = openai_router()
_KIND = "fine-tuning-job"
"""Kind of a job in ARNs of the audit log."""
_PAGE = 1000
"""Page size for reading events."""


class Hyperparameters(StrictBody):
    """Hyperparameters of all methods."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = "auto"
    """Number of passes over the training rows."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=512)] = "auto"
    """Rows per optimizer step."""
    learning_rate_multiplier: Auto | Rate = "auto"
    """Factor of the recommended learning rate."""


class DpoHyperparameters(Hyperparameters):
    """Hyperparameters of preference training."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"
    """Strength of the KL penalty: a higher value keeps the model closer to the base model."""


class ReinforcementHyperparameters(Hyperparameters):
    """Hyperparameters of reinforcement training."""

    without_effect = frozenset({"eval_samples", "reasoning_effort"})
    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=16)] = "auto"
    """Factor of the number of completions per prompt."""
    eval_interval: Auto | Count = "auto"
    """Steps between evaluations."""


class Supervised(StrictBody):
    """Settings of supervised training."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(StrictBody):
    """Settings of preference training."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class ReinforcementMethod(StrictBody):
    """Settings of reinforcement training."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class TrainingMethod(StrictBody):
    """Training method and settings."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: ReinforcementMethod | None = None


class CreateJob(StrictBody):
    """Body of a request for a new job."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "integrations": "Jobs have no integrations. The events and the result file contain the metrics"
    }

    model: Annotated[str, Field(min_length=1)]
    training_file: Annotated[str, Field(min_length=1)]
    validation_file: str | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: Metadata = None
    method: TrainingMethod | None = None
    hyperparameters: Hyperparameters | None = None
    """Hyperparameters of a supervised job, in the form that OpenAI used before ``method``."""

    @property
    def kind(self) -> str:
        """Type of the method."""
        return self.method.type if self.method else "supervised"

    @property
    def method_hyperparameters(self) -> Hyperparameters:
        """The hyperparameters of the method."""
        arm = getattr(self.method, self.kind) if self.method else None
        if arm is not None:
            own: Hyperparameters = arm.hyperparameters
            return own
        return self.hyperparameters or Hyperparameters()

    def check(self) -> None:
        """Reject settings of another method, and reinforcement without a grader."""
        if self.method is None:
            return
        for arm in ARMS:
            if arm != self.kind and getattr(self.method, arm) is not None:
                text = f"A job of type '{self.kind}' has no settings '{arm}'."
                raise invalid(text, f"method.{arm}")
        if self.kind == "reinforcement" and self.method.reinforcement is None:
            text = "Reinforcement fine-tuning needs a grader."
            raise invalid(text, "method.reinforcement.grader", "missing_required_parameter")


_NAMES = {
    "base": "model",
    "training.epochs": "n_epochs",
    "training.batch_size": "batch_size",
    "training.learning_rate_multiplier": "learning_rate_multiplier",
    "training.evaluate_every": "eval_interval",
    "training.seed": "seed",
    "objective.beta": "beta",
    "objective.num_generations": "compute_multiplier",
    "objective.grader": "method.reinforcement.grader",
    "data.train": "training_file",
    "data.validation": "validation_file",
}
_COLUMN = r"`data\.columns\.([^`=]+)=([^`]*)`"
_COLUMN_ADVICE = re.compile(rf"(?:\b([Ss]et|as with|with) )?((?:{_COLUMN})(?: and {_COLUMN})*)")
"""Advice to set columns, with the verb or preposition before the settings."""
_METHODS = {FINE_TUNING: "supervised", REINFORCEMENT: "reinforcement"}
"""Types of ``method`` by the customization types of other APIs."""


def setting_name(setting: str) -> str:
    """Return OpenAI's name of a recipe setting, such as ``training.epochs=3``."""
    name, equals, value = setting.partition("=")
    return _NAMES.get(name, name) + equals + value


def with_api_names(text: str) -> str:
    """Return ``text`` with OpenAI's names of settings, and changes of the file for columns.

    The API has no setting for columns.
    """
    return map_code(_COLUMN_ADVICE.sub(_file_change, text), setting_name)


def _file_change(advice: re.Match[str]) -> str:
    """Return advice to rename or remove columns in the file."""
    verb = advice[1] or ""
    columns = re.findall(_COLUMN, advice[2])
    change = "rename" if columns[0][1] else "remove"
    if verb.endswith("with"):
        change = f"by {change[:-1]}ing"
    names = (f'"{column}" to "{key}"' if column else f'"{key}"' for key, column in columns)
    return f"{change.title() if verb == 'Set' else change} {' and '.join(names)}"


def settings_of(parameters: CreateJob, seed: int, writes: bool) -> JsonObject:
    """Return recipe fields by group. ``auto`` hyperparameters are left to the recipe.

    ``writes`` is True for models that generate text. The objective of an encoder follows from the
    rows.
    """
    hyperparameters = parameters.method_hyperparameters
    training: dict[str, Any] = {"seed": seed}
    objective: dict[str, Any] = {}
    if hyperparameters.n_epochs != "auto":
        training["epochs"] = hyperparameters.n_epochs
    if hyperparameters.batch_size != "auto":
        training["batch_size"] = hyperparameters.batch_size
    if hyperparameters.learning_rate_multiplier != "auto":
        training["learning_rate_multiplier"] = hyperparameters.learning_rate_multiplier
    if parameters.kind == "dpo":
        objective["method"] = "dpo"
    # Without a method, raw text would be learned as `causal_lm`: supervised means replies.
    elif parameters.kind == "supervised" and writes:
        objective["method"] = "sft"
    if isinstance(hyperparameters, DpoHyperparameters) and hyperparameters.beta != "auto":
        objective["beta"] = hyperparameters.beta
    if isinstance(hyperparameters, ReinforcementHyperparameters):
        if hyperparameters.eval_interval != "auto":
            training["evaluate_every"] = hyperparameters.eval_interval
        if hyperparameters.compute_multiplier != "auto":
            # GRPO compares the replies to one prompt, so at least two are needed.
            objective["num_generations"] = max(2, round(8 * hyperparameters.compute_multiplier))
    return {"training": training} | ({"objective": objective} if objective else {})


def organization(account: str) -> str:
    """Return OpenAI's organization id of an account."""
    return f"org-{account}"


def job_object(job: Job, model_name: str | None = None, results: Sequence[str] = ()) -> JsonObject:
    """Return a job as OpenAI's object.

    ``model_name`` is the name of the trained model. Values without an equivalent in OpenAI's API,
    such as S3 addresses, appear as in the other APIs.
    """
    status = STATUSES[job.state]
    sent = _as_sent(job)
    resolved = _resolved_hyperparameters(job, _sent_hyperparameters(sent))
    return {
        "id": job.name,
        "object": "fine_tuning.job",
        "created_at": seconds(job.created),
        "finished_at": seconds(job.ended),
        "model": sent.get("model"),
        "fine_tuned_model": model_name if status == "succeeded" else None,
        "user_provided_suffix": job.suffix,
        "organization_id": organization(job.account),
        "status": status,
        "error": _error(job),
        "hyperparameters": {
            name: resolved.get(name, "auto")
            for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
        },
        "method": _method(sent, resolved) if sent.get("method", True) else None,
        "training_file": sent.get("training_file"),
        "validation_file": sent.get("validation_file"),
        "result_files": list(results),
        "trained_tokens": job.result["tokens"] if job.result else None,
        "seed": sent.get("seed"),
        "metadata": sent.get("metadata") or {},
        "integrations": [],
        "estimated_finish": seconds(job.estimated_finish),
    }


def _as_sent(job: Job) -> Mapping[str, Any]:
    """Return the request of a job. For a job of another API, return an equivalent request.

    ``method`` is None if OpenAI's API has no equivalent method.
    """
    # The stored request also has what the recipe does not, such as `auto` and the metadata.
    if job.api == API:
        return job.request
    training, validation = (
        next((each.removeprefix(file_address("")) for each in addresses), None)
        for addresses in (job.details.get("sources", ()), job.validators)
    )
    base = foundation_model(job.base_model)
    objective = job.setting("objective.method")
    kind = "dpo" if objective == "dpo" else _METHODS.get(job.customization_type)
    return {
        "model": base.base if base is not None else job.base_model,
        "training_file": training,
        "validation_file": validation,
        "seed": job.setting("training.seed"),
        "method": {"type": kind} if kind else None,
    }


def _kind(fields: Mapping[str, Any]) -> str:
    return str((fields.get("method") or {}).get("type", "supervised"))


def _sent_hyperparameters(fields: Mapping[str, Any]) -> JsonObject:
    """Return the hyperparameters of a request."""
    arm = (fields.get("method") or {}).get(_kind(fields), {})
    hyperparameters: dict[str, Any] = (
        arm.get("hyperparameters") or fields.get("hyperparameters") or {}
    )
    return hyperparameters


def _resolved_hyperparameters(job: Job, sent: dict[str, Any]) -> JsonObject:
    """Return ``sent`` with ``auto`` replaced by chosen values, as soon as the values are chosen."""
    chosen: dict[str, Any] = {}
    if "chosen" in job.details or job.api != API:
        epochs = job.setting("training.epochs")
        chosen = {
            "n_epochs": None if epochs is None else max(1, round(epochs)),
            "batch_size": job.setting("training.batch_size"),
            "learning_rate_multiplier": job.setting("training.learning_rate_multiplier") or 1.0,
            "beta": job.setting("objective.beta"),
            "compute_multiplier": (job.setting("objective.num_generations") or 8) / 8,
            "eval_interval": job.setting("training.evaluate_every"),
        }
    resolved = {name: value for name, value in chosen.items() if value is not None}
    explicit = {name: value for name, value in sent.items() if value != "auto"}
    return {**dict.fromkeys(sent, "auto"), **resolved, **explicit}


def _method(fields: Mapping[str, Any], resolved: dict[str, Any]) -> JsonObject:
    kind = _kind(fields)
    arm = fields.get("method", {}).get(kind, {})
    names = arm.get("hyperparameters") or ("n_epochs", "batch_size", "learning_rate_multiplier")
    shown_arm = {"hyperparameters": {name: resolved.get(name, "auto") for name in names}}
    if "grader" in arm:
        shown_arm["grader"] = arm["grader"]
    return {"type": kind, kind: shown_arm}


def _error(job: Job) -> dict[str, Any] | None:
    """Return the error of a failed job. An error of the data checks names a rule and has a file
    parameter."""
    if job.state != jobs.FAILED:
        return None
    failure = with_api_names(job.failure or "") or "The job failed."
    # Clients know a file by its id, and not by the address inside of the server.
    message = failure.replace(file_address(""), "")
    if not _RULE.search(message):
        return {"code": "job_failed", "message": message, "param": None}
    # The failure is text, and OpenAI's clients decide by `param` which of both files to fix.
    validation = _as_sent(job).get("validation_file")
    first = _RULE.split(message, maxsplit=1)[0]
    param = "validation_file" if validation and validation in first else "training_file"
    return {"code": f"invalid_{param}", "message": message, "param": param}


def event_object(event: JobEvent) -> JsonObject:
    """Return an event as OpenAI's object.

    Clients read ``train_loss`` of every metrics event. Events without ``train_loss``, such as the
    evaluation before the first step, therefore have the type ``message``.
    """
    metrics = event.kind == "metrics" and "train_loss" in event.data
    return {
        "id": f"ftevent-{event.seq}",
        "object": "fine_tuning.job.event",
        "created_at": seconds(event.at),
        "level": _LEVELS.get(event.kind, "info"),
        "message": with_api_names(event.message),
        "type": "metrics" if metrics else "message",
        "data": dict(event.data) if metrics else None,
    }


def result_file(metrics: Iterable[JobEvent]) -> bytes:
    """Return a CSV file of metrics: step, train_loss, valid_loss, then additional metrics."""
    steps = _values_by_step(metrics)
    names = {name for values in steps.values() for name in values} - {*_COLUMNS, "epoch"}
    columns = (*_COLUMNS, *sorted(names))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for step, values in sorted(steps.items()):
        writer.writerow({**values, "step": step})
    return text.getvalue().encode()


def _values_by_step(metrics: Iterable[JobEvent]) -> dict[int, dict[str, Any]]:
    """Return the metrics by step. A step that ran again after a crash has those of the last run."""
    steps: dict[int, dict[str, Any]] = {}
    for event in metrics:
        step = event.data.get("step")
        if isinstance(step, int):
            steps.setdefault(step, {}).update(event.data)
    return steps


def checkpoint_object(job: Job, result: JobResult, model: str) -> JsonObject:
    """Return the checkpoint of a completed job: the stored weights, the only weights that exist."""
    step = result["steps"]
    losses = {"train_loss": result["train_loss"]}
    if result["validation_losses"] and result["validation_losses"][0] is not None:
        losses["valid_loss"] = result["validation_losses"][0]
    return {
        "id": f"ftckpt-{job.id}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(job.ended),
        "fine_tuned_model_checkpoint": model,
        "fine_tuning_job_id": job.name,
        "step_number": step,
        "metrics": {"step": step, **losses},
    }


@router.post("/fine_tuning/jobs", name="fine_tuning.jobs.create")
def create(call: OpenAICall, body: CreateJob) -> JsonObject:
    """Put a job into the queue."""
    call.record(_KIND)
    body.check()
    context, account = call.context, call.account
    base = context.inference.base(account, body.model)
    _check_file(call, body.training_file, "training_file")
    if body.validation_file is not None:
        _check_file(call, body.validation_file, "validation_file")
    grader = None
    if body.method is not None and body.method.reinforcement is not None:
        grader = grader_fields(
            body.method.reinforcement.grader,
            "method.reinforcement.grader",
            context.inference.judge(account),
        )
    # OpenAI returns the seed that was used, and the recipe needs one to be repeatable.
    seed = body.seed if body.seed is not None else secrets.randbelow(2**31)
    submission = replace(_submission(account, body, base, seed, grader), hold_out=context.hold_out)
    try:
        check_first_rows(context.locations, submission)
    except DataError as error:
        param = setting_name(error.setting or "")
        text = with_api_names(str(error))
        raise invalid(text, param, f"invalid_{param}") from error
    with context.database.write() as session:
        job = submit(session, submission, context.inference.models.arns, context.quotas(account))
    call.record_created(_KIND, job.name)
    context.wake()
    return _job_object(call, job)


def _submission(
    account: str,
    body: CreateJob,
    base: FoundationModel | CustomModel,
    seed: int,
    grader: dict[str, Any] | None,
) -> Submission:
    # Names of jobs are unique within an account, so random ids of OpenAI's form serve as names of
    # the other APIs, too.
    job_name = "ftjob-" + random_id(24, MIXED)
    root = root_of(base)
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", body.suffix or "").strip("-")
    name = root.base if root is not None else "imported"
    request = body.model_dump(mode="json", exclude_none=True)
    return Submission(
        account=account,
        api=API,
        job_name=job_name,
        model_name=job_name,
        customization_type=REINFORCEMENT if grader is not None else FINE_TUNING,
        base=base,
        training=[file_address(body.training_file)],
        validators=[file_address(body.validation_file)] if body.validation_file else [],
        settings=settings_of(body, seed, writes(base)),
        grader=grader,
        request={**request, "seed": seed, "metadata": body.metadata or {}},
        openai_id=":".join(("ft", name, organization(account), suffix, new_id())),
    )


def _check_file(call: Call, file_id: str, parameter: str) -> None:
    file = call.context.files.get(call.account, file_id)
    if file is None:
        raise invalid(f"No such file: {file_id}.", parameter, "file_not_found")
    if file.purpose != "fine-tune":
        text = f"The purpose of file {file_id} is '{file.purpose}', not 'fine-tune'."
        raise invalid(text, parameter, "invalid_file_purpose")


@router.get("/fine_tuning/jobs", name="fine_tuning.jobs.list")
def list_jobs(
    call: OpenAICall, request: Request, limit: Limit = 20, after: str | None = None
) -> JsonObject:
    """List the jobs of the account, newest first; ``metadata[KEY]=VALUE`` filters jobs."""
    metadata = metadata_filter(request)
    with call.context.database.read() as session:
        previous = row_before(after, "job", partial(_job, session, call.account))
        position = None if previous is None else previous.seq
        rows = jobs.list_jobs(
            session, call.account, metadata=metadata, limit=limit + 1, position=position
        )
    return page(rows, limit, partial(_job_object, call))


@router.get("/fine_tuning/jobs/{job}", name="fine_tuning.jobs.retrieve")
def retrieve(call: OpenAICall, job: Name) -> JsonObject:
    """Return a job."""
    return _job_object(call, _find(call, job))


@router.post("/fine_tuning/jobs/{job}/cancel", name="fine_tuning.jobs.cancel")
def cancel(call: OpenAICall, job: Name) -> JsonObject:
    """Cancel a job. The job stays ``running`` until the worker has stopped."""
    return _change(call, job, "cancel", jobs.stop)


@router.post("/fine_tuning/jobs/{job}/pause", name="fine_tuning.jobs.pause")
def pause(call: OpenAICall, job: Name) -> JsonObject:
    """Pause a job after the next checkpoint."""
    return _change(call, job, "pause", jobs.pause)


@router.post("/fine_tuning/jobs/{job}/resume", name="fine_tuning.jobs.resume")
def resume(call: OpenAICall, job: Name) -> JsonObject:
    """Resume a paused job."""
    return _change(call, job, "resume", jobs.resume)


def _change(
    call: Call, job_id: str, verb: str, change: Callable[[Session, Job], Job]
) -> JsonObject:
    call.record(_KIND, job_id)
    with call.context.database.write() as session:
        found = _job(session, call.account, job_id, lock=True)
        job = existing(found, "fine-tuning job", job_id, "id")
        stopping = job.state == jobs.STOPPING
        # A second cancellation succeeds, because clients repeat a request whose reply was lost.
        if job.state in jobs.ENDED or (stopping and verb != "cancel"):
            status = "being cancelled" if stopping else job_object(job)["status"]
            text = f"The job {job_id} is {status}. You cannot {verb} the job."
            raise invalid(text, reason="invalid_state")
        try:
            job = change(session, job)
        except WrongState as error:
            raise invalid(str(error), reason="invalid_state") from error
    return _job_object(call, job)


@router.get("/fine_tuning/jobs/{job}/events", name="fine_tuning.jobs.list_events")
def list_events(
    call: OpenAICall, job: Name, limit: Limit = 20, after: str | None = None
) -> JsonObject:
    """List the events of a job, newest first."""
    row = _find(call, job)
    position = None
    if after is not None:
        is_event = after.startswith("ftevent-")
        # Events are numbered across all accounts. The query is restricted to the job, so a number
        # of another account reveals nothing.
        position = parse_digits(after.removeprefix("ftevent-")) if is_event else None
        if position is None:
            raise invalid(f"No such event: {after}.", "after")
    with call.context.database.read() as session:
        events = jobs.events(session, row, limit=limit + 1, position=position)
    return page(events, limit, event_object)


@router.get("/fine_tuning/jobs/{job}/checkpoints", name="fine_tuning.jobs.list_checkpoints")
def list_checkpoints(
    call: OpenAICall, job: Name, limit: Limit = 10, after: str | None = None
) -> JsonObject:
    """List the checkpoint of a completed job. Weights of earlier epochs are not stored."""
    row = _find(call, job)
    model = _model_id(call, row) if row.result else None
    checkpoints = []
    if row.result and model is not None:
        checkpoints = [checkpoint_object(row, row.result, model)]
    if after is not None:
        if after not in [each["id"] for each in checkpoints]:
            raise invalid(f"No such checkpoint: {after}.", "after")
        checkpoints = []
    return page(checkpoints, limit)


def _find(call: Call, job_id: str) -> Job:
    with call.context.database.read() as session:
        return existing(_job(session, call.account, job_id), "fine-tuning job", job_id, "id")


def _job_object(call: Call, job: Job) -> JsonObject:
    """Return a job as OpenAI's object, with the trained model and the result file."""
    return job_object(job, _model_id(call, job), _result_files(call, job))


def _model_id(call: Call, job: Job) -> str | None:
    """Return the id of the job's active model."""
    query = select(CustomModel).where(
        CustomModel.account == job.account,
        CustomModel.job_id == job.id,
        CustomModel.status == ACTIVE,
    )
    with call.context.database.read() as session:
        model = session.scalar(query)
    arns = call.context.inference.models.arns
    return None if model is None else id_of(model, arns, foundation_models())


def _metrics(database: Database, job: Job) -> Iterator[JobEvent]:
    """Yield the metrics of a job page by page, oldest first."""
    position = None
    while True:
        with database.read() as session:
            events = jobs.events(
                session, job, kinds=("metrics",), limit=_PAGE, position=position, ascending=True
            )
        # Outside of the transaction: a slow client must not keep a snapshot of the database open.
        yield from events
        if len(events) < _PAGE:
            return
        position = events[-1].seq


def _result_files(call: Call, job: Job) -> list[str]:
    """Return the id of the result file. The first request after the end of the job writes the file.

    The file id follows from the job id, so that a job has one file. A deleted file is not written
    again. Without disk space or quota, the job has no file yet.
    """
    # Jobs of other APIs write metrics to the address in the request.
    if job.state != jobs.COMPLETED or job.api != API:
        return []
    files, file_id = call.context.files, f"file-results{job.id}"
    if not files.existed(job.account, file_id):
        content = result_file(_metrics(call.context.database, job))
        name = f"{job.name}_results.csv"
        try:
            files.add(job.account, iter([content]), name, "fine-tune-results", file_id=file_id)
        except (QuotaExceeded, DiskFull, ReadOnlyDisk):
            return []
    return [file_id] if files.get(job.account, file_id) else []


def _job(session: Session, account: str, job_id: str, *, lock: bool = False) -> Job | None:
    """Return the account's job with this name."""
    job = jobs.get(session, account, job_id, lock=lock)
    return job if job is not None and job.name == job_id else None
