"""Deployments of custom models: they answer on demand by the ARN of the deployment."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.api.bedrock.control import Operate, Request, not_found, shown_as, tags_of
from luthier.api.bedrock.identifiers import (
    DEPLOYMENT,
    deployment_arn,
    find_deployment,
    find_model,
)
from luthier.api.bedrock.lists import Order, contains, created_within, listed, page
from luthier.api.wire import Fault
from luthier.errors import NameInUse, QuotaExceeded
from luthier.store import custom_models, deployments, tags
from luthier.store.custom_models import CustomModel
from luthier.store.database import new_id, now
from luthier.store.deployments import Deployment

_IDENTIFIER = "customModelDeploymentIdentifier"
_ORDER = Order(Deployment.created, Deployment.seq)


def create_deployment(request: Request) -> dict[str, Any]:
    """Deploy a model that is Active; the deployment is Creating until its files were checked."""
    request.allow_kind(DEPLOYMENT)
    answer = request.replayed()
    if answer is not None:
        return answer
    given = tags_of(request.get("tags"))
    made: list[str] = []

    def make(session: Session) -> dict[str, Any]:
        model = _deployable(request, session, request["modelArn"])
        _check_room(request, session)
        moment = now()
        deployment = Deployment(
            id=new_id(),
            account=request.account,
            name=request["modelDeploymentName"],
            model=model.arn(request.arns),
            description=request.get("description"),
            created=moment,
            modified=moment,
        )
        session.add(deployment)
        session.flush()
        arn = deployment_arn(request.arns, deployment)
        tags.put(session, arn, given)
        made[:] = [deployment.id]
        return {"customModelDeploymentArn": arn}

    answer = request.once(make)
    for deployment_id in made:
        request.control.activation.deployment(deployment_id)
    return answer


def get_deployment(request: Request) -> dict[str, Any]:
    """One deployment by ARN or name."""
    with request.control.database.read() as session:
        found = _asked(request, session)
    return {
        **_shared(request, found),
        "modelDeploymentName": found.name,
        "description": found.description,
        "updateDetails": _update(found),
    }


def list_deployments(request: Request) -> dict[str, Any]:
    """Deployments of the account by creation."""
    request.allow("*")
    wanted = select(Deployment).where(
        Deployment.account == request.account,
        *contains(Deployment.name, request.get("nameContains")),
        *created_within(_ORDER, request.get("createdAfter"), request.get("createdBefore")),
    )
    if status := request.get("statusEquals"):
        wanted = wanted.where(Deployment.status == status)
    if model := request.get("modelArnEquals"):
        wanted = wanted.where(Deployment.model == model)
    with request.control.database.read() as session:
        rows, token = page(request, session, wanted, _ORDER)
    summaries = [
        {**_shared(request, found), "customModelDeploymentName": found.name} for found in rows
    ]
    return listed("modelDeploymentSummaries", summaries, token)


def update_deployment(request: Request) -> dict[str, Any]:
    """Let another model of the same base answer; until it is ready the old one does."""
    with request.control.database.write() as session:
        found = _asked(request, session, lock=True)
        model = _deployable(request, session, request["modelArn"])
        if found.status != deployments.ACTIVE:
            raise _invalid(f"The deployment is {found.status}; only an Active one can be updated.")
        before = find_model(session, request.arns, request.account, found.model)
        if before is None or before.bottom != model.bottom:
            raise _invalid("The model has another base than the one that is deployed.")
        found.next_model = model.arn(request.arns)
        found.update_status, found.modified = deployments.UPDATING, now()
    request.control.activation.deployment(found.id)
    return {"customModelDeploymentArn": deployment_arn(request.arns, found)}


def delete_deployment(request: Request) -> dict[str, Any]:
    """Delete a deployment; its model stays."""
    with request.control.database.write() as session:
        found = _asked(request, session, lock=True)
        if found.status == deployments.CREATING:
            raise Fault("Conflict", "The deployment is being created. Try again in a moment.")
        tags.drop(session, deployment_arn(request.arns, found))
        session.delete(found)
    return {}


def _asked(request: Request, session: Session, *, lock: bool = False) -> Deployment:
    identifier = request[_IDENTIFIER]
    found = find_deployment(session, request.arns, request.account, identifier, lock=lock)
    shown = shown_as(request, DEPLOYMENT, identifier)
    request.allow(deployment_arn(request.arns, found) if found else shown, shown)
    if found is None:
        raise not_found("custom model deployment", identifier)
    return found


def _deployable(request: Request, session: Session, identifier: str) -> CustomModel:
    """The model, kept from being deleted until the transaction ends."""
    model = find_model(session, request.arns, request.account, identifier, lock=True)
    if model is None:
        raise not_found("custom model", identifier)
    if model.status != custom_models.ACTIVE:
        raise _invalid(f"The model is {model.status}; only an Active one can be deployed.")
    return model


def _check_room(request: Request, session: Session) -> None:
    own = Deployment.account == request.account
    name = request["modelDeploymentName"]
    if session.scalar(select(Deployment.seq).where(own, Deployment.name == name)) is not None:
        raise NameInUse("model deployment")
    most = request.control.quotas(request.account).deployments
    if (session.scalar(select(func.count()).where(own)) or 0) >= most:
        raise QuotaExceeded(f"The account has {most} custom model deployments, which is its quota.")


def _shared(request: Request, found: Deployment) -> dict[str, Any]:
    return {
        "customModelDeploymentArn": deployment_arn(request.arns, found),
        "modelArn": found.model,
        "createdAt": found.created,
        "status": found.status,
        "lastUpdatedAt": found.modified,
        "failureMessage": found.failure,
    }


def _update(found: Deployment) -> dict[str, Any] | None:
    if found.update_status is None:
        return None
    return {"modelArn": found.next_model, "updateStatus": found.update_status}


def _invalid(text: str) -> Fault:
    return Fault("Validation", text, parameter="modelArn")


OPERATIONS: dict[str, Operate] = {
    "CreateCustomModelDeployment": create_deployment,
    "GetCustomModelDeployment": get_deployment,
    "ListCustomModelDeployments": list_deployments,
    "UpdateCustomModelDeployment": update_deployment,
    "DeleteCustomModelDeployment": delete_deployment,
}
