"""Models in the server's memory, on the native face: an account loads, unloads and pins its own.

Foundation models belong to all accounts, and no account says how long they stay: an adapter that is
pinned keeps the one that it stands on.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select

from luthier.api.http.messages import Fault, Request, inference_faults
from luthier.api.identifiers import find_foundation
from luthier.api.native.operations import Context, NativeOperation, View, not_found
from luthier.serving.pool import LoadedModel, ModelPool
from luthier.store.custom_models import CustomModel


class LoadedModelView(View):
    """A custom model, as it stands in the memory of this server."""

    id: str
    name: str
    arn: str
    loaded: bool
    pinned: bool
    """Whether it stays, whoever needs room; servers that start load it again."""
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
    """The account's models in memory, the longest unused first; then those that are pinned and not
    there."""

    models: list[LoadedModelView]


def operations(context: Context, pool: ModelPool) -> list[NativeOperation]:
    """Everything about models in memory."""
    models, one = _LoadedModels(context, pool), "/api/v1/models/{model}"
    return [
        NativeOperation(
            "listLoadedModels", "GET", "/api/v1/loaded-models", models.list_models,
            "The account's models in the memory of this server, and those that are pinned.",
            LoadedModelsView,
        ),
        NativeOperation(
            "loadModel", "POST", f"{one}/load", models.load,
            "Have a custom model in memory before it is asked.", LoadedModelView, long=True,
        ),
        NativeOperation(
            "unloadModel", "POST", f"{one}/unload", models.unload,
            "Let a custom model go once its last answer has ended; a pinned one is a conflict.",
            LoadedModelView,
        ),
        NativeOperation(
            "pinModel", "POST", f"{one}/pin", models.pin,
            "Load a custom model and keep it, whoever needs room.", LoadedModelView, long=True,
        ),
        NativeOperation(
            "unpinModel", "POST", f"{one}/unpin", models.unpin,
            "Let a pinned model go again when others need the room.", LoadedModelView,
        ),
    ]  # fmt: skip


class _LoadedModels:
    def __init__(self, context: Context, pool: ModelPool) -> None:
        self.context, self.pool = context, pool

    def list_models(self, request: Request) -> LoadedModelsView:
        self.context.record(request, "ListLoadedModels", "*")
        self._refresh_pins()
        loaded = {each.id: each for each in self.pool.loaded_models()}
        own = select(CustomModel).where(
            CustomModel.account == request.account,
            CustomModel.pinned | CustomModel.stored_id.in_([*loaded]),
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

    def pin(self, request: Request) -> LoadedModelView:
        model, stored_id = self._model(request, "PinModel")
        self._refresh_pins()
        # Before it is pinned here: else another request's look at the rows would unpin it.
        pinned = self._write_pinned(model, True)
        try:
            with inference_faults():
                self.pool.pin(stored_id, request.account)
        except BaseException:
            if not model.pinned:
                self._write_pinned(model, False)
            raise
        return self._current_view(pinned, stored_id)

    def unpin(self, request: Request) -> LoadedModelView:
        model, stored_id = self._model(request, "UnpinModel")
        self.pool.unpin(stored_id)
        return self._current_view(self._write_pinned(model, False), stored_id)

    def _refresh_pins(self) -> None:
        """Forget pins of models that another server has unpinned or deleted."""
        with self.context.database.read() as session:
            pinned = session.scalars(select(CustomModel.stored_id).where(CustomModel.pinned))
            self.pool.keep_pins({each for each in pinned if each is not None})

    def _model(self, request: Request, action: str) -> tuple[CustomModel, str]:
        """Return the account's model and its id in the store."""
        name = request.params["model"]
        base = find_foundation(self.context.arns, name)
        if base is not None:
            self.context.record_base(action, base)
            raise Fault(
                "Validation",
                f"{name} is a foundation model, which all accounts share. Name a custom model; while "
                "it is pinned its base stays in memory, too.",
                parameter="model",
            )
        with self.context.database.read() as session:
            model = self.context.asked_model(request, session, action, active=True)
        if model.stored_id is None:
            raise not_found("model", name)
        return model, model.stored_id

    def _write_pinned(self, model: CustomModel, pinned: bool) -> CustomModel:
        """Note it for servers that start; as the row is now."""
        with self.context.database.write() as session:
            found = session.get(CustomModel, model.seq, with_for_update=True)
            if found is not None:
                found.pinned = pinned
        if found is None:  # deleted meanwhile, by another server perhaps
            self.pool.forget(model.stored_id or "")
            raise not_found("model", model.name)
        return found

    def _current_view(self, model: CustomModel, stored_id: str) -> LoadedModelView:
        loaded = {each.id: each for each in self.pool.loaded_models()}
        return self._view(model, loaded.get(stored_id))

    def _view(self, model: CustomModel, loaded: LoadedModel | None) -> LoadedModelView:
        arn = model.arn(self.context.arns)
        guessed = None if loaded is None else loaded.speculation
        if loaded is None:
            return LoadedModelView(
                id=model.id, name=model.name, arn=arn, loaded=False, pinned=model.pinned
            )
        return LoadedModelView(
            id=model.id,
            name=model.name,
            arn=arn,
            loaded=True,
            pinned=loaded.pinned,
            base=None if loaded.base is None else model.base_model,
            memory_bytes=loaded.bytes,
            loaded_at=loaded.loaded,
            last_used=loaded.last_used,
            requests=loaded.requests,
            proposed_tokens=None if guessed is None else guessed.proposed,
            accepted_tokens=None if guessed is None else guessed.accepted,
        )
