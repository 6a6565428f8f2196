"""``/models``, and the resolution of model names in requests."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select

from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.openai.operations import OpenAICall, openai_router, page
from luthier.server.openai.protocol import JsonObject, seconds
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.foundation import FoundationModel, foundation_models

OWNER = "luthier"
router = openai_router()


def id_of(model: CustomModel, arns: Arns, bases: Iterable[FoundationModel]) -> str:
    """Return the ``ft:`` id of a model, or the model's name in the Bedrock API.

    A model with the same name as one of ``bases`` has the ARN as id.
    """
    if model.openai_id is not None:
        return model.openai_id
    is_ambiguous = any(model.name in (base.base, base.id) for base in bases)
    return model.arn(arns) if is_ambiguous else model.name


@router.get("/models", name="models.list")
def list_models(call: OpenAICall) -> JsonObject:
    """List all base models by alias, and the models of the account."""
    bases, arns = foundation_models(), call.context.inference.models.arns
    own = select(CustomModel).where(
        CustomModel.account == call.account, CustomModel.status == ACTIVE
    )
    with call.context.database.read() as session:
        models = session.scalars(own.order_by(CustomModel.seq)).all()
    named: list[tuple[FoundationModel | CustomModel, str]] = [(base, base.base) for base in bases]
    named += [(model, id_of(model, arns, bases)) for model in models]
    return page(named, len(named), lambda entry: model_object(*entry))


@router.get("/models/{model}", name="models.retrieve")
def retrieve(call: OpenAICall, model: Name) -> JsonObject:
    """Return a model by any name of the model."""
    return model_object(call.context.inference.base(call.account, model), model)


@router.delete("/models/{model}", name="models.delete")
def delete(call: OpenAICall, model: Name) -> JsonObject:
    """Delete a model of the account; base models are shared by all accounts."""
    call.record("model", model)
    target = call.context.inference.base(call.account, model)
    if isinstance(target, FoundationModel):
        raise Fault("AccessDenied", f"The base model `{model}` cannot be deleted.")
    call.context.delete_model(target)
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
