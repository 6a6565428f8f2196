"""Customization jobs: get, list, stop. Making one is in ``luthier.api.bedrock.customization``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.api.bedrock.control import Operate, Request, not_found, shown_as
from luthier.api.bedrock.customization import create_job
from luthier.api.bedrock.hyperparameters import setting_name
from luthier.api.bedrock.identifiers import JOB, find_job, job_arn
from luthier.api.bedrock.lists import Order, contains, created_within, listed, page
from luthier.setting_names import with_setting_names
from luthier.store import jobs as queue
from luthier.store.custom_models import RESERVED, CustomModel
from luthier.store.jobs import Job

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
_LONGEST = 2048
_ORDER = Order(Job.created, Job.seq)
_KEY_ID = re.compile("[a-zA-Z0-9-]{36}")
_KEY_ARN = re.compile("arn:aws(-[^:]+)?:kms:[a-zA-Z0-9-]*:[0-9]{12}:key/[a-zA-Z0-9-]{36}")


def get_job(request: Request) -> dict[str, Any]:
    """One job by ARN or name."""
    with request.control.database.read() as session:
        job = asked_job(request, session)
        model = _models(session, [job]).get(job.id)
        return described(request, job) | {"outputModelArn": _made(request, model)}


def list_jobs(request: Request) -> dict[str, Any]:
    """Jobs of the account by creation."""
    request.allow("*")
    wanted = select(Job).where(
        Job.account == request.account,
        *contains(Job.name, request.get("nameContains")),
        *created_within(
            _ORDER, request.get("creationTimeAfter"), request.get("creationTimeBefore")
        ),
    )
    if status := request.get("statusEquals"):
        wanted = wanted.where(Job.state.in_([s for s, shown in _STATUS.items() if shown == status]))
    with request.control.database.read() as session:
        rows, token = page(request, session, wanted, _ORDER)
        models = _models(session, rows)
        summaries = [_summary(request, job, models.get(job.id)) for job in rows]
    return listed("modelCustomizationJobSummaries", summaries, token)


def stop_job(request: Request) -> dict[str, Any]:
    """Stop a job: nothing more happens to one that is stopping or stopped."""
    with request.control.database.write() as session:
        job = asked_job(request, session, lock=True)
        queue.stop(session, job)
    return {}


def asked_job(request: Request, session: Session, *, lock: bool = False) -> Job:
    """The job that ``jobIdentifier`` names, where the caller may do this to it."""
    identifier = request["jobIdentifier"]
    found = find_job(session, request.arns, request.account, identifier, lock=lock)
    shown = shown_as(request, JOB, identifier)
    request.allow(job_arn(request.arns, found) if found else shown, shown)
    if found is None:
        raise not_found("customization job", identifier)
    return found


def described(request: Request, job: Job) -> dict[str, Any]:
    """What is told of a job by itself."""
    asked = job.request
    return {
        "jobArn": job_arn(request.arns, job),
        "jobName": job.name,
        "outputModelName": job.model_name,
        "clientRequestToken": asked.get("clientRequestToken"),
        "roleArn": asked.get("roleArn") or _no_role(job),
        "status": _STATUS[job.state],
        "statusDetails": _details(job),
        "failureMessage": with_setting_names(job.failure, setting_name)[:_LONGEST]
        if job.failure
        else None,
        "creationTime": job.created,
        "lastModifiedTime": job.modified,
        "endTime": job.ended,
        "baseModelArn": request.arns.foundation_model(job.foundation),
        "vpcConfig": asked.get("vpcConfig"),
        "outputModelKmsKeyArn": _key_arn(request, asked.get("customModelKmsKeyId")),
        **learned(job),
    }


def learned(job: Job) -> dict[str, Any]:
    """What a job and its model both tell: how it was made, and what came of it."""
    asked, result = job.request, job.result or {}
    source = next(iter(job.details.get("sources", ())), None)
    losses = result.get("validation_losses", ())
    return {
        "customizationType": job.customization_type,
        "hyperParameters": asked.get("hyperParameters"),
        "trainingDataConfig": asked.get("trainingDataConfig", {"s3Uri": source}),
        "validationDataConfig": {"validators": [{"s3Uri": uri} for uri in job.validators]},
        "outputDataConfig": asked.get("outputDataConfig", {"s3Uri": job.output or "s3://none"}),
        "customizationConfig": asked.get("customizationConfig"),
        "trainingMetrics": {"trainingLoss": result["train_loss"]}
        if "train_loss" in result
        else None,
        "validationMetrics": [{"validationLoss": loss} for loss in losses] if losses else None,
    }


def _summary(request: Request, job: Job, model: CustomModel | None) -> dict[str, Any]:
    return {
        "jobArn": job_arn(request.arns, job),
        "baseModelArn": request.arns.foundation_model(job.foundation),
        "jobName": job.name,
        "status": _STATUS[job.state],
        "statusDetails": _details(job),
        "lastModifiedTime": job.modified,
        "creationTime": job.created,
        "endTime": job.ended,
        "customModelArn": _made(request, model),
        "customModelName": job.model_name,
        "customizationType": job.customization_type,
    }


def _models(session: Session, found: Any) -> dict[str, CustomModel]:
    """The models that jobs made, by the ids of the jobs; a deleted one is not among them."""
    asked = select(CustomModel).where(
        CustomModel.job_id.in_([job.id for job in found]), CustomModel.status != RESERVED
    )
    return {str(model.job_id): model for model in session.scalars(asked)}


def _made(request: Request, model: CustomModel | None) -> str | None:
    return model.arn(request.arns) if model else None


def _details(job: Job) -> dict[str, Any]:
    """How far each part of the work is; a part of an ended job cannot be in progress."""
    parts: Mapping[str, Any] = job.details.get("parts", {})
    found: dict[str, Any] = {}
    for name, part in _PARTS.items():
        told = parts.get(part)
        if told is None:
            found[name] = {"status": "NotStarted"}
            continue
        status = told["status"]
        if status == "InProgress" and job.state in (queue.STOPPING, *queue.ENDED):
            status = _STATUS[job.state]
        found[name] = {
            "status": status,
            "creationTime": datetime.fromisoformat(told["created"]),
            "lastModifiedTime": datetime.fromisoformat(told["modified"]),
        }
    return found


def _no_role(job: Job) -> str:
    """Jobs of other faces have none, and Bedrock's clients are promised one."""
    return f"arn:aws:iam::{job.account}:role/none"


def _key_arn(request: Request, key: str | None) -> str | None:
    """A key by its ARN; an alias has none that we would know."""
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
