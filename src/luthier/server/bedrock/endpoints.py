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
    list_response,
    not_found,
    page,
    parse_tags,
)
from luthier.server.http.messages import Fault
from luthier.server.identifiers import (
    endpoint_arn,
    find_endpoint,
    find_foundation,
    find_model,
)
from luthier.server.promotion import check_task
from luthier.server.tables import custom_models, storage, tags
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import count_rows, lock_by_name, new_id, now
from luthier.server.tables.endpoints import (
    CREATE,
    CREATING,
    DEPLOYMENT,
    PROMOTE,
    PROVISIONED,
    READY,
    UPDATING,
    DeploymentChange,
    Endpoint,
    delete_changes,
)
from luthier.server.tables.foundation import foundation_model

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
    response = request.earlier_response()
    if response is not None:
        return str(response["arn"])
    sent_tags = parse_tags(request.get("tags"))
    created: list[str] = []

    def create(session: Session) -> dict[str, Any]:
        row = fields(session)
        lock_by_name(session, f"endpoints {request.account}")  # serializes the count below
        _check_name(request, session, kind, name)
        count = count_rows(session, *_belongs_to_account(request, kind))
        quotas = request.control.quotas(request.account)
        storage.check_count(count, quotas, kind.quota, kind.plural, "Delete some of them.")
        created_at = now()
        endpoint = Endpoint(
            id=new_id(),
            account=request.account,
            kind=kind.arn,
            name=name,
            created=created_at,
            modified=created_at,
            **row,
        )
        session.add(endpoint)
        if kind is _DEPLOYMENT:
            user = request.request.caller.user
            session.add(DeploymentChange.of(endpoint.id, CREATE, endpoint.model, None, user))
        session.flush()
        arn = endpoint_arn(request.arns, endpoint)
        tags.put(session, arn, sent_tags)
        # Not appended: the transaction may run again, and only the last run creates the endpoint.
        created[:] = [endpoint.id]
        return {"arn": arn}

    response = request.create_once(create)
    # After the commit, because another thread reads the row. A repeated request created nothing.
    for endpoint_id in created:
        request.control.activation.submit(endpoint_id)
    return str(response["arn"])


def _find(
    request: ControlRequest, session: Session, kind: _Kind, *, lock: bool = False
) -> Endpoint:
    identifier = request[kind.identifier]
    endpoint = find_endpoint(
        session, request.arns, request.account, kind.arn, identifier, lock=lock
    )
    arn = endpoint_arn(request.arns, endpoint) if endpoint else None
    return request.require_row(endpoint, arn, kind.arn, identifier, kind.resource)


def _delete(request: ControlRequest, kind: _Kind) -> dict[str, Any]:
    """Delete an endpoint. The model stays."""
    with request.control.database.write() as session:
        endpoint = _find(request, session, kind, lock=True)
        # The model may be loading at this moment, and would stay in memory for an endpoint that is
        # gone.
        if endpoint.status == CREATING:
            text = f"The {kind.text} is being created. Try again in a moment."
            raise Fault("Conflict", text)
        tags.drop(session, endpoint_arn(request.arns, endpoint))
        delete_changes(session, endpoint.id)
        session.delete(endpoint)
    return {}


def _belongs_to_account(
    request: ControlRequest, kind: _Kind
) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return Endpoint.account == request.account, Endpoint.kind == kind.arn


def _check_name(request: ControlRequest, session: Session, kind: _Kind, name: str) -> None:
    query = select(Endpoint.seq).where(*_belongs_to_account(request, kind), Endpoint.name == name)
    if session.scalar(query) is not None:
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
        endpoint = _find(request, session, _DEPLOYMENT)
    update = {"modelArn": endpoint.next_model, "updateStatus": endpoint.update_status}
    return {
        **_deployment_summary(request, endpoint),
        "modelDeploymentName": endpoint.name,
        "description": endpoint.description,
        "updateDetails": update if endpoint.update_status else None,
    }


def list_deployments(request: ControlRequest) -> dict[str, Any]:
    """List the account's deployments in order of creation."""
    conditions: list[ColumnElement[bool]] = []
    if status := request.get("statusEquals"):
        conditions.append(Endpoint.status == (READY if status == _DEPLOYMENT.ready else status))
    if model := request.get("modelArnEquals"):
        conditions.append(Endpoint.model == model)
    rows, token = page(request, Endpoint, Endpoint.kind == DEPLOYMENT, *conditions)
    summaries = [
        {**_deployment_summary(request, each), "customModelDeploymentName": each.name}
        for each in rows
    ]
    return list_response("modelDeploymentSummaries", summaries, token)


def update_deployment(request: ControlRequest) -> dict[str, Any]:
    """Replace the deployed model by a model of the same base. The old model serves until then."""
    with request.control.database.write() as session:
        endpoint = _find(request, session, _DEPLOYMENT, lock=True)
        model = _deployable(request, session)
        if endpoint.status != READY:
            raise invalid(
                "modelArn",
                f"The deployment is {endpoint.status}; only an Active deployment can be updated.",
            )
        bases = {endpoint.foundation, model.bottom}
        if len(bases) > 1 and all(map(foundation_model, bases)):
            # Imported models have no base that Bedrock knows; the task must suffice.
            raise invalid(
                "modelArn", "The base of the model differs from the base of the deployment."
            )
        check_task(session, endpoint, model)
        user, arn = request.request.caller.user, model.arn(request.arns)
        change = DeploymentChange.of(endpoint.id, PROMOTE, arn, endpoint.model, user)
        endpoint.begin_change(session, change)
    request.control.activation.submit(endpoint.id)
    return {"customModelDeploymentArn": endpoint_arn(request.arns, endpoint)}


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
            "modelArn", f"The model is {model.status}; only an Active model can be deployed."
        )
    return model


def _deployment_summary(request: ControlRequest, endpoint: Endpoint) -> dict[str, Any]:
    return {
        "customModelDeploymentArn": endpoint_arn(request.arns, endpoint),
        "modelArn": endpoint.model,
        "createdAt": endpoint.created,
        "status": _DEPLOYMENT.ready if endpoint.status == READY else endpoint.status,
        "lastUpdatedAt": endpoint.modified,
        "failureMessage": failure_message(endpoint.failure),
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
        endpoint = _find(request, session, _PROVISIONED)
    return {
        **_provisioned_summary(request, endpoint),
        "failureMessage": failure_message(endpoint.failure),
    }


def list_provisioned(request: ControlRequest) -> dict[str, Any]:
    """List the account's provisioned throughput in order of creation."""
    conditions: list[ColumnElement[bool]] = []
    updating = func.coalesce(Endpoint.update_status, "") == UPDATING
    if status := request.get("statusEquals"):
        if status == UPDATING:
            conditions.append(updating)
        elif status == _PROVISIONED.ready:
            conditions.append(and_(Endpoint.status == READY, ~updating))
        else:
            conditions.append(Endpoint.status == status)
    if model := request.get("modelArnEquals"):
        pending = and_(Endpoint.next_model == model, updating)
        conditions.append(or_(Endpoint.model == model, pending))
    rows, token = page(request, Endpoint, Endpoint.kind == PROVISIONED, *conditions)
    summaries = [_provisioned_summary(request, each) for each in rows]
    return list_response("provisionedModelSummaries", summaries, token)


def update_provisioned(request: ControlRequest) -> dict[str, Any]:
    """Rename provisioned throughput, or replace the model by a model of the same base."""
    with request.control.database.write() as session:
        endpoint = _find(request, session, _PROVISIONED, lock=True)
        if (status := _provisioned_status(endpoint)) != _PROVISIONED.ready:
            text = (
                f"The provisioned throughput is {status}; only InService throughput can be updated."
            )
            raise Fault("Validation", text)
        name = request.get("desiredProvisionedModelName", endpoint.name)
        if name != endpoint.name:
            _check_name(request, session, _PROVISIONED, name)
            endpoint.name = name
        if "desiredModelId" in request.members:
            model, foundation = _provisionable(request, session, request["desiredModelId"])
            if foundation != endpoint.foundation:
                text = "The base of the model differs from the provisioned base."
                raise Fault("Validation", text)
            if model != endpoint.model:
                endpoint.next_model, endpoint.update_status = model, UPDATING
        endpoint.modified = now()
    if endpoint.pending_model is not None:
        request.control.activation.submit(endpoint.id)
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
        text = f"The model is {model.status}; only an Active model can be provisioned."
        raise Fault("Validation", text)
    return model.arn(request.arns), model.bottom


def _provisioned_status(endpoint: Endpoint) -> str:
    if endpoint.status != READY:
        return endpoint.status
    return UPDATING if endpoint.update_status == UPDATING else _PROVISIONED.ready


def _provisioned_summary(request: ControlRequest, endpoint: Endpoint) -> dict[str, Any]:
    commitment = endpoint.commitment
    return {
        "provisionedModelName": endpoint.name,
        "provisionedModelArn": endpoint_arn(request.arns, endpoint),
        "modelArn": endpoint.model,
        # Bedrock has the member always; without an update, it equals the model.
        "desiredModelArn": endpoint.pending_model or endpoint.model,
        "foundationModelArn": request.arns.foundation_model(endpoint.foundation),
        "modelUnits": endpoint.units,
        "desiredModelUnits": endpoint.units,
        "status": _provisioned_status(endpoint),
        "commitmentDuration": commitment,
        "commitmentExpirationTime": endpoint.created + _COMMITMENT[commitment]
        if commitment
        else None,
        "creationTime": endpoint.created,
        "lastModifiedTime": endpoint.modified,
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
