"""What the operations of the native face work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.api.native.operations import Request
from luthier.api.policies import refuse_denied
from luthier.api.wire import Authorize, Fault
from luthier.limits import AccountQuotas
from luthier.store.arns import Arn, Arns
from luthier.store.custom_models import ACTIVE, RESERVED, CustomModel
from luthier.store.database import Database
from luthier.store.foundation import FoundationModel, foundation_model
from luthier.store.locations import Locations

_SAME = {
    "CreateJob": "CreateModelCustomizationJob",
    "GetJob": "GetModelCustomizationJob",
    "StopJob": "StopModelCustomizationJob",
    "PauseJob": "StopModelCustomizationJob",
    "ListJobs": "ListModelCustomizationJobs",
    "GetModel": "GetCustomModel",
    "ListModels": "ListCustomModels",
}
"""Operations of Bedrock that come to the same: who is denied those is denied these."""


@dataclass(frozen=True)
class Context:
    """The service, as one face sees it."""

    database: Database
    arns: Arns
    locations: Locations
    authorize: Authorize
    limits: Callable[[str], AccountQuotas]
    """The quota of an account."""
    wake: Callable[[], None]
    """Tells the scheduler that there is something to do."""

    def allow(self, request: Request, action: str, path: str, shown: str | None = None) -> None:
        """Refuse a caller who may not; ``path`` is the end of an ARN, or ``*`` for everything.

        A refusal names ``shown``, the end as the caller wrote it: who asked by a name learns no id.
        """
        resource = self._resource(request, path)
        try:
            self.authorize(request.call.caller, f"luthier:{action}", resource)
            if action in _SAME:
                refuse_denied(request.call.caller, f"bedrock:{_SAME[action]}", resource)
        except Fault as fault:
            told = fault.message.replace(resource, self._resource(request, shown or path))
            raise Fault(fault.code, told) from None

    def _resource(self, request: Request, path: str) -> str:
        kind, _, rest = path.partition("/")
        return path if path == "*" else self.arns.of(request.account, kind, rest)

    def base(
        self, session: Session, account: str, identifier: str
    ) -> FoundationModel | CustomModel:
        """The foundation model, or the account's custom model, of an id, alias, name or ARN."""
        found = foundation_model(identifier)
        return found or self.custom(session, account, identifier, active=True)

    def custom(
        self, session: Session, account: str, identifier: str, active: bool = False
    ) -> CustomModel:
        """The account's custom model of this name, id or ARN."""
        arn = Arn.parse(identifier)
        wanted = select(CustomModel).where(CustomModel.account == account)
        if arn is None:
            wanted = wanted.where((CustomModel.name == identifier) | (CustomModel.id == identifier))
        elif (arn.account, arn.region, arn.kind) == (account, self.arns.region, "custom-model"):
            wanted = wanted.where(CustomModel.id == arn.id)
        else:
            wanted = wanted.where(CustomModel.id == "")
        model = session.scalars(wanted.where(CustomModel.status != RESERVED)).first()
        if model is None or (active and model.status != ACTIVE):
            raise Fault("ResourceNotFound", f"There is no model {identifier!r}.")
        return model
