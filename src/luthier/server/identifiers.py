"""What clients call things by (ARN, name, id), and what that names in their account.

What belongs to another account or stands in another region is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

from sqlalchemy import BindParameter, Select, and_, bindparam, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.server.bedrock.shapes import matches, operation_models
from luthier.server.http.messages import Fault
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import ACTIVE, NAME, RESERVED, CustomModel
from luthier.server.tables.database import Database, find_row
from luthier.server.tables.endpoints import CREATING, DEPLOYMENT, FAILED, PROVISIONED, Endpoint
from luthier.server.tables.foundation import FoundationModel, foundation_model
from luthier.server.tables.jobs import Job

_ENDPOINTS = {DEPLOYMENT: "deployment", PROVISIONED: "provisioned throughput"}
JOB, MODEL, FOUNDATION = "model-customization-job", "custom-model", "foundation-model"

Row = TypeVar("Row", Job, CustomModel, Endpoint)
Ts = TypeVarTuple("Ts")
Name = InstrumentedAttribute[Any]
"""A column with names or ids that are unique in an account."""
_MODEL_NAMES: Sequence[Name] = (
    CustomModel.id, CustomModel.openai_id, CustomModel.stored_id, CustomModel.name
)  # fmt: skip
"""A model may be called as another one's id: ids come first, its one on the command line, too."""


def job_arn(arns: Arns, job: Job) -> str:
    """Of a customization job."""
    return arns.job(job.account, job.foundation, job.id)


def endpoint_arn(arns: Arns, endpoint: Endpoint) -> str:
    """Of a deployment or provisioned throughput."""
    return arns.of(endpoint.account, endpoint.kind, endpoint.id)


def own(arns: Arns, account: str, kind: str, text: str) -> Arn | None:
    """The ARN ``text`` where it is one of this kind, region and account."""
    arn = Arn.parse(text)
    if arn is None or (arn.region, arn.account, arn.kind) != (arns.region, account, kind):
        return None
    return arn


def find_foundation(arns: Arns, identifier: str) -> FoundationModel | None:
    """A foundation model by id, alias or ARN."""
    if not identifier.startswith("arn:"):
        return foundation_model(identifier)
    arn = own(arns, "", FOUNDATION, identifier)
    return foundation_model(identifier) if arn else None


def find_job(
    session: Session, arns: Arns, account: str, identifier: str, *, lock: bool = False
) -> Job | None:
    """A customization job by ARN or name."""
    return _find(session, Job, job_arn, arns, account, JOB, identifier, [Job.name], lock)


def find_model(
    session: Session, arns: Arns, account: str, identifier: str, *, lock: bool = False
) -> CustomModel | None:
    """A custom model by ARN, id, ``ft:`` id or name: by any of them on each face.

    One of a job that has not ended is not there yet.
    """
    columns = _MODEL_NAMES
    found = _find(session, CustomModel, _model_arn, arns, account, MODEL, identifier, columns, lock)
    return found if found and found.status != RESERVED else None


def find_endpoint(
    session: Session, arns: Arns, account: str, kind: str, identifier: str, *, lock: bool = False
) -> Endpoint | None:
    """A deployment or provisioned throughput by ARN or name."""
    columns = [Endpoint.name]
    return _find(session, Endpoint, endpoint_arn, arns, account, kind, identifier, columns, lock)


def _model_arn(arns: Arns, model: CustomModel) -> str:
    return model.arn(arns)


def _find(
    session: Session,
    table: type[Row],
    arn_of: Callable[[Arns, Row], str],
    arns: Arns,
    account: str,
    kind: str,
    identifier: str,
    columns: Sequence[Name],
    lock: bool,
) -> Row | None:
    """The row with this ARN or this name. A name may look like the end of another one's ARN."""
    query = select(table).where(table.account == account)
    arn = None
    if identifier.startswith("arn:"):
        arn = own(arns, account, kind, identifier)
        if arn is None:
            return None
        query = query.where(table.id == arn.id)
    else:
        query = _where_named(query, columns, identifier)
    if table is Endpoint:
        query = query.where(Endpoint.kind == kind)
    found = find_row(session, query, lock=lock)
    # The foundation model that an ARN names has to be right, too.
    return None if found and arn and str(arn) != arn_of(arns, found) else found


def _where_named(query: Select[*Ts], columns: Sequence[Name], identifier: Any) -> Select[*Ts]:
    """Rows of ``query`` that are called so, by the first of ``columns`` before those by the next."""
    query = query.where(or_(*(column == identifier for column in columns)))
    # PostgreSQL has what a column without a value compares to, nothing, before true.
    return query.order_by(*((column == identifier).desc().nulls_last() for column in columns[:-1]))


@dataclass(frozen=True)
class Invocable:
    """A model that can be asked."""

    stored_id: str
    """Under which ``luthier.library.models.find`` opens it."""
    arn: str
    """Of what was called by ``modelId``."""
    model: str
    """ARN of the foundation model or custom model that answers."""


def invoked_arn(arns: Arns, model_id: str) -> str:
    """Return the ARN of a ``modelId`` for the audit log, without reading the database."""
    if model_id.startswith("arn:"):
        return model_id
    found = foundation_model(model_id)
    return arns.foundation_model(found.id if found else model_id)


_ACCOUNT: BindParameter[str] = bindparam("account")
_IDENTIFIER: BindParameter[str] = bindparam("identifier")
_OWN = select(
    CustomModel.id, CustomModel.foundation, CustomModel.status, CustomModel.stored_id
).where(CustomModel.account == _ACCOUNT)
_OWN_BY_ID = _OWN.where(CustomModel.id == _IDENTIFIER)
_OWN_BY_NAME = _where_named(_OWN, _MODEL_NAMES, _IDENTIFIER)
_ENDPOINT = (
    select(Endpoint.status, Endpoint.model, CustomModel.stored_id)
    .where(
        Endpoint.account == _ACCOUNT,
        Endpoint.kind == bindparam("kind"),
        Endpoint.id == _IDENTIFIER,
    )
    .outerjoin(
        CustomModel,
        and_(
            CustomModel.account == Endpoint.account,
            # The ARN of a custom model ends with the twelve letters of its id.
            CustomModel.id == func.substr(Endpoint.model, func.length(Endpoint.model) - 11),
        ),
    )
)


_ENDPOINT_NAMED = (
    select(Endpoint.kind, Endpoint.id)
    .where(Endpoint.account == _ACCOUNT, Endpoint.name == _IDENTIFIER)
    .order_by((Endpoint.kind == DEPLOYMENT).desc())
)


def resolve_name(database: Database, arns: Arns, account: str, identifier: str) -> str:
    """Return the ARN of the endpoint named ``identifier``, or ``identifier`` where there is none.

    A name means, in this order: a base model, a deployment, provisioned throughput, a custom model.
    A deployment comes before a custom model, so that a new model never takes over the requests of a
    deployment.
    """
    if not re.fullmatch(NAME, identifier) or foundation_model(identifier) is not None:
        return identifier
    found = database.first(_ENDPOINT_NAMED, account=account, identifier=identifier)
    return identifier if found is None else arns.of(account, found.kind, found.id)


def invocable_model(
    database: Database, arns: Arns, account: str, identifier: str
) -> Invocable | None:
    """The account's custom model as :func:`find_model` finds it, where it can be asked.

    Each request for a model comes here or to :func:`invocable`: one small query. What it finds is not
    remembered, as any server on this database may delete a model, or give its name to another one.
    """
    named = None
    if identifier.startswith("arn:"):
        named = own(arns, account, MODEL, identifier)
        if named is None:
            return None
        found = database.first(_OWN_BY_ID, account=account, identifier=named.id)
    else:
        found = database.first(_OWN_BY_NAME, account=account, identifier=identifier)
    if found is None or found.status != ACTIVE or found.stored_id is None:
        return None
    arn = arns.custom_model(account, found.foundation, found.id)
    return Invocable(found.stored_id, arn, arn) if named is None or arn == identifier else None


def invocable(database: Database, arns: Arns, account: str, model_id: str) -> Invocable:
    """Return the model behind ``modelId``: a foundation model, deployment or provisioned throughput.

    Deployments and provisioned throughput have an ARN and a name; see :func:`resolve_name`.

    Raises:
        Fault: ResourceNotFound for what is not there; Validation for a custom model by its own ARN,
            which has to be deployed, and for what is no identifier; ModelNotReady while its model is
            being made ready.
    """
    if not _well_formed(model_id):
        raise Fault("Validation", "The provided model identifier is invalid.", parameter="modelId")
    base = find_foundation(arns, model_id)
    if base is not None:
        arn = arns.foundation_model(base.id)
        return Invocable(base.base, arn, arn)
    model_id = resolve_name(database, arns, account, model_id)
    named = Arn.parse(model_id)
    if named is None or named.kind not in _ENDPOINTS:
        with database.read() as session:
            is_custom_model = find_model(session, arns, account, model_id) is not None
        if is_custom_model:
            raise Fault(
                "Validation",
                f"Invocation of model ID {model_id} with on-demand throughput isn’t supported. Retry "
                "your request with the ARN of a custom model deployment or of provisioned throughput "
                "that contains this model.",
            )
        raise _unknown(model_id)
    found = None
    if model_id == arns.of(account, named.kind, named.id):
        found = database.first(_ENDPOINT, account=account, kind=named.kind, identifier=named.id)
    if found is None:
        raise _unknown(model_id)
    text = _ENDPOINTS[named.kind]
    if found.status == CREATING:
        raise Fault("ModelNotReady", f"The {text} is being created. Try again in a moment.")
    if found.status == FAILED:
        raise Fault("Validation", f"The {text} is Failed and cannot answer.")
    base = foundation_model(found.model)
    stored_id = found.stored_id if base is None else base.base
    if stored_id is None:
        raise _unknown(model_id)
    return Invocable(stored_id, model_id, found.model)


def stored_id_of(session: Session, model: str) -> str | None:
    """Id in the store of a foundation model or custom model, by its ARN; of any account."""
    arn = Arn.parse(model)
    if arn is None:
        return None
    if arn.kind == FOUNDATION:
        base = foundation_model(model)
        return base.base if base else None
    query = select(CustomModel).filter_by(account=arn.account, id=arn.id)
    found = session.scalars(query).one_or_none()
    return found.stored_id if found else None


@dataclass(frozen=True)
class ModelIds:
    """What ``modelId`` means to the operations of the runtime."""

    database: Database
    arns: Arns

    def stored_id(self, account: str, model_id: str) -> str:
        """Id in the store of what answers to ``model_id``; see :func:`invocable`."""
        return invocable(self.database, self.arns, account, model_id).stored_id

    def resource(self, account: str, model_id: str) -> str:
        """Return the ARN for the audit log; see :func:`invoked_arn`."""
        named = resolve_name(self.database, self.arns, account, model_id)
        return invoked_arn(self.arns, named)


def _well_formed(model_id: str) -> bool:
    """By the shape of ``modelId`` in Converse; that of InvokeModel takes the same."""
    if model_id.startswith("arn:") and Arn.parse(model_id) is None:
        # The shape takes letters and colons in any order.
        return False
    shape = operation_models()["Converse"].input_shape.members["modelId"]
    longest = shape.metadata["max"]
    return 0 < len(model_id) <= longest and matches(shape, model_id)


def _unknown(model_id: str) -> Fault:
    return Fault("ResourceNotFound", f"Could not find the model {model_id}.")
