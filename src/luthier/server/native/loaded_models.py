"""Models in the server's memory: list, load and unload the account's own models."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select

from luthier.inference.pool import LoadedModel
from luthier.server.http.messages import Fault, inference_faults
from luthier.server.http.routes import MODEL_SLOT, Name
from luthier.server.identifiers import find_foundation
from luthier.server.native.operations import (
    Call,
    NativeCall,
    View,
    native_router,
    not_found,
)
from luthier.server.tables.custom_models import CustomModel

router = native_router()


class LoadedModelView(View):
    """A custom model and the model's state in memory."""

    id: str
    name: str
    arn: str
    loaded: bool
    base: str | None = None
    """ARN of the base model, if the model is an adapter that shares a loaded base model."""
    memory_bytes: int | None = None
    """Estimated memory of the weights in bytes, without a shared base model."""
    loaded_at: datetime | None = None
    last_used: datetime | None = None
    """Time of the last load, request or end of a reply."""
    requests: int = 0
    """Number of active requests."""
    proposed_tokens: int | None = None
    """Tokens proposed by speculative decoding in completed replies since loading."""
    accepted_tokens: int | None = None
    """Proposed tokens that the model accepted."""


class LoadedModelsView(View):
    """The account's models in memory, least recently used first."""

    models: list[LoadedModelView]


@router.get("/loaded-models")
def list_loaded_models(call: NativeCall) -> LoadedModelsView:
    """List the account's models in the memory of this server."""
    loaded = _loaded_by_id(call)
    own = select(CustomModel).where(
        CustomModel.account == call.account, CustomModel.stored_id.in_([*loaded])
    )
    with call.context.database.read() as session:
        models = list(session.scalars(own.order_by(CustomModel.seq)))
    order = {model_id: index for index, model_id in enumerate(loaded)}
    models.sort(key=lambda model: order.get(model.stored_id or "", len(order)))
    return LoadedModelsView(
        models=[_view(call, each, loaded.get(each.stored_id or "")) for each in models]
    )


@router.post("/models/{model}/load", dependencies=[MODEL_SLOT])
def load_model(call: NativeCall, model: Name) -> LoadedModelView:
    """Load a custom model into memory."""
    row, stored_id = _find(call, model)
    with inference_faults():
        call.context.pool.load(stored_id)
    return _view(call, row, _loaded_by_id(call).get(stored_id))


@router.post("/models/{model}/unload")
def unload_model(call: NativeCall, model: Name) -> LoadedModelView:
    """Unload a custom model after the active requests have ended."""
    row, stored_id = _find(call, model)
    call.context.pool.unload(stored_id)
    return _view(call, row, _loaded_by_id(call).get(stored_id))


def _find(call: Call, name: str) -> tuple[CustomModel, str]:
    """Return the account's model and the model's library id."""
    base = find_foundation(call.context.arns, name)
    if base is not None:
        raise Fault(
            "Validation",
            f"{name} is a foundation model, shared by all accounts. Use a custom model.",
            parameter="model",
        )
    with call.context.database.read() as session:
        model = call.model(session, name, active=True)
    if model.stored_id is None:
        raise not_found("model", name)
    return model, model.stored_id


def _loaded_by_id(call: Call) -> dict[str, LoadedModel]:
    return {each.id: each for each in call.context.pool.loaded_models()}


def _view(call: Call, model: CustomModel, loaded: LoadedModel | None) -> LoadedModelView:
    arn = model.arn(call.context.arns)
    if loaded is None:
        return LoadedModelView(id=model.id, name=model.name, arn=arn, loaded=False)
    speculation = loaded.speculation
    return LoadedModelView(
        id=model.id,
        name=model.name,
        arn=arn,
        loaded=True,
        base=None if loaded.base is None else model.base_model,
        memory_bytes=loaded.bytes,
        loaded_at=loaded.loaded,
        last_used=loaded.last_used,
        requests=loaded.requests,
        proposed_tokens=None if speculation is None else speculation.proposed,
        accepted_tokens=None if speculation is None else speculation.accepted,
    )
