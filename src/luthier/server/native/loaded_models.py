"""Models in the server's memory, in the native API: an account lists, loads and unloads its own."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select

from luthier.inference.pool import LoadedModel, ModelPool
from luthier.server.http.messages import Fault, Request, inference_faults
from luthier.server.identifiers import find_foundation
from luthier.server.native.operations import Context, NativeOperation, View, not_found
from luthier.server.tables.custom_models import CustomModel


class LoadedModelView(View):
    """A custom model, as it stands in the memory of this server."""

    id: str
    name: str
    arn: str
    loaded: bool
    base: str | None = None
    """ARN of the model whose network it shares there, as an adapter."""
    memory_bytes: int | None = None
    """Estimated memory of its weights in bytes, without the weights of that model."""
    loaded_at: datetime | None = None
    last_used: datetime | None = None
    """When it was loaded or asked last, or ended an answer."""
    requests: int = 0
    """Those that it answers now."""
    proposed_tokens: int | None = None
    """Tokens of its answers that were guessed before it wrote them, since it was loaded, of those that
    have ended; of a model that writes."""
    accepted_tokens: int | None = None
    """Those that it then wrote."""


class LoadedModelsView(View):
    """The account's models in memory, the longest unused first."""

    models: list[LoadedModelView]


def operations(context: Context, pool: ModelPool) -> list[NativeOperation]:
    """Everything about models in memory."""
    models, one = _LoadedModels(context, pool), "/api/v1/models/{model}"
    return [
        NativeOperation(
            "listLoadedModels", "GET", "/api/v1/loaded-models", models.list_models,
            "The account's models in the memory of this server.",
            LoadedModelsView,
        ),
        NativeOperation(
            "loadModel", "POST", f"{one}/load", models.load,
            "Have a custom model in memory before it is asked.", LoadedModelView, long=True,
        ),
        NativeOperation(
            "unloadModel", "POST", f"{one}/unload", models.unload,
            "Let a custom model go once its last answer has ended.",
            LoadedModelView,
        ),
    ]  # fmt: skip


class _LoadedModels:
    def __init__(self, context: Context, pool: ModelPool) -> None:
        self.context, self.pool = context, pool

    def list_models(self, request: Request) -> LoadedModelsView:
        self.context.record(request, "ListLoadedModels", "*")
        loaded = {each.id: each for each in self.pool.loaded_models()}
        own = select(CustomModel).where(
            CustomModel.account == request.account,
            CustomModel.stored_id.in_([*loaded]),
        )
        with self.context.database.read() as session:
            found = list(session.scalars(own.order_by(CustomModel.seq)))
        order = {model_id: place for place, model_id in enumerate(loaded)}
        found.sort(key=lambda model: order.get(model.stored_id or "", len(order)))
        return LoadedModelsView(
            models=[self._view(each, loaded.get(each.stored_id or "")) for each in found]
        )

    def load(self, request: Request) -> LoadedModelView:
        model, stored_id = self._model(request, "LoadModel")
        with inference_faults():
            self.pool.load(stored_id)
        return self._current_view(model, stored_id)

    def unload(self, request: Request) -> LoadedModelView:
        model, stored_id = self._model(request, "UnloadModel")
        self.pool.unload(stored_id)
        return self._current_view(model, stored_id)

    def _model(self, request: Request, action: str) -> tuple[CustomModel, str]:
        """Return the account's model and its id in the store."""
        name = request.params["model"]
        base = find_foundation(self.context.arns, name)
        if base is not None:
            self.context.record_base(action, base)
            raise Fault(
                "Validation",
                f"{name} is a foundation model, which all accounts share. Name a custom model.",
                parameter="model",
            )
        with self.context.database.read() as session:
            model = self.context.asked_model(request, session, action, active=True)
        if model.stored_id is None:
            raise not_found("model", name)
        return model, model.stored_id

    def _current_view(self, model: CustomModel, stored_id: str) -> LoadedModelView:
        loaded = {each.id: each for each in self.pool.loaded_models()}
        return self._view(model, loaded.get(stored_id))

    def _view(self, model: CustomModel, loaded: LoadedModel | None) -> LoadedModelView:
        arn = model.arn(self.context.arns)
        guessed = None if loaded is None else loaded.speculation
        if loaded is None:
            return LoadedModelView(id=model.id, name=model.name, arn=arn, loaded=False)
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
            proposed_tokens=None if guessed is None else guessed.proposed,
            accepted_tokens=None if guessed is None else guessed.accepted,
        )
