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
    list_response,
    page,
    parse_tags,
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

_STORED = ("modelSourceConfig", "roleArn", "modelKmsKeyArn", "clientRequestToken")
"""Members of an import request that are stored with the model."""


def create_model(request: ControlRequest) -> dict[str, Any]:
    """Queue the import of a model. The status is Creating until a trial run of the model succeeds."""
    request.record_kind(MODEL)
    response = request.earlier_response()
    if response is not None:
        return response
    model_tags, source = parse_tags(request.get("modelTags")), _source(request)
    request.control.locations.folder(request.account, source)
    stored_members, quotas = request.members_sent(_STORED), request.control.quotas(request.account)

    def create(session: Session) -> dict[str, Any]:
        name = request["modelName"]
        trusted = Permission.ADMINISTER in permissions_of(request.request.caller)
        model = submit_import(
            session, request.account, name, source, stored_members, quotas, trusted
        )
        arn = model.arn(request.arns)
        tags.put(session, arn, model_tags)
        return {"modelArn": arn}

    response = request.create_once(create)
    request.control.wake()
    return response


def _source(request: ControlRequest) -> str:
    """Return the URI of the folder to import."""
    if "customModelDataSource" in request.members:
        text = "SageMaker model packages are not supported. Use an S3 folder."
        raise invalid("customModelDataSource", text)
    source = request.get("modelSourceConfig", {}).get("s3DataSource")
    if source is None:
        text = "modelSourceConfig.s3DataSource.s3Uri is missing. Set the folder of the model."
        raise invalid("modelSourceConfig", text)
    return str(source["s3Uri"])


def get_model(request: ControlRequest) -> dict[str, Any]:
    """Return a custom model by ARN or name."""
    with request.control.database.read() as session:
        model = find_requested_model(request, session, request["modelIdentifier"])
        job = _jobs(session, [model]).get(str(model.job_id))
        return _model_details(request, model, job)


def list_models(request: ControlRequest) -> dict[str, Any]:
    """List the models of the account."""
    conditions = [CustomModel.status != RESERVED]
    if not request.get("isOwned", True):  # sharing between accounts is not supported
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
    return list_response("modelSummaries", summaries, token)


def delete_model(request: ControlRequest) -> dict[str, Any]:
    """Delete a model that no endpoint serves. The model's job stays."""
    with request.control.database.read() as session:
        model = find_requested_model(request, session, request["modelIdentifier"])
    request.control.delete_model(model)
    return {}


def find_requested_model(request: ControlRequest, session: Session, identifier: str) -> CustomModel:
    """Return the model of an ARN or name."""
    model = find_model(session, request.arns, request.account, identifier)
    arn = model.arn(request.arns) if model else None
    return request.require_row(model, arn, MODEL, identifier, "custom model")


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
        # Required by the shape; an imported whole network has no base.
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
