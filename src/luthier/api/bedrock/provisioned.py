"""Provisioned throughput: a model under an ARN of its own, with units of throughput set aside."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from luthier.api.bedrock.control import Operate, Request, not_found, shown_as, tags_of
from luthier.api.bedrock.identifiers import (
    PROVISIONED,
    find_foundation,
    find_model,
    find_provisioned,
    provisioned_arn,
)
from luthier.api.bedrock.lists import Order, contains, created_within, listed, page
from luthier.api.wire import Fault
from luthier.errors import NameInUse, QuotaExceeded
from luthier.store import custom_models, provisioned, tags
from luthier.store.database import new_id, now
from luthier.store.provisioned import Provisioned

_ORDER = Order(Provisioned.created, Provisioned.seq)
_COMMITMENT = {"OneMonth": timedelta(days=30), "SixMonths": timedelta(days=182)}


def create_provisioned(request: Request) -> dict[str, Any]:
    """Set throughput aside for a foundation model or custom model."""
    request.allow_kind(PROVISIONED)
    answer = request.replayed()
    if answer is not None:
        return answer
    given = tags_of(request.get("tags"))
    made: list[str] = []

    def make(session: Session) -> dict[str, Any]:
        model, foundation = _model(request, session, request["modelId"])
        _check_name(request, session, request["provisionedModelName"])
        _check_quota(request, session)
        moment = now()
        found = Provisioned(
            id=new_id(),
            account=request.account,
            name=request["provisionedModelName"],
            foundation=foundation,
            model=model,
            next_model=model,
            units=request["modelUnits"],
            commitment=request.get("commitmentDuration"),
            created=moment,
            modified=moment,
        )
        session.add(found)
        session.flush()
        arn = provisioned_arn(request.arns, found)
        tags.put(session, arn, given)
        made[:] = [found.id]
        return {"provisionedModelArn": arn}

    answer = request.once(make)
    for provisioned_id in made:
        request.control.activation.provisioned(provisioned_id)
    return answer


def get_provisioned(request: Request) -> dict[str, Any]:
    """One by ARN or name."""
    with request.control.database.read() as session:
        found = _asked(request, session)
    return {**_summary(request, found), "failureMessage": found.failure}


def list_provisioned(request: Request) -> dict[str, Any]:
    """Those of the account by creation."""
    request.allow("*")
    wanted = select(Provisioned).where(
        Provisioned.account == request.account,
        *contains(Provisioned.name, request.get("nameContains")),
        *created_within(
            _ORDER, request.get("creationTimeAfter"), request.get("creationTimeBefore")
        ),
    )
    if status := request.get("statusEquals"):
        wanted = wanted.where(Provisioned.status == status)
    if model := request.get("modelArnEquals"):
        wanted = wanted.where(or_(Provisioned.model == model, Provisioned.next_model == model))
    with request.control.database.read() as session:
        rows, token = page(request, session, wanted, _ORDER)
    return listed("provisionedModelSummaries", [_summary(request, each) for each in rows], token)


def update_provisioned(request: Request) -> dict[str, Any]:
    """Give it another name, or let another model of the same base answer."""
    with request.control.database.write() as session:
        found = _asked(request, session, lock=True)
        if found.status != provisioned.IN_SERVICE:
            text = (
                f"The provisioned throughput is {found.status}; only one InService can be updated."
            )
            raise Fault("Validation", text)
        name = request.get("desiredProvisionedModelName", found.name)
        if name != found.name:
            _check_name(request, session, name)
            found.name = name
        if "desiredModelId" in request.members:
            _change_model(request, session, found)
        found.modified = now()
    if found.status == provisioned.UPDATING:
        request.control.activation.provisioned(found.id)
    return {}


def delete_provisioned(request: Request) -> dict[str, Any]:
    """Give throughput back, whatever was committed to."""
    with request.control.database.write() as session:
        found = _asked(request, session, lock=True)
        if found.status == provisioned.CREATING:
            text = "The provisioned throughput is being created. Try again in a moment."
            raise Fault("Conflict", text)
        tags.drop(session, provisioned_arn(request.arns, found))
        session.delete(found)
    return {}


def _asked(request: Request, session: Session, *, lock: bool = False) -> Provisioned:
    identifier = request["provisionedModelId"]
    found = find_provisioned(session, request.arns, request.account, identifier, lock=lock)
    shown = shown_as(request, PROVISIONED, identifier)
    request.allow(provisioned_arn(request.arns, found) if found else shown, shown)
    if found is None:
        raise not_found("provisioned model", identifier)
    return found


def _model(request: Request, session: Session, identifier: str) -> tuple[str, str]:
    """ARN of a model by any of its identifiers, and ``provider.name`` of its foundation model."""
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


def _change_model(request: Request, session: Session, found: Provisioned) -> None:
    model, foundation = _model(request, session, request["desiredModelId"])
    if foundation != found.foundation:
        raise Fault("Validation", "The model has another base than the one that is provisioned.")
    if model != found.model:
        found.next_model, found.status = model, provisioned.UPDATING


def _check_name(request: Request, session: Session, name: str) -> None:
    taken = select(Provisioned.seq).where(
        Provisioned.account == request.account, Provisioned.name == name
    )
    if session.scalar(taken) is not None:
        raise NameInUse("provisioned model")


def _check_quota(request: Request, session: Session) -> None:
    most = request.control.quotas(request.account).provisioned_throughputs
    own = select(func.count()).where(Provisioned.account == request.account)
    if (session.scalar(own) or 0) >= most:
        raise QuotaExceeded(f"The account has {most} provisioned throughputs, which is its quota.")


def _summary(request: Request, found: Provisioned) -> dict[str, Any]:
    return {
        "provisionedModelName": found.name,
        "provisionedModelArn": provisioned_arn(request.arns, found),
        "modelArn": found.model,
        "desiredModelArn": found.next_model,
        "foundationModelArn": request.arns.foundation_model(found.foundation),
        "modelUnits": found.units,
        "desiredModelUnits": found.units,
        "status": found.status,
        "commitmentDuration": found.commitment,
        "commitmentExpirationTime": _expires(found),
        "creationTime": found.created,
        "lastModifiedTime": found.modified,
    }


def _expires(found: Provisioned) -> datetime | None:
    return found.created + _COMMITMENT[found.commitment] if found.commitment else None


OPERATIONS: dict[str, Operate] = {
    "CreateProvisionedModelThroughput": create_provisioned,
    "GetProvisionedModelThroughput": get_provisioned,
    "ListProvisionedModelThroughputs": list_provisioned,
    "UpdateProvisionedModelThroughput": update_provisioned,
    "DeleteProvisionedModelThroughput": delete_provisioned,
}
