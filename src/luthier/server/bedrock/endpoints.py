"""Operations on custom model deployments and provisioned throughput.

Bedrock has two resources for an endpoint, with different members and states. The database has one
table with two kinds (``luthier.server.tables.endpoints``), and this module renders both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from luthier.errors import NameInUse
from luthier.server.bedrock.control import (
    ControlRequest,
    Operate,
    failure_message,
    invalid,
    list_answer,
    not_found,
    page,
    tags_of,
)
from luthier.server.http.messages import Fault
from luthier.server.identifiers import (
    endpoint_arn,
    find_endpoint,
    find_foundation,
    find_model,
)
from luthier.server.tables import custom_models, storage, tags
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import count_rows, lock_by_name, new_id, now
from luthier.server.tables.endpoints import (
    CREATING,
    DEPLOYMENT,
    PROVISIONED,
    READY,
    UPDATING,
    Endpoint,
)

_COMMITMENT = {"OneMonth": timedelta(days=30), "SixMonths": timedelta(days=182)}


@dataclass(frozen=True)
class _Kind:
    """Names of one kind of endpoint in requests, responses and messages."""

    arn: str
    identifier: str
    """Request member with the identifier."""
    text: str
    resource: str
    """Noun in the ResourceNotFound error."""
    in_use: str
    """Noun in the NameInUse error."""
    quota: str
    plural: str
    ready: str
    """Bedrock's status of a ready endpoint."""


_DEPLOYMENT = _Kind(
    DEPLOYMENT, "customModelDeploymentIdentifier", "deployment", "custom model deployment",
    "model deployment", "deployments", "custom model deployments", "Active",
)  # fmt: skip
_PROVISIONED = _Kind(
    PROVISIONED, "provisionedModelId", "provisioned throughput", "provisioned model",
    "provisioned model", "provisioned_throughputs", "provisioned throughputs", "InService",
)  # fmt: skip


# --- both kinds


def _create(
    request: ControlRequest, kind: _Kind, name: str, fields: Callable[[Session], dict[str, Any]]
) -> str:
    """Create an endpoint, once per client token, and return the ARN.

    Args:
        request: the request.
        kind: the kind of endpoint.
        name: the name of the endpoint.
        fields: returns the columns of the row, with the model.
    """
    request.record_kind(kind.arn)
    answer = request.earlier_answer()
    if answer is not None:
        return str(answer["arn"])
    wanted_tags = tags_of(request.get("tags"))
    made: list[str] = []

    def make(session: Session) -> dict[str, Any]:
        row = fields(session)
        lock_by_name(session, f"endpoints {request.account}")  # from here on nobody else counts
        _check_name(request, session, kind, name)
        own = count_rows(session, *_own(request, kind))
        quotas = request.control.quotas(request.account)
        storage.check_count(own, quotas, kind.quota, kind.plural, "Delete some of them.")
        moment = now()
        endpoint = Endpoint(
            id=new_id(),
            account=request.account,
            kind=kind.arn,
            name=name,
            created=moment,
            modified=moment,
            **row,
        )
        session.add(endpoint)
        session.flush()
        arn = endpoint_arn(request.arns, endpoint)
        tags.put(session, arn, wanted_tags)
        made[:] = [endpoint.id]
        return {"arn": arn}

    answer = request.once(make)
    for endpoint_id in made:
        request.control.activation.submit(endpoint_id)
    return str(answer["arn"])


def _find(
    request: ControlRequest, session: Session, kind: _Kind, *, lock: bool = False
) -> Endpoint:
    identifier = request[kind.identifier]
    found = find_endpoint(session, request.arns, request.account, kind.arn, identifier, lock=lock)
    arn = endpoint_arn(request.arns, found) if found else None
    return request.found(found, arn, kind.arn, identifier, kind.resource)


def _delete(request: ControlRequest, kind: _Kind) -> dict[str, Any]:
    """Delete an endpoint. The model stays."""
    with request.control.database.write() as session:
        found = _find(request, session, kind, lock=True)
        if found.status == CREATING:
            text = f"The {kind.text} is being created. Try again in a moment."
            raise Fault("Conflict", text)
        tags.drop(session, endpoint_arn(request.arns, found))
        session.delete(found)
    return {}


def _own(request: ControlRequest, kind: _Kind) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return Endpoint.account == request.account, Endpoint.kind == kind.arn


def _check_name(request: ControlRequest, session: Session, kind: _Kind, name: str) -> None:
    taken = select(Endpoint.seq).where(*_own(request, kind), Endpoint.name == name)
    if session.scalar(taken) is not None:
        raise NameInUse(kind.in_use)


# --- deployments


def create_deployment(request: ControlRequest) -> dict[str, Any]:
    """Deploy an Active model. The deployment is Creating until the model's files are verified."""

    def fields(session: Session) -> dict[str, Any]:
        model = _deployable(request, session)
        return {
            "model": model.arn(request.arns),
            "foundation": model.bottom,
            "description": request.get("description"),
        }

    arn = _create(request, _DEPLOYMENT, request["modelDeploymentName"], fields)
    return {"customModelDeploymentArn": arn}


def get_deployment(request: ControlRequest) -> dict[str, Any]:
    """Return a deployment by ARN or name."""
    with request.control.database.read() as session:
        found = _find(request, session, _DEPLOYMENT)
    update = {"modelArn": found.next_model, "updateStatus": found.update_status}
    return {
        **_deployment_summary(request, found),
        "modelDeploymentName": found.name,
        "description": found.description,
        "updateDetails": update if found.update_status else None,
    }


def list_deployments(request: ControlRequest) -> dict[str, Any]:
    """List the account's deployments in order of creation."""
    wanted: list[ColumnElement[bool]] = []
    if status := request.get("statusEquals"):
        wanted.append(Endpoint.status == (READY if status == _DEPLOYMENT.ready else status))
    if model := request.get("modelArnEquals"):
        wanted.append(Endpoint.model == model)
    rows, token = page(request, Endpoint, Endpoint.kind == DEPLOYMENT, *wanted)
    summaries = [
        {**_deployment_summary(request, each), "customModelDeploymentName": each.name}
        for each in rows
    ]
    return list_answer("modelDeploymentSummaries", summaries, token)


def update_deployment(request: ControlRequest) -> dict[str, Any]:
    """Replace the deployed model by a model of the same base. The old model serves until then."""
    with request.control.database.write() as session:
        found = _find(request, session, _DEPLOYMENT, lock=True)
        model = _deployable(request, session)
        if found.status != READY:
            raise invalid(
                "modelArn", f"The deployment is {found.status}; only an Active one can be updated."
            )
        if found.foundation != model.bottom:
            raise invalid("modelArn", "The model has another base than the one that is deployed.")
        found.next_model = model.arn(request.arns)
        found.update_status, found.modified = UPDATING, now()
    request.control.activation.submit(found.id)
    return {"customModelDeploymentArn": endpoint_arn(request.arns, found)}


def delete_deployment(request: ControlRequest) -> dict[str, Any]:
    """Delete a deployment. The model stays."""
    return _delete(request, _DEPLOYMENT)


def _deployable(request: ControlRequest, session: Session) -> CustomModel:
    """Return the model, locked against deletion until the transaction ends."""
    identifier = request["modelArn"]
    model = find_model(session, request.arns, request.account, identifier, lock=True)
    if model is None:
        raise not_found("custom model", identifier)
    if model.status != custom_models.ACTIVE:
        raise invalid(
            "modelArn", f"The model is {model.status}; only an Active one can be deployed."
        )
    return model


def _deployment_summary(request: ControlRequest, found: Endpoint) -> dict[str, Any]:
    return {
        "customModelDeploymentArn": endpoint_arn(request.arns, found),
        "modelArn": found.model,
        "createdAt": found.created,
        "status": _DEPLOYMENT.ready if found.status == READY else found.status,
        "lastUpdatedAt": found.modified,
        "failureMessage": failure_message(found.failure),
    }


# --- provisioned throughput


def create_provisioned(request: ControlRequest) -> dict[str, Any]:
    """Create provisioned throughput for a foundation model or custom model."""

    def fields(session: Session) -> dict[str, Any]:
        model, foundation = _provisionable(request, session, request["modelId"])
        return {
            "model": model,
            "foundation": foundation,
            "units": request["modelUnits"],
            "commitment": request.get("commitmentDuration"),
        }

    arn = _create(request, _PROVISIONED, request["provisionedModelName"], fields)
    return {"provisionedModelArn": arn}


def get_provisioned(request: ControlRequest) -> dict[str, Any]:
    """Return provisioned throughput by ARN or name."""
    with request.control.database.read() as session:
        found = _find(request, session, _PROVISIONED)
    return {
        **_provisioned_summary(request, found),
        "failureMessage": failure_message(found.failure),
    }


def list_provisioned(request: ControlRequest) -> dict[str, Any]:
    """List the account's provisioned throughput in order of creation."""
    wanted: list[ColumnElement[bool]] = []
    updating = func.coalesce(Endpoint.update_status, "") == UPDATING
    if status := request.get("statusEquals"):
        if status == UPDATING:
            wanted.append(updating)
        elif status == _PROVISIONED.ready:
            wanted.append(and_(Endpoint.status == READY, ~updating))
        else:
            wanted.append(Endpoint.status == status)
    if model := request.get("modelArnEquals"):
        about_to = and_(Endpoint.next_model == model, updating)
        wanted.append(or_(Endpoint.model == model, about_to))
    rows, token = page(request, Endpoint, Endpoint.kind == PROVISIONED, *wanted)
    summaries = [_provisioned_summary(request, each) for each in rows]
    return list_answer("provisionedModelSummaries", summaries, token)


def update_provisioned(request: ControlRequest) -> dict[str, Any]:
    """Rename provisioned throughput, or replace the model by a model of the same base."""
    with request.control.database.write() as session:
        found = _find(request, session, _PROVISIONED, lock=True)
        if (status := _provisioned_status(found)) != _PROVISIONED.ready:
            text = f"The provisioned throughput is {status}; only one InService can be updated."
            raise Fault("Validation", text)
        name = request.get("desiredProvisionedModelName", found.name)
        if name != found.name:
            _check_name(request, session, _PROVISIONED, name)
            found.name = name
        if "desiredModelId" in request.members:
            model, foundation = _provisionable(request, session, request["desiredModelId"])
            if foundation != found.foundation:
                text = "The model has another base than the one that is provisioned."
                raise Fault("Validation", text)
            if model != found.model:
                found.next_model, found.update_status = model, UPDATING
        found.modified = now()
    if found.pending_model is not None:
        request.control.activation.submit(found.id)
    return {}


def delete_provisioned(request: ControlRequest) -> dict[str, Any]:
    """Delete provisioned throughput, whatever the commitment."""
    return _delete(request, _PROVISIONED)


def _provisionable(request: ControlRequest, session: Session, identifier: str) -> tuple[str, str]:
    """Return ARN and foundation model id of the model that ``identifier`` names."""
    base = find_foundation(request.arns, identifier)
    if base is not None:
        return request.arns.foundation_model(base.id), base.id
    model = find_model(session, request.arns, request.account, identifier, lock=True)
    if model is None:
        raise not_found("model", identifier)
    if model.status != custom_models.ACTIVE:
        text = f"The model is {model.status}; only an Active one can be provisioned."
        raise Fault("Validation", text)
    return model.arn(request.arns), model.bottom


def _provisioned_status(found: Endpoint) -> str:
    if found.status != READY:
        return found.status
    return UPDATING if found.update_status == UPDATING else _PROVISIONED.ready


def _provisioned_summary(request: ControlRequest, found: Endpoint) -> dict[str, Any]:
    commitment = found.commitment
    return {
        "provisionedModelName": found.name,
        "provisionedModelArn": endpoint_arn(request.arns, found),
        "modelArn": found.model,
        "desiredModelArn": found.pending_model or found.model,
        "foundationModelArn": request.arns.foundation_model(found.foundation),
        "modelUnits": found.units,
        "desiredModelUnits": found.units,
        "status": _provisioned_status(found),
        "commitmentDuration": commitment,
        "commitmentExpirationTime": found.created + _COMMITMENT[commitment] if commitment else None,
        "creationTime": found.created,
        "lastModifiedTime": found.modified,
    }


OPERATIONS: dict[str, Operate] = {
    "CreateCustomModelDeployment": create_deployment,
    "GetCustomModelDeployment": get_deployment,
    "ListCustomModelDeployments": list_deployments,
    "UpdateCustomModelDeployment": update_deployment,
    "DeleteCustomModelDeployment": delete_deployment,
    "CreateProvisionedModelThroughput": create_provisioned,
    "GetProvisionedModelThroughput": get_provisioned,
    "ListProvisionedModelThroughputs": list_provisioned,
    "UpdateProvisionedModelThroughput": update_provisioned,
    "DeleteProvisionedModelThroughput": delete_provisioned,
}
