"""``/models``, and the resolution of model names in requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import select

from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.identifiers import (
    Invocable,
    find_foundation,
    find_model,
    invocable,
    invocable_model,
    resolve_name,
)
from luthier.server.openai.operations import OpenAICall, openai_router, page
from luthier.server.openai.protocol import JsonObject, model_not_found, seconds
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import FoundationModel, foundation_models

OWNER = "luthier"
router = openai_router()

DeleteModel = Callable[[CustomModel], None]
"""Function that deletes a custom model and all dependent data.

Raises:
    WrongState: If the model is deployed or provisioned, or a job starts from the model.
"""


class Catalogue:
    """Models that an account can name: base models, own models and deployments."""

    def __init__(self, database: Database, arns: Arns) -> None:
        self.database, self.arns = database, arns

    def target(self, account: str, name: str) -> Invocable | None:
        """Return the model or deployment with the name ``name``, or None.

        Raises:
            Fault: ``ModelNotReady`` for the ARN of an endpoint in creation.
        """
        name = resolve_name(self.database, self.arns, account, name)
        base = find_foundation(self.arns, name)
        if base is not None:
            arn = self.arns.foundation_model(base.id)
            return Invocable(base.base, arn, arn)
        found = invocable_model(self.database, self.arns, account, name)
        if found is not None or not name.startswith("arn:"):
            return found
        try:
            return invocable(self.database, self.arns, account, name)
        except Fault as fault:
            if fault.code in ("ResourceNotFound", "Validation"):
                return None
            raise

    def base(self, account: str, name: str) -> FoundationModel | CustomModel:
        """Return a base model by alias, id or ARN, or a model of the account by any name.

        Raises:
            Fault: 404 ``model_not_found``.
        """
        base = find_foundation(self.arns, name)
        if base is not None:
            return base
        with self.database.read() as session:
            found = find_model(session, self.arns, account, name)
        if found is None or found.status != ACTIVE:
            raise model_not_found(name)
        return found

    def own(self, account: str) -> list[CustomModel]:
        """Return the account's models, oldest first."""
        mine = select(CustomModel).where(
            CustomModel.account == account, CustomModel.status == ACTIVE
        )
        with self.database.read() as session:
            return list(session.scalars(mine.order_by(CustomModel.seq)))

    def id_of(self, model: CustomModel, bases: Iterable[FoundationModel]) -> str:
        """Return the ``ft:`` id of a model, or the model's name in the Bedrock API.

        A model with the same name as one of ``bases`` has the ARN as id.
        """
        if model.openai_id is not None:
            return model.openai_id
        taken = any(model.name in (base.base, base.id) for base in bases)
        return model.arn(self.arns) if taken else model.name


@router.get("/models", name="models.list")
def list_models(call: OpenAICall) -> JsonObject:
    """List all base models by alias, and the models of the account."""
    catalogue, bases = call.context.inference.catalogue, foundation_models()
    named: list[tuple[FoundationModel | CustomModel, str]] = [(each, each.base) for each in bases]
    named += [(each, catalogue.id_of(each, bases)) for each in catalogue.own(call.account)]
    return page(named, len(named), lambda each: model_object(*each))


@router.get("/models/{model}", name="models.retrieve")
def retrieve(call: OpenAICall, model: Name) -> JsonObject:
    """Return a model by any name of the model."""
    return model_object(call.context.inference.catalogue.base(call.account, model), model)


@router.delete("/models/{model}", name="models.delete")
def delete(call: OpenAICall, model: Name) -> JsonObject:
    """Delete a model of the account; base models are shared by all accounts."""
    call.record("model", model)
    found = call.context.inference.catalogue.base(call.account, model)
    if isinstance(found, FoundationModel):
        raise Fault("AccessDenied", f"The base model `{model}` cannot be deleted.")
    call.context.delete_model(found)
    return {"id": model, "object": "model", "deleted": True}


def model_object(model: FoundationModel | CustomModel, name: str) -> JsonObject:
    """Return a model as OpenAI's object; base models have the creation time 0."""
    owner = OWNER if isinstance(model, FoundationModel) else f"org-{model.account}"
    return {
        "id": name,
        "object": "model",
        "created": seconds(model.created) or 0,
        "owned_by": owner,
    }
