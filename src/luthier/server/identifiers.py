"""Resolution of client identifiers (ARN, name, id) to resources of the account.

Resources of other accounts and regions do not exist for a client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.server.bedrock.shapes import matches, operation_models
from luthier.server.http.messages import Fault
from luthier.server.routing import current_routing
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import ACTIVE, NAME, RESERVED, CustomModel
from luthier.server.tables.database import Database, find_row
from luthier.server.tables.endpoints import CREATING, DEPLOYMENT, FAILED, PROVISIONED, Endpoint
from luthier.server.tables.foundation import FoundationModel, foundation_model
from luthier.server.tables.jobs import Job

_ENDPOINTS = {DEPLOYMENT: "deployment", PROVISIONED: "provisioned throughput"}
JOB, MODEL, FOUNDATION = "model-customization-job", "custom-model", "foundation-model"

Row = TypeVar("Row", Job, CustomModel, Endpoint)
Name = InstrumentedAttribute[Any]
"""A column with unique values per account."""
_MODEL_NAMES: Sequence[Name] = (
    CustomModel.id, CustomModel.openai_id, CustomModel.stored_id, CustomModel.name
)  # fmt: skip
"""Columns in the order of the search: the name of a model may equal the id of another model."""


def job_arn(arns: Arns, job: Job) -> str:
    """Return the ARN of a customization job."""
    return arns.job(job.account, job.foundation, job.id)


def endpoint_arn(arns: Arns, endpoint: Endpoint) -> str:
    """Return the ARN of a deployment or provisioned throughput."""
    return arns.of(endpoint.account, endpoint.kind, endpoint.id)


def own(arns: Arns, account: str, kind: str, text: str) -> Arn | None:
    """Parse the ARN ``text``; return None unless kind, region and account match."""
    arn = Arn.parse(text)
    if arn is None or (arn.region, arn.account, arn.kind) != (arns.region, account, kind):
        return None
    return arn


def find_foundation(arns: Arns, identifier: str) -> FoundationModel | None:
    """Return a foundation model by id, alias or ARN."""
    if not identifier.startswith("arn:"):
        return foundation_model(identifier)
    arn = own(arns, "", FOUNDATION, identifier)
    return foundation_model(identifier) if arn else None


def find_job(
    session: Session, arns: Arns, account: str, identifier: str, *, lock: bool = False
) -> Job | None:
    """Return a customization job by ARN or name."""
    return _find(session, Job, job_arn, arns, account, JOB, identifier, [Job.name], lock)


def find_model(
    session: Session, arns: Arns, account: str, identifier: str, *, lock: bool = False
) -> CustomModel | None:
    """Return a custom model by ARN, id, ``ft:`` id or name, except models of unfinished jobs."""
    columns = _MODEL_NAMES
    model = _find(session, CustomModel, _model_arn, arns, account, MODEL, identifier, columns, lock)
    return model if model and model.status != RESERVED else None


def find_endpoint(
    session: Session, arns: Arns, account: str, kind: str, identifier: str, *, lock: bool = False
) -> Endpoint | None:
    """Return a deployment or provisioned throughput by ARN or name."""
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
    """Return the row with this ARN or name."""
    query = select(table).where(table.account == account)
    arn = None
    if identifier.startswith("arn:"):
        arn = own(arns, account, kind, identifier)
        if arn is None:
            return None
        query = query.where(table.id == arn.id)
    else:
        query = query.where(or_(*(column == identifier for column in columns)))
        # PostgreSQL sorts NULL (a comparison with an empty column) before true.
        order = ((column == identifier).desc().nulls_last() for column in columns[:-1])
        query = query.order_by(*order)
    if table is Endpoint:
        query = query.where(Endpoint.kind == kind)
    row = find_row(session, query, lock=lock)
    # The ARN contains the foundation model, which must match too.
    return None if row and arn and str(arn) != arn_of(arns, row) else row


@dataclass(frozen=True)
class Invocable:
    """A model that can be queried."""

    stored_id: str
    """Id of the model in the library."""
    arn: str
    """ARN of the resource in ``modelId``."""
    model: str
    """ARN of the foundation model or custom model."""


def invoked_arn(arns: Arns, model_id: str) -> str:
    """Return the ARN of a ``modelId`` for the audit log, without reading the database."""
    if model_id.startswith("arn:"):
        return model_id
    base = foundation_model(model_id)
    return arns.foundation_model(base.id if base else model_id)


def resolve_name(database: Database, arns: Arns, account: str, identifier: str) -> str:
    """Return the ARN of the endpoint named ``identifier``, or ``identifier`` if no endpoint has the
    name.

    Names are resolved in this order: base model, deployment, provisioned throughput, custom model.
    A deployment precedes custom models, so that a new model never receives a deployment's requests.
    """
    if not re.fullmatch(NAME, identifier) or foundation_model(identifier) is not None:
        return identifier
    named = select(Endpoint).where(Endpoint.account == account, Endpoint.name == identifier)
    with database.read() as session:
        endpoint = find_row(session, named.order_by((Endpoint.kind == DEPLOYMENT).desc()))
    return identifier if endpoint is None else endpoint_arn(arns, endpoint)


def invocable_model(
    database: Database, arns: Arns, account: str, identifier: str
) -> Invocable | None:
    """Return the account's active custom model by name; see :func:`find_model`.

    The result is not cached, because another server may delete the model or assign the name to
    another model.
    """
    with database.read() as session:
        model = find_model(session, arns, account, identifier)
    if model is None or model.status != ACTIVE or model.stored_id is None:
        return None
    arn = model.arn(arns)
    return Invocable(model.stored_id, arn, arn)


def invocable(database: Database, arns: Arns, account: str, model_id: str) -> Invocable:
    """Return the model of a ``modelId``: foundation model, deployment or provisioned throughput.

    Deployments and provisioned throughput have an ARN and a name; see :func:`resolve_name`.

    Raises:
        Fault: ResourceNotFound for an unknown model; Validation for a malformed identifier, and for
            the
            ARN of a custom model without deployment; ModelNotReady during creation.
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
    with database.read() as session:
        endpoint = find_endpoint(session, arns, account, named.kind, model_id)
        model = _answering(session, endpoint) if endpoint else ""
        stored_id = stored_id_of(session, model)
    if endpoint is None:
        raise _unknown(model_id)
    text = _ENDPOINTS[named.kind]
    if endpoint.status == CREATING:
        raise Fault("ModelNotReady", f"The {text} is being created. Try again in a moment.")
    if endpoint.status == FAILED:
        raise Fault("Validation", f"The {text} is Failed.")
    if stored_id is None:
        raise _unknown(model_id)
    return Invocable(stored_id, model_id, model)


def _answering(session: Session, endpoint: Endpoint) -> str:
    """Return the ARN of the model that answers the request: the serving model, or the canary."""
    routing, canary, share = current_routing(), endpoint.next_model, endpoint.canary_share
    if routing is None or canary is None or share is None:
        return endpoint.model
    model = canary if routing.choose(endpoint.id, canary, share) else endpoint.model
    routing.model = model_name(session, model)
    return model


def model_name(session: Session, arn: str) -> str:
    """Return the name of a custom model by ARN; the ARN of a deleted model or foundation model."""
    parsed = Arn.parse(arn)
    query = select(CustomModel.name).where(CustomModel.id == (parsed.id if parsed else ""))
    return session.scalar(query) or arn


def stored_id_of(session: Session, model: str) -> str | None:
    """Return the library id of a foundation model or custom model, of any account, by ARN."""
    arn = Arn.parse(model)
    if arn is None:
        return None
    if arn.kind == FOUNDATION:
        base = foundation_model(model)
        return base.base if base else None
    query = select(CustomModel).filter_by(account=arn.account, id=arn.id)
    custom = session.scalars(query).one_or_none()
    return custom.stored_id if custom else None


@dataclass(frozen=True)
class ModelIds:
    """Models that an account can name: base models, own models and endpoints."""

    database: Database
    arns: Arns

    def base(self, account: str, name: str) -> FoundationModel | CustomModel | None:
        """Return a base model by alias, id or ARN, or an active model of the account by any name."""
        base = find_foundation(self.arns, name)
        if base is not None:
            return base
        with self.database.read() as session:
            model = find_model(session, self.arns, account, name)
        return model if model is not None and model.status == ACTIVE else None

    def target(self, account: str, name: str) -> Invocable | None:
        """Return the base model, endpoint or custom model with the name ``name``, or None.

        Unlike in :func:`invocable`, a custom model needs no deployment.

        Raises:
            Fault: ``ModelNotReady`` for an endpoint in creation.
        """
        name = resolve_name(self.database, self.arns, account, name)
        if find_foundation(self.arns, name) is None:
            model = invocable_model(self.database, self.arns, account, name)
            if model is not None:
                return model
        try:
            return invocable(self.database, self.arns, account, name)
        except Fault as fault:
            if fault.code in ("ResourceNotFound", "Validation"):
                return None
            raise

    def stored_id(self, account: str, model_id: str) -> str:
        """Return the library id of ``model_id``; see :func:`invocable`."""
        return invocable(self.database, self.arns, account, model_id).stored_id

    def resource(self, account: str, model_id: str) -> str:
        """Return the ARN for the audit log; see :func:`invoked_arn`."""
        named = resolve_name(self.database, self.arns, account, model_id)
        return invoked_arn(self.arns, named)


def _well_formed(model_id: str) -> bool:
    """Return True if ``model_id`` matches the shape of ``modelId`` in Converse."""
    if model_id.startswith("arn:") and Arn.parse(model_id) is None:
        # The shape accepts letters and colons in any order.
        return False
    shape = operation_models()["Converse"].input_shape.members["modelId"]
    longest = shape.metadata["max"]
    return 0 < len(model_id) <= longest and matches(shape, model_id)


def _unknown(model_id: str) -> Fault:
    return Fault("ResourceNotFound", f"Could not find the model {model_id}.")
