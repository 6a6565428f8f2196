"""``/models``, and which model a name of a request means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import select

from luthier.api.http.messages import Fault, Request, Response
from luthier.api.http.routing import Operation
from luthier.api.openai.protocol import Access, model_not_found, page, seconds
from luthier.store.arns import Arn, Arns
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import Database
from luthier.store.foundation import FoundationModel, foundation_model, foundation_models

OWNER = "luthier"


class Resolved(Protocol):
    """A model that answers."""

    @property
    def stored_id(self) -> str:
        """Id under which the pool opens it."""

    @property
    def arn(self) -> str:
        """What policies are asked about."""


Resolve = Callable[[str, str], Resolved | None]
"""Given an account and an ARN, what answers there: a deployment, a profile; ``None`` for nothing."""
DeleteModel = Callable[[str, CustomModel], None]
"""Deletes an account's custom model with all that belongs to it.

Raises:
    WrongState: where it is deployed or provisioned, or a job starts from it.
"""


@dataclass(frozen=True)
class Target:
    """A model that answers to a name."""

    stored_id: str
    arn: str


class Catalogue:
    """The models that an account can name: base models, its own ones, and what it deployed."""

    def __init__(self, database: Database, arns: Arns, resolve: Resolve) -> None:
        self.database, self.arns, self._resolve = database, arns, resolve

    def target(self, account: str, name: str) -> Resolved | None:
        """What answers to ``name``; ``None`` where nothing does."""
        found = self.find(account, name)
        if isinstance(found, FoundationModel):
            return Target(found.base, self.arns.foundation_model(found.id))
        if found is not None and found.stored_id is not None:
            return Target(found.stored_id, found.arn(self.arns))
        return self._resolve(account, name) if name.startswith("arn:") else None

    def find(self, account: str, name: str) -> FoundationModel | CustomModel | None:
        """The base model of this alias or id, or the account's own by its ``ft:`` id."""
        if name.startswith("arn:") and ":foundation-model/" not in name:
            return None
        base = foundation_model(name)
        if base is not None:
            return base
        mine = select(CustomModel).where(
            CustomModel.account == account,
            CustomModel.status == ACTIVE,
            CustomModel.openai_id == name,
        )
        with self.database.read() as session:
            return session.scalar(mine)

    def base(self, account: str, name: str) -> FoundationModel | CustomModel:
        """What a fine-tuning job starts from.

        Raises:
            Fault: 404 ``model_not_found``.
        """
        arn = Arn.parse(name)
        if arn is not None and arn.kind == "custom-model" and arn.account == account:
            query = select(CustomModel).where(
                CustomModel.account == account,
                CustomModel.id == arn.id,
                CustomModel.status == ACTIVE,
            )
            with self.database.read() as session:
                found: FoundationModel | CustomModel | None = session.scalar(query)
        else:
            found = self.find(account, name)
        if found is None:
            raise model_not_found(name)
        return found

    def own(self, account: str) -> list[CustomModel]:
        """The account's models that answer to an ``ft:`` id, the oldest first."""
        mine = select(CustomModel).where(
            CustomModel.account == account,
            CustomModel.status == ACTIVE,
            CustomModel.openai_id.is_not(None),
        )
        with self.database.read() as session:
            return list(session.scalars(mine.order_by(CustomModel.seq)))


class Models:
    """The resource."""

    def __init__(self, catalogue: Catalogue, access: Access, delete_model: DeleteModel) -> None:
        self.catalogue, self.access, self._delete = catalogue, access, delete_model

    def operations(self) -> Iterable[Operation]:
        """What can be done with models."""
        return (
            Operation("models.list", "GET", "models", self.list),
            Operation("models.retrieve", "GET", "models/{model}", self.retrieve),
            Operation("models.delete", "DELETE", "models/{model}", self.delete),
        )

    def list(self, request: Request) -> Response:
        """Every base model by its alias, and the account's own."""
        self.access.to(request, "models.list")
        named: list[tuple[FoundationModel | CustomModel, str]]
        named = [(each, each.base) for each in foundation_models()]
        for model in self.catalogue.own(request.caller.account):
            named.append((model, model.openai_id or model.name))
        return page(named, len(named), lambda each: model_object(*each))

    def retrieve(self, request: Request) -> Response:
        """One of them, by any of its names."""
        name = request.params["model"]
        self.access.to(request, "models.retrieve", "model", name)
        found = self.catalogue.find(request.caller.account, name)
        if found is None:
            raise model_not_found(name)
        return Response.json(model_object(found, name))

    def delete(self, request: Request) -> Response:
        """Delete an own model; base models belong to everybody."""
        name = request.params["model"]
        self.access.to(request, "models.delete", "model", name)
        found = self.catalogue.find(request.caller.account, name)
        if found is None:
            raise model_not_found(name)
        if isinstance(found, FoundationModel):
            raise Fault("AccessDenied", f"The base model `{name}` cannot be deleted.")
        self.access.same_as(request, "DeleteCustomModel", found.arn(self.catalogue.arns))
        self._delete(request.caller.account, found)
        return Response.json({"id": name, "object": "model", "deleted": True})


def model_object(model: FoundationModel | CustomModel, name: str) -> dict[str, Any]:
    """A model as clients see it; those of the catalogue were made before all time."""
    owner = OWNER if isinstance(model, FoundationModel) else f"org-{model.account}"
    return {
        "id": name,
        "object": "model",
        "created": seconds(model.created) or 0,
        "owned_by": owner,
    }
