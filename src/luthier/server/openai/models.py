"""``/models``, and which model a name of a request means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import select

from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routing import Operation
from luthier.server.identifiers import (
    Invocable,
    find_foundation,
    find_model,
    invocable,
    invocable_model,
    resolve_name,
)
from luthier.server.openai.protocol import Recorder, model_not_found, page, seconds
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import FoundationModel, foundation_models

OWNER = "luthier"


DeleteModel = Callable[[CustomModel], None]
"""Deletes a custom model with all that belongs to it.

Raises:
    WrongState: where it is deployed or provisioned, or a job starts from it.
"""


class Catalogue:
    """The models that an account can name: base models, its own ones, and what it deployed."""

    def __init__(self, database: Database, arns: Arns) -> None:
        self.database, self.arns = database, arns

    def target(self, account: str, name: str) -> Invocable | None:
        """What answers to ``name``; ``None`` where nothing does.

        Raises:
            Fault: ModelNotReady, where an endpoint of this ARN is being made ready.
        """
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

    def resolve(self, account: str, name: str) -> str:
        """Return the ARN of the deployment with this name; ``name`` where there is none."""
        return resolve_name(self.database, self.arns, account, name)

    def find(self, account: str, name: str) -> FoundationModel | CustomModel | None:
        """The base model of this alias, id or ARN; or the account's own by any of its names."""
        base = find_foundation(self.arns, name)
        if base is not None:
            return base
        with self.database.read() as session:
            found = find_model(session, self.arns, account, name)
        return found if found is not None and found.status == ACTIVE else None

    def base(self, account: str, name: str) -> FoundationModel | CustomModel:
        """What a fine-tuning job starts from.

        Raises:
            Fault: 404 ``model_not_found``.
        """
        found = self.find(account, name)
        if found is None:
            raise model_not_found(name)
        return found

    def own(self, account: str) -> list[CustomModel]:
        """The account's models, the oldest first."""
        mine = select(CustomModel).where(
            CustomModel.account == account, CustomModel.status == ACTIVE
        )
        with self.database.read() as session:
            return list(session.scalars(mine.order_by(CustomModel.seq)))

    def id_of(self, model: CustomModel, bases: Iterable[FoundationModel]) -> str:
        """What an own model is called: its ``ft:`` id, or its name at Bedrock's face.

        Its ARN, where one of the ``bases`` answers to that name.
        """
        if model.openai_id is not None:
            return model.openai_id
        taken = any(model.name in (base.base, base.id) for base in bases)
        return model.arn(self.arns) if taken else model.name


class Models:
    """The resource."""

    def __init__(self, catalogue: Catalogue, recorder: Recorder, delete_model: DeleteModel) -> None:
        self.catalogue, self.recorder, self._delete = catalogue, recorder, delete_model

    def operations(self) -> Iterable[Operation]:
        """What can be done with models."""
        return (
            Operation("models.list", "GET", "models", self.list),
            Operation("models.retrieve", "GET", "models/{model}", self.retrieve),
            Operation("models.delete", "DELETE", "models/{model}", self.delete),
        )

    def list(self, request: Request) -> Response:
        """Every base model by its alias, and the account's own."""
        self.recorder.record(request, "models.list")
        named: list[tuple[FoundationModel | CustomModel, str]]
        bases = foundation_models()
        named = [(each, each.base) for each in bases]
        for model in self.catalogue.own(request.caller.account):
            named.append((model, self.catalogue.id_of(model, bases)))
        return page(named, len(named), lambda each: model_object(*each))

    def retrieve(self, request: Request) -> Response:
        """One of them, by any of its names."""
        found = self._find(request, "models.retrieve")
        return Response.json(model_object(found, request.params["model"]))

    def delete(self, request: Request) -> Response:
        """Delete an own model; base models belong to everybody."""
        name, found = request.params["model"], self._find(request, "models.delete")
        if isinstance(found, FoundationModel):
            raise Fault("AccessDenied", f"The base model `{name}` cannot be deleted.")
        self._delete(found)
        return Response.json({"id": name, "object": "model", "deleted": True})

    def _find(self, request: Request, action: str) -> FoundationModel | CustomModel:
        """Return the model that the path names, and record it for the audit log."""
        name = request.params["model"]
        self.recorder.record(request, action, "model", name)
        found = self.catalogue.find(request.caller.account, name)
        if found is None:
            raise model_not_found(name)
        return found


def model_object(model: FoundationModel | CustomModel, name: str) -> dict[str, Any]:
    """A model as clients see it; those of the catalogue were made before all time."""
    owner = OWNER if isinstance(model, FoundationModel) else f"org-{model.account}"
    return {
        "id": name,
        "object": "model",
        "created": seconds(model.created) or 0,
        "owned_by": owner,
    }
