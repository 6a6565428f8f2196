"""Creation, promotion, rollback and history of the models behind deployments."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import LuthierError, RefusedInput, WrongState
from luthier.library import models
from luthier.limits import AccountQuotas
from luthier.server.identifiers import find_endpoint, find_model, model_name, stored_id_of
from luthier.server.live.canary import ANSWERS, harm_tests
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import count_rows, new_id, now
from luthier.server.tables.endpoints import (
    CANARY,
    CREATE,
    DEPLOYMENT,
    PROMOTE,
    READY,
    ROLL_BACK,
    SWITCHED,
    DeploymentChange,
    Endpoint,
    changes_of,
    open_change,
)
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.storage import check_count

STOPPED = "Stopped by "
"""Beginning of the note of a change that a person has ended."""


class UnknownName(RefusedInput):
    """A name of no deployment or model of the account."""

    default_rule = "deployment.unknown"


def find_deployment(
    session: Session, arns: Arns, account: str, name: str, *, lock: bool = False
) -> Endpoint:
    """Return a deployment by name or ARN.

    Raises:
        UnknownName: If the account has no such deployment.
    """
    endpoint = find_endpoint(session, arns, account, DEPLOYMENT, name, lock=lock)
    if endpoint is None:
        raise UnknownName(f'There is no deployment "{name}".')
    return endpoint


def deploy(
    session: Session,
    arns: Arns,
    account: str,
    name: str,
    model: str,
    user: str,
    quotas: AccountQuotas,
) -> Endpoint:
    """Create a deployment of a model. The server loads the model first.

    Raises:
        UnknownName: For an unknown model.
        RefusedInput: If the name is the name of a base model.
        WrongState: If the model is not ready, or the name is in use.
        QuotaExceeded: If the account has too many deployments.
    """
    if foundation_model(name) is not None:
        raise RefusedInput(
            f'"{name}" is the name of a base model. Choose a different name.', setting="name"
        )
    custom = _active_model(session, arns, account, model)
    own = Endpoint.account == account, Endpoint.kind == DEPLOYMENT
    if session.scalar(select(Endpoint.seq).where(*own, Endpoint.name == name)) is not None:
        raise WrongState(f'A deployment "{name}" exists already. Choose a different name.')
    count = count_rows(session, *own)
    check_count(count, quotas, "deployments", "model deployments", "Delete some of them.")
    endpoint = Endpoint(
        id=new_id(), account=account, kind=DEPLOYMENT, name=name, model=custom.arn(arns),
        foundation=custom.bottom, created=now(), modified=now(),
    )  # fmt: skip
    session.add(endpoint)
    session.add(DeploymentChange.of(endpoint.id, CREATE, endpoint.model, None, user))
    session.flush()
    return endpoint


def promote(
    session: Session,
    arns: Arns,
    account: str,
    deployment: str,
    model: str,
    user: str,
    share: float | None = None,
    answers: int | None = None,
) -> Endpoint:
    """Begin the switch of a deployment to a new model. The server loads the model first.

    Args:
        share: Share of users or sessions for the new model until the switch. The default is an
            immediate switch.
        answers: Number of answers of the new model before the switch.

    Raises:
        UnknownName: For an unknown deployment or model.
        WrongState: If deployment or model is not ready, or the model serves already.
        RefusedInput: If the model has a different task, or share or answers are out of range.
    """
    if share is None and answers is not None:
        raise RefusedInput("`answers` needs a `share`", setting="answers")
    if share is not None and not 0 < share < 1:
        raise RefusedInput("`share` must be more than 0 and less than 1", setting="share")
    if answers is not None and answers < 1:
        raise RefusedInput("`answers` must be at least 1", setting="answers")
    endpoint = _ready(session, arns, account, deployment)
    custom = _active_model(session, arns, account, model)
    arn = custom.arn(arns)
    if arn == endpoint.model:
        raise WrongState(f'The model "{model}" already serves the deployment.')
    check_task(session, endpoint, custom, with_share=share is not None)
    count = None if share is None else answers or ANSWERS
    change = DeploymentChange.of(
        endpoint.id, PROMOTE, arn, endpoint.model, user, share=share, answers=count
    )
    endpoint.begin_change(session, change)
    return endpoint


def roll_back(session: Session, arns: Arns, account: str, deployment: str, user: str) -> Endpoint:
    """End the pending change of a deployment, or begin the return to the model before.

    Repeated rollbacks return to earlier and earlier models.

    Raises:
        UnknownName: For an unknown deployment.
        WrongState: If there is no earlier model.
    """
    endpoint = _ready(session, arns, account, deployment)
    if open_change(session, endpoint.id) is not None:
        endpoint.end_change(session, f"{STOPPED}{user}.")
        return endpoint
    earlier = _switches(session, endpoint)
    target = earlier[-1].previous if earlier else None
    if target is None:
        raise WrongState("The deployment has no earlier model.")
    if stored_id_of(session, target) is None:
        raise WrongState(f"The earlier model {target} was deleted.")
    before = next((each for each in reversed(earlier[:-1]) if each.model == target), None)
    previous = before.previous if before else None
    change = DeploymentChange.of(endpoint.id, ROLL_BACK, target, previous, user)
    endpoint.begin_change(session, change)
    return endpoint


def _switches(session: Session, endpoint: Endpoint) -> list[DeploymentChange]:
    return [each for each in changes_of(session, endpoint.id) if each.state == SWITCHED]


def check_task(
    session: Session, endpoint: Endpoint, model: CustomModel, with_share: bool = False
) -> None:
    """Reject a model with a different task than the serving model.

    Raises:
        RefusedInput: If the tasks differ, or embedding models would share requests.
    """
    try:
        serving = models.find(stored_id_of(session, endpoint.model) or "").objective
        new = models.find(model.stored_id or "").objective
    except LuthierError:
        return  # missing or damaged: the server reports that the model cannot be loaded
    if serving.task is not new.task:
        raise RefusedInput(
            f'The model "{model.name}" was trained with `{new.method}`, and the deployment serves a '
            f"model of `{serving.method}`: a different task.",
            setting="model",
        )
    if with_share and new.task.embeds:
        raise RefusedInput(
            "Embeddings of two models cannot be compared with each other. Promote without a `share`.",
            setting="share",
        )


def describe(session: Session, endpoint: Endpoint) -> dict[str, Any]:
    """Return a deployment with its history, oldest change first."""
    changes = changes_of(session, endpoint.id)
    found: dict[str, Any] = {
        "deployment": endpoint.name,
        "status": endpoint.status,
        "model": model_name(session, endpoint.model),
        "model_arn": endpoint.model,
        "history": [_change(each, model_name(session, each.model)) for each in changes],
    }
    if (switches := _switches(session, endpoint)) and (earlier := switches[-1].previous):
        found["earlier"] = model_name(session, earlier)
    change = open_change(session, endpoint.id)
    if change is not None and change.state == CANARY:
        answers, tests = harm_tests(session, endpoint.account, change)
        found["canary"] = {
            "model": model_name(session, change.model),
            "share": change.share,
            "answers": answers,
            "promoted_at": change.answers,
            "comparisons": [each.plain() for each in tests],
        }
    return found


def _change(change: DeploymentChange, model: str) -> dict[str, Any]:
    names = ("action", "user", "state", "requested", "finished", "note")
    found = {name: getattr(change, name) for name in names}
    return {"model": model} | {name: value for name, value in found.items() if value is not None}


def _active_model(session: Session, arns: Arns, account: str, name: str) -> CustomModel:
    custom = find_model(session, arns, account, name, lock=True)
    if custom is None:
        raise UnknownName(f'There is no model "{name}".')
    if custom.status != ACTIVE:
        raise WrongState(f"The model is {custom.status}; only an Active model can be deployed.")
    return custom


def _ready(session: Session, arns: Arns, account: str, name: str) -> Endpoint:
    endpoint = find_deployment(session, arns, account, name, lock=True)
    if endpoint.status != READY:
        raise WrongState(f'The deployment "{name}" is {endpoint.status}.')
    return endpoint
