"""Customization jobs: create, get, list, stop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.formatting import map_code
from luthier.server.bedrock import hyperparameters
from luthier.server.bedrock.control import (
    ControlRequest,
    Operate,
    failure_message,
    invalid,
    list_response,
    not_found,
    page,
    parse_tags,
)
from luthier.server.bedrock.foundation import customizations
from luthier.server.bedrock.hyperparameters import setting_name
from luthier.server.bedrock.logging import logged_rows
from luthier.server.identifiers import (
    JOB,
    find_foundation,
    find_job,
    find_model,
    job_arn,
)
from luthier.server.jobs.data import check_first_rows
from luthier.server.jobs.submit import (
    DISTILLATION,
    FINE_TUNING,
    REINFORCEMENT,
    Submission,
    submit,
)
from luthier.server.tables import jobs as queue
from luthier.server.tables import tags
from luthier.server.tables.custom_models import ACTIVE, IMPORTED, RESERVED, CustomModel
from luthier.server.tables.foundation import AnyModel, FoundationModel
from luthier.server.tables.jobs import Job

_CONFIGS = {DISTILLATION: "distillationConfig", REINFORCEMENT: "rftConfig"}
"""Required member of ``customizationConfig`` by customization type. The remaining types accept
none."""
_STORED = (
    "clientRequestToken",
    "roleArn",
    "customModelKmsKeyId",
    "trainingDataConfig",
    "outputDataConfig",
    "hyperParameters",
    "customizationConfig",
    "vpcConfig",
)
"""Members of the request that GetModelCustomizationJob returns."""
_STATUS = {
    queue.QUEUED: "InProgress",
    queue.RUNNING: "InProgress",
    queue.PAUSED: "InProgress",
    queue.STOPPING: "Stopping",
    queue.COMPLETED: "Completed",
    queue.FAILED: "Failed",
    queue.STOPPED: "Stopped",
}
_PARTS = {
    "validationDetails": "validation",
    "dataProcessingDetails": "data_processing",
    "trainingDetails": "training",
}
_KEY_ID = re.compile("[a-zA-Z0-9-]{36}")
_KEY_ARN = re.compile("arn:aws(-[^:]+)?:kms:[a-zA-Z0-9-]*:[0-9]{12}:key/[a-zA-Z0-9-]{36}")


def create_job(request: ControlRequest) -> dict[str, Any]:
    """Queue a job. A repeated client token returns the same job."""
    request.record_kind(JOB)
    response = request.earlier_response()
    if response is not None:
        return response
    job_tags, model_tags = (
        parse_tags(request.get("jobTags")),
        parse_tags(request.get("customModelTags")),
    )
    submission = _submission(request)
    locations, quotas = request.control.locations, request.control.quotas(request.account)

    def create(session: Session) -> dict[str, Any]:
        job = submit(session, submission, request.arns, quotas)
        arn = job_arn(request.arns, job)
        tags.put(session, arn, job_tags)
        reserved = session.query(CustomModel).filter_by(job_id=job.id).one()
        # The reserved model has tags before the job completes.
        tags.put(session, reserved.arn(request.arns), model_tags)
        return {"jobArn": arn}

    try:
        if submission.output is not None:
            locations.check_writable(request.account, submission.output)
        # A job that fails hours later, when its turn comes, is the worst report of a misspelt
        # column.
        check_first_rows(locations, submission)
        response = request.create_once(create)
    except Exception:
        if "invocationLogsConfig" in request["trainingDataConfig"]:
            # The file of the logged rows belongs to no job.
            locations.uploads.delete(request.account, submission.training[0].rpartition("/")[2])
        raise
    request.control.wake()
    return response


def _submission(request: ControlRequest) -> Submission:
    kind = request.get("customizationType", FINE_TUNING)
    config = _config(kind, request.get("customizationConfig"))
    settings = hyperparameters.parse(request.get("hyperParameters", {}))
    teacher, grader, typed = None, None, {}
    if kind == DISTILLATION:
        teacher = _teacher(request, config["teacherModelConfig"])
        max_response = config["teacherModelConfig"].get("maxResponseLengthForInference")
        if max_response is not None:
            settings = hyperparameters.merge_fields(settings, _max_tokens(max_response))
    elif kind == REINFORCEMENT:
        grader = _grader(request, config)
        typed = config.get("hyperParameters", {})
        settings = hyperparameters.merge_fields(settings, hyperparameters.parse_rft(typed))
    validation = request.get("validationDataConfig", {"validators": []})
    return Submission(
        account=request.account,
        api="bedrock",
        job_name=request["jobName"],
        model_name=request["customModelName"],
        customization_type=kind,
        base=_base(request, kind),
        training=[_training(request, kind)],
        validators=[each["s3Uri"] for each in validation["validators"]],
        settings=settings,
        teacher=teacher,
        grader=grader,
        output=request["outputDataConfig"]["s3Uri"],
        request=request.members_sent(_STORED),
        hold_out=request.control.hold_out,
        without_effect=[*hyperparameters.ignored_warnings(typed), *_without_effect(request)],
    )


def _without_effect(request: ControlRequest) -> Iterator[str]:
    """Yield a warning for each setting that has an effect on AWS only, for the events of the job."""
    if "customModelKmsKeyId" in request.members:
        yield (
            "customModelKmsKeyId is stored and has no effect: luthier has no KMS. Use an encrypted "
            "volume."
        )
    if "vpcConfig" in request.members:
        yield "vpcConfig is shown again and has no effect: jobs run in the network of the worker."


def _config(kind: str, sent: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the member of ``customizationConfig`` for ``kind``; empty if ``kind`` accepts none."""
    if kind == "IMPORTED":
        raise invalid(
            "customizationType", "IMPORTED is the type of imported models. Use CreateCustomModel."
        )
    required = _CONFIGS.get(kind)
    name = next(iter(sent), None) if sent else None
    if name != required:
        requirement = f"needs {required}" if required else "takes none"
        raise invalid("customizationConfig", f"The customization type {kind} {requirement}.")
    config: Mapping[str, Any] = sent[name] if sent and name else {}
    return config


def _base(request: ControlRequest, kind: str) -> AnyModel:
    identifier = request["baseModelIdentifier"]
    base = find_foundation(request.arns, identifier)
    if base is not None:
        supported = customizations(base)
        # The list of a foundation model has the types that AWS knows; reinforcement is not among
        # them.
        if kind not in (*supported, *[REINFORCEMENT] * base.writes):
            known = ", ".join(supported)
            text = f"The base model {base.id} does not support {kind}; it supports {known}."
            raise invalid("customizationType", text)
        return base
    with request.control.database.read() as session:
        model = find_model(session, request.arns, request.account, identifier)
    if model is None:
        raise not_found("base model", identifier)
    if model.status != ACTIVE:
        text = f"The base model {identifier} is {model.status}; wait until it is Active."
        raise invalid("baseModelIdentifier", text)
    return model


def _training(request: ControlRequest, kind: str) -> str:
    config = request["trainingDataConfig"]
    if "invocationLogsConfig" in config:
        return logged_rows(request, config["invocationLogsConfig"], kind)
    if "s3Uri" not in config:
        raise invalid("trainingDataConfig", "trainingDataConfig needs s3Uri.")
    return str(config["s3Uri"])


def _teacher(request: ControlRequest, config: Mapping[str, Any]) -> FoundationModel:
    identifier = config["teacherModelIdentifier"]
    teacher = find_foundation(request.arns, identifier)
    if teacher is None:
        raise not_found("teacher model", identifier)
    if not teacher.writes:
        raise invalid("customizationConfig", f"The teacher {teacher.id} cannot generate text.")
    return teacher


def _max_tokens(tokens: int) -> dict[str, dict[str, Any]]:
    if tokens < 1:
        text = "maxResponseLengthForInference must be at least 1."
        raise invalid("customizationConfig", text)
    return {"sampling": {"max_tokens": tokens}}


def _grader(request: ControlRequest, config: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        function = config["graderConfig"]["lambdaGrader"]["lambdaArn"]
    except KeyError as error:
        raise invalid("customizationConfig", "rftConfig needs a lambdaGrader.") from error
    grader = request.control.grader(request.account, function)
    if grader is None:
        text = f"No grader is registered with this server under {function}."
        raise invalid("customizationConfig", text)
    return grader


def get_job(request: ControlRequest) -> dict[str, Any]:
    """Return a job by ARN or name."""
    with request.control.database.read() as session:
        job = find_requested_job(request, session)
        model = _models(session, [job]).get(job.id)
        return job_details(request, job) | {"outputModelArn": _model_arn(request, model)}


def list_jobs(request: ControlRequest) -> dict[str, Any]:
    """List the jobs of the account."""
    conditions = []
    if status := request.get("statusEquals"):
        conditions.append(Job.state.in_([s for s, shown in _STATUS.items() if shown == status]))
    rows, token = page(request, Job, *conditions)
    with request.control.database.read() as session:
        models = _models(session, rows)
    summaries = [_summary(request, job, models.get(job.id)) for job in rows]
    return list_response("modelCustomizationJobSummaries", summaries, token)


def stop_job(request: ControlRequest) -> dict[str, Any]:
    """Stop a job. A stopping or stopped job stays unchanged."""
    with request.control.database.write() as session:
        job = find_requested_job(request, session, lock=True)
        queue.stop(session, job)
    return {}


def find_requested_job(request: ControlRequest, session: Session, *, lock: bool = False) -> Job:
    """Return the job that ``jobIdentifier`` names."""
    identifier = request["jobIdentifier"]
    job = find_job(session, request.arns, request.account, identifier, lock=lock)
    arn = job_arn(request.arns, job) if job else None
    return request.require_row(job, arn, JOB, identifier, "customization job")


def job_details(request: ControlRequest, job: Job) -> dict[str, Any]:
    """Return the members of GetModelCustomizationJob, without the model's ARN."""
    sent = job.request
    return {
        "jobArn": job_arn(request.arns, job),
        "jobName": job.name,
        "outputModelName": job.model_name,
        "clientRequestToken": sent.get("clientRequestToken"),
        # Jobs of other APIs have none, and Bedrock's clients are promised one.
        "roleArn": sent.get("roleArn") or f"arn:aws:iam::{job.account}:role/none",
        "status": _STATUS[job.state],
        "statusDetails": _details(job),
        "failureMessage": failure_message(map_code(job.failure or "", setting_name)),
        "creationTime": job.created,
        "lastModifiedTime": job.modified,
        "endTime": job.ended,
        "baseModelArn": _base_arn(request, job),
        "vpcConfig": sent.get("vpcConfig"),
        "outputModelKmsKeyArn": _key_arn(request, sent.get("customModelKmsKeyId")),
        **customization_details(job),
    }


def _base_arn(request: ControlRequest, job: Job) -> str:
    """Return the ARN of the foundation model, or of the job's base if the foundation was imported."""
    imported = job.foundation.startswith(f"luthier.{IMPORTED}")
    return job.base_model if imported else request.arns.foundation_model(job.foundation)


def customization_details(job: Job) -> dict[str, Any]:
    """Return the members that a job shares with the job's model: configuration and result."""
    sent, result = job.request, job.result
    source = next(iter(job.details.get("sources", ())), None)
    losses = result["validation_losses"] if result else ()
    return {
        "customizationType": job.customization_type,
        "hyperParameters": hyperparameters.describe(job),
        "trainingDataConfig": sent.get("trainingDataConfig", {"s3Uri": source}),
        "validationDataConfig": {"validators": [{"s3Uri": uri} for uri in job.validators]},
        "outputDataConfig": sent.get("outputDataConfig", {"s3Uri": job.output or "s3://none"}),
        "customizationConfig": sent.get("customizationConfig"),
        "trainingMetrics": {"trainingLoss": result["train_loss"]} if result else None,
        "validationMetrics": [{"validationLoss": loss} for loss in losses] if losses else None,
    }


def _summary(request: ControlRequest, job: Job, model: CustomModel | None) -> dict[str, Any]:
    return {
        "jobArn": job_arn(request.arns, job),
        "baseModelArn": _base_arn(request, job),
        "jobName": job.name,
        "status": _STATUS[job.state],
        "statusDetails": _details(job),
        "lastModifiedTime": job.modified,
        "creationTime": job.created,
        "endTime": job.ended,
        "customModelArn": _model_arn(request, model),
        "customModelName": job.model_name,
        "customizationType": job.customization_type,
    }


def _models(session: Session, jobs: Any) -> dict[str, CustomModel]:
    """Return models by the id of the job that created the model, without deleted models."""
    query = select(CustomModel).where(
        CustomModel.job_id.in_([job.id for job in jobs]), CustomModel.status != RESERVED
    )
    return {str(model.job_id): model for model in session.scalars(query)}


def _model_arn(request: ControlRequest, model: CustomModel | None) -> str | None:
    return model.arn(request.arns) if model else None


def _details(job: Job) -> dict[str, Any]:
    """Return the status of each part of the job. A part of an ended job cannot be in progress."""
    parts = job.details.get("parts", {})
    statuses: dict[str, Any] = {}
    for name, part in _PARTS.items():
        progress = parts.get(part)
        if progress is None:
            statuses[name] = {"status": "NotStarted"}
            continue
        status = progress["status"]
        # The worker reports its parts, and a killed worker reports no end.
        if status == "InProgress" and job.state in (queue.STOPPING, *queue.ENDED):
            status = _STATUS[job.state]
        statuses[name] = {
            "status": status,
            "creationTime": datetime.fromisoformat(progress["created"]),
            "lastModifiedTime": datetime.fromisoformat(progress["modified"]),
        }
    return statuses


def _key_arn(request: ControlRequest, key: str | None) -> str | None:
    """Return a KMS key as an ARN; ``None`` for an alias, because the server cannot resolve aliases."""
    if key and _KEY_ARN.fullmatch(key):
        return key
    if key and _KEY_ID.fullmatch(key):
        return f"arn:aws:kms:{request.arns.region}:{request.account}:key/{key}"
    return None


OPERATIONS: dict[str, Operate] = {
    "CreateModelCustomizationJob": create_job,
    "GetModelCustomizationJob": get_job,
    "ListModelCustomizationJobs": list_jobs,
    "StopModelCustomizationJob": stop_job,
}
