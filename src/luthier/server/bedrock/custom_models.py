"""Custom model operations: import, get, list and delete. Jobs create all other custom models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import false, select
from sqlalchemy.orm import Session

from luthier.server.bedrock.control import (
    ControlRequest,
    Operate,
    failure_message,
    invalid,
    list_answer,
    page,
    tags_of,
)
from luthier.server.bedrock.jobs import customization_details
from luthier.server.identifiers import (
    FOUNDATION,
    MODEL,
    find_model,
    job_arn,
    own,
)
from luthier.server.jobs.submit import submit_import
from luthier.server.roles import Permission, permissions_of
from luthier.server.tables import tags
from luthier.server.tables.custom_models import RESERVED, CustomModel
from luthier.server.tables.jobs import Job

_SHOWN = ("modelSourceConfig", "roleArn", "modelKmsKeyArn", "clientRequestToken")
"""Members of an import request that are stored with the model."""


def create_model(request: ControlRequest) -> dict[str, Any]:
    """Queue the import of a model. The status is Creating until a trial run of the model succeeds."""
    request.record_kind(MODEL)
    answer = request.earlier_answer()
    if answer is not None:
        return answer
    given, source = tags_of(request.get("modelTags")), _source(request)
    request.control.locations.folder(request.account, source)
    shown, quotas = request.members_sent(_SHOWN), request.control.quotas(request.account)

    def make(session: Session) -> dict[str, Any]:
        name = request["modelName"]
        trusted = Permission.ADMINISTER in permissions_of(request.request.caller)
        model = submit_import(session, request.account, name, source, shown, quotas, trusted)
        arn = model.arn(request.arns)
        tags.put(session, arn, given)
        return {"modelArn": arn}

    answer = request.once(make)
    request.control.wake()
    return answer


def _source(request: ControlRequest) -> str:
    """Return the URI of the folder to import."""
    if "customModelDataSource" in request.members:
        text = "Model packages of SageMaker are not supported by this server; name an S3 folder."
        raise invalid("customModelDataSource", text)
    place = request.get("modelSourceConfig", {}).get("s3DataSource")
    if place is None:
        text = "A model needs modelSourceConfig.s3DataSource.s3Uri, the folder of its files."
        raise invalid("modelSourceConfig", text)
    return str(place["s3Uri"])


def get_model(request: ControlRequest) -> dict[str, Any]:
    """Return a custom model by ARN or name."""
    with request.control.database.read() as session:
        model = asked_model(request, session, request["modelIdentifier"])
        job = _jobs(session, [model]).get(str(model.job_id))
        return _model_details(request, model, job)


def list_models(request: ControlRequest) -> dict[str, Any]:
    """List the models of the account."""
    conditions = [CustomModel.status != RESERVED]
    if not request.get("isOwned", True):  # models that other accounts share: there are none
        conditions.append(false())
    if base := request.get("baseModelArnEquals"):
        conditions.append(CustomModel.base_model == base)
    if foundation := request.get("foundationModelArnEquals"):
        arn = own(request.arns, "", FOUNDATION, foundation)
        conditions.append(CustomModel.root == (arn.path if arn else None))
    if status := request.get("modelStatus"):
        conditions.append(CustomModel.status == status)
    rows, token = page(request, CustomModel, *conditions)
    with request.control.database.read() as session:
        jobs = _jobs(session, rows)
    summaries = [_summary(request, model, jobs.get(str(model.job_id))) for model in rows]
    return list_answer("modelSummaries", summaries, token)


def delete_model(request: ControlRequest) -> dict[str, Any]:
    """Delete a model that no endpoint serves. The model's job stays."""
    with request.control.database.read() as session:
        model = asked_model(request, session, request["modelIdentifier"])
    request.control.delete_model(model)
    return {}


def asked_model(request: ControlRequest, session: Session, identifier: str) -> CustomModel:
    """Return the model of an ARN or name."""
    found = find_model(session, request.arns, request.account, identifier)
    arn = found.arn(request.arns) if found else None
    return request.found(found, arn, MODEL, identifier, "custom model")


def _model_details(request: ControlRequest, model: CustomModel, job: Job | None) -> dict[str, Any]:
    details = customization_details(job) if job else {"customizationType": "IMPORTED"}
    sent = model.details.get("request", {})
    return {
        "modelArn": model.arn(request.arns),
        "modelName": model.name,
        "jobName": job.name if job else None,
        "jobArn": job_arn(request.arns, job) if job else None,
        "baseModelArn": model.base_model or None,
        "modelKmsKeyArn": sent.get("modelKmsKeyArn"),
        "creationTime": model.created,
        "modelStatus": model.status,
        "failureMessage": failure_message(model.failure),
        **details,
    }


def _summary(request: ControlRequest, model: CustomModel, job: Job | None) -> dict[str, Any]:
    return {
        "modelArn": model.arn(request.arns),
        "modelName": model.name,
        "creationTime": model.created,
        # A whole network from outside has none, and readers of lists are promised one.
        "baseModelArn": model.base_model or model.arn(request.arns),
        "baseModelName": model.bottom,
        "customizationType": job.customization_type if job else "IMPORTED",
        "ownerAccountId": model.account,
        "modelStatus": model.status,
    }


def _jobs(session: Session, models: Sequence[CustomModel]) -> dict[str, Job]:
    """Return the jobs that created ``models``, by id."""
    query = select(Job).where(Job.id.in_([model.job_id for model in models if model.job_id]))
    return {job.id: job for job in session.scalars(query)}


OPERATIONS: dict[str, Operate] = {
    "CreateCustomModel": create_model,
    "GetCustomModel": get_model,
    "ListCustomModels": list_models,
    "DeleteCustomModel": delete_model,
}
