"""Models of the native API, with lineage and certificates."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import Query, Response
from pydantic import Field
from sqlalchemy import select

from luthier.engine.metrics import SHARES
from luthier.errors import LuthierError
from luthier.evaluation.significance import LESS_IS_BETTER
from luthier.library.folders import is_base_here
from luthier.models.catalog import CATALOG
from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.identifiers import find_foundation, find_model
from luthier.server.live.health import Health, NoRequests, health
from luthier.server.live.rows import parse_since
from luthier.server.native.jobs import JobView, view_job
from luthier.server.native.model_operations import (
    Abilities,
    abilities_of,
    abilities_of_base,
    listed_facts,
)
from luthier.server.native.operations import (
    Input,
    NativeCall,
    Page,
    View,
    limit_concurrency,
    native_router,
)
from luthier.server.retraining import draft
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import RESERVED, CustomModel
from luthier.server.tables.database import page_of
from luthier.server.tables.foundation import FoundationModel, foundation_models, kind_of
from luthier.server.tables.live.alerts import Alert
from luthier.server.watch import health_with_drift

router = native_router()
_free = threading.BoundedSemaphore(1)
_BUSY = "The server already tests for drift or prepares a retraining. Try again in a minute."


class BaseFacts(View):
    """Facts about a base model of the catalogue."""

    parameters: int
    licence: str
    languages: list[str]
    """ISO 639-1 codes of the training languages."""
    context: int
    """Longest input in tokens."""
    download_bytes: int
    memory_bytes: int
    """Memory of the weights in 32 bits."""
    here: bool
    """True if the files are on this server; other base models are fetched on demand."""


class ModelView(View):
    """A foundation model or custom model."""

    id: str
    """``provider.name`` for a foundation model, or the last part of a custom model's ARN."""
    name: str
    arn: str
    kind: str
    """``foundation`` or ``custom``."""
    status: str
    base: str | None = None
    """ARN of the base model of a custom model; missing for imported full models."""
    suffix: str | None = None
    """Suffix in the request of an OpenAI client."""
    job: str | None = None
    """Id of the job that trained the model; missing for imported models."""
    source: str | None = None
    """Source address of an imported model."""
    failure: str | None = None
    """Error of a failed import."""
    created: datetime | None = None
    base_kind: str
    """Kind of the foundation model: ``causal_lm`` generates text, ``encoder`` encodes text, and
    other kinds."""
    writes: bool
    """True if the model generates text. If the files are on another server, the base model's kind
    decides."""
    measure: str | None = None
    """Name of the score of a custom model."""
    score: float | None = None
    """Score of a custom model on the held-out rows of its training."""
    score_rows: int | None = None
    """Number of these rows. Other models have other rows."""
    bytes: int | None = None
    """Size of a custom model's own files."""
    facts: BaseFacts | None = None
    """Missing for custom models and pre-trained models."""
    abilities: Abilities | None = None
    """Supported operations. Missing in lists, and if the model's files or package are not on this
    server."""


class ModelsView(View):
    """Foundation models on the first page, and the account's models, newest first."""

    models: list[ModelView]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class DeletedModelView(View):
    """Response to the deletion of a model."""

    model: str
    """ARN of the model."""


class CertificateView(View):
    """Certificate and lineage of a custom model."""

    model: str
    certificate: dict[str, Any]
    """Content of ``certificate.json``: record, lineage, curves, operations, energy, reports."""
    lineage: list[str]
    """ARNs from this model to the foundation model."""
    shares: list[str]
    """Names of metrics with values from 0 to 1, for display as percent."""
    lower_is_better: list[str]
    """Names of metrics with lower values being better."""


class HealthQuery(Input):
    """Range of captured requests."""

    since: str = Field(default="30d", max_length=64)
    """Age of the oldest request (``30d``, ``12h``), or an ISO date."""
    answers: bool = True
    """Read the answers for shares of labels and of empty answers, which takes seconds."""
    drift: bool = False
    """Compare the inputs of the last 7 days with the training rows, which takes seconds."""


class RetrainRequest(Input):
    """New rows and base of a retraining."""

    base: str | None = Field(default=None, min_length=1, max_length=2048)
    """Base model: id, alias, name or ARN; by default the base of the model."""
    since: str = Field(default="30d", max_length=64)
    """Age of the oldest request (``30d``, ``12h``), or an ISO date."""


class AlertsPage(Page):
    """Filter and page of alerts."""

    subject: str | None = Field(default=None, max_length=2048)
    """Name of a model or deployment; all by default."""


class AlertView(View):
    """An alert about a deployed model."""

    kind: str
    """``health``, ``drift``, ``rollback``, ``evaluation`` or ``retraining``."""
    subject: str
    """Name of the model or deployment."""
    text: str
    created: datetime


class AlertsView(View):
    """Alerts, newest first."""

    alerts: list[AlertView]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


@router.get("/alerts")
def list_alerts(call: NativeCall, page: Annotated[AlertsPage, Query()]) -> AlertsView:
    """List alerts about deployed models, newest first."""
    query = select(Alert).where(Alert.account == call.account)
    if page.subject is not None:
        query = query.where(Alert.subject == page.subject)
    with call.context.database.read() as session:
        rows = page_of(session, query, Alert.seq, limit=page.limit + 1, position=page.position)
    views = [
        AlertView(kind=each.kind, subject=each.subject, text=each.text, created=each.created)
        for each in rows[: page.limit]
    ]
    return AlertsView(alerts=views, next=page.next(rows))


@router.get("/models")
def list_models(call: NativeCall, page: Annotated[Page, Query()]) -> ModelsView:
    """List foundation models and the account's own models, of which ``limit`` are on a page."""
    own = select(CustomModel).where(
        CustomModel.account == call.account, CustomModel.status != RESERVED
    )
    with call.context.database.read() as session:
        rows = page_of(session, own, CustomModel.seq, limit=page.limit + 1, position=page.position)
    arns = call.context.arns
    first = foundation_models() if page.position is None else ()
    views = [_foundation(arns, each) for each in first]
    views += [_custom(arns, each) for each in rows[: page.limit]]
    return ModelsView(models=views, next=page.next(rows))


@router.get("/models/{model}")
def get_model(call: NativeCall, model: Name) -> ModelView:
    """Return a model by id, name or ARN."""
    arns = call.context.arns
    with call.context.database.read() as session:
        row = find_foundation(arns, model) or call.model(session, model)
    if isinstance(row, FoundationModel):
        view = _foundation(arns, row)
    else:
        view = _custom(arns, row)
    return view.model_copy(update={"abilities": _abilities(row)})


@router.delete("/models/{model}")
def delete_model(call: NativeCall, model: Name) -> DeletedModelView:
    """Delete a custom model. The model must not be deployed or the base of a running job."""
    with call.context.database.read() as session:
        row = call.model(session, model)
    call.context.delete_model(row)
    return DeletedModelView(model=row.arn(call.context.arns))


@router.get("/models/{model}/health")
def get_model_health(
    call: NativeCall, model: Name, query: Annotated[HealthQuery, Query()]
) -> Health:
    """Return the health of a model, from captured requests and feedback."""
    capture = call.context.capture
    capture.flush()  # requests may be younger than the last write
    try:
        since = parse_since(query.since)
        if query.drift:
            context = call.context
            with limit_concurrency(_free, _BUSY, 30):
                return health_with_drift(
                    context.locations, context.arns, call.account, model, since
                )
        return health(capture.objects, call.account, model, since, answers=query.answers)
    except NoRequests as error:
        raise Fault("ResourceNotFound", error.text, parameter="model") from error


@router.post("/models/{model}/retrain", status_code=201)
def retrain_model(call: NativeCall, model: Name, body: RetrainRequest) -> JobView:
    """Prepare a retraining on the model's rows and on new rows from captured requests.

    The job is a draft in the state ``Paused``. ``resumeJob`` starts the training.
    """
    context = call.context
    context.capture.flush()  # requests may be younger than the last write
    since, quotas = parse_since(body.since), context.quotas(call.account)
    try:
        with limit_concurrency(_free, _BUSY, 30):
            job = draft(
                context.locations, context.arns, call.account, model, since, body.base, quotas
            )
    except NoRequests as error:
        raise Fault("ResourceNotFound", error.text, parameter="model") from error
    call.record_created(f"model-customization-job/{job.foundation}/{job.id}")
    return view_job(job)


@router.get("/models/{model}/certificate")
def get_certificate(call: NativeCall, model: Name) -> CertificateView:
    """Return the certificate and the lineage of a custom model."""
    lineage: list[str] = []
    with call.context.database.read() as session:
        row = below = call.model(session, model)
        lineage.append(below.arn(call.context.arns))
        # An imported full model has no base model.
        while below.base_model:
            lineage.append(below.base_model)
            if ":custom-model/" not in lineage[-1]:
                break
            parent = find_model(session, call.context.arns, call.account, lineage[-1])
            if parent is None:
                break  # deleted, only the ARN is known
            below = parent
    return CertificateView(
        model=lineage[0],
        certificate=json.loads(_certificate_text(row)),
        lineage=lineage,
        shares=sorted(SHARES),
        lower_is_better=sorted(LESS_IS_BETTER),
    )


@router.get("/models/{model}/certificate.json")
def download_certificate(call: NativeCall, model: Name) -> Response:
    """Download a custom model's certificate.json for `luthier models verify`."""
    with call.context.database.read() as session:
        row = call.model(session, model)
    # The hash covers the exact bytes; a JavaScript client would write 32.0 as 32.
    headers = {"Content-Disposition": 'attachment; filename="certificate.json"'}
    text = _certificate_text(row).encode("utf-8", "replace")
    return Response(text, headers=headers, media_type="application/json")


def _foundation(arns: Arns, model: FoundationModel) -> ModelView:
    return ModelView(
        id=model.id,
        name=model.base,
        arn=arns.foundation_model(model.id),
        kind="foundation",
        status="ACTIVE",
        created=model.created,
        base_kind=model.kind,
        writes=listed_facts(model).writes,
        facts=_facts(model.base),
    )


def _facts(base: str) -> BaseFacts | None:
    entry = CATALOG.get(base)
    if entry is None:
        return None
    return BaseFacts(
        parameters=entry.parameters, licence=entry.licence, languages=list(entry.languages),
        context=entry.context, download_bytes=entry.download_bytes,
        memory_bytes=4 * entry.parameters, here=is_base_here(base),
    )  # fmt: skip


def _custom(arns: Arns, model: CustomModel) -> ModelView:
    sent = model.details.get("request", {}).get("modelSourceConfig", {})
    source: str | None = sent.get("s3DataSource", {}).get("s3Uri")
    return ModelView(
        id=model.id,
        name=model.name,
        arn=model.arn(arns),
        kind="custom",
        status=model.status,
        base=model.base_model or None,
        # ft:<base>:<organization>:<suffix>:<id>
        suffix=(model.openai_id or "::::").split(":")[3] or None,
        job=model.job_id,
        source=source,
        failure=model.failure,
        created=model.created,
        base_kind=kind_of(model),
        bytes=model.stored_bytes,
        **asdict(listed_facts(model)),
    )


def _certificate_text(model: CustomModel) -> str:
    from luthier.library.models import find
    from luthier.workflows.certificate.certificate import read_certificate

    if model.stored_id is None:
        raise Fault("Conflict", f"The model {model.name} is {model.status} and has no certificate.")
    return read_certificate(find(model.stored_id)).text()


def _abilities(model: FoundationModel | CustomModel) -> Abilities | None:
    from luthier.library.models import find

    try:
        if isinstance(model, FoundationModel):
            return abilities_of_base(model.base)
        return None if model.stored_id is None else abilities_of(find(model.stored_id))
    except (LuthierError, OSError):
        return None  # files on another server, damaged files, or a missing package
