"""Models of the native face: what there is, where each came from, and what is certified of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import select

from luthier.engine.metrics import SHARES
from luthier.errors import LuthierError
from luthier.evaluation.significance import LESS_IS_BETTER
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.identifiers import find_foundation
from luthier.server.native.model_operations import (
    Ability,
    Reads,
    abilities_of,
    abilities_of_base,
    writes,
)
from luthier.server.native.operations import Context, NativeOperation, View
from luthier.server.tables.custom_models import RESERVED, CustomModel
from luthier.server.tables.foundation import FoundationModel, foundation_models, kind_of


class AbilitiesView(View):
    """What a model can be asked for."""

    method: str
    """The objective it was trained with; of a foundation model that by which it answers."""
    does: list[Ability]
    """``write`` answers chats; ``predict`` and ``embed`` answer ``predictions``; ``make_images`` and
    ``reconstruct`` are operations of their own. Empty where it is only a start for training."""
    reads: list[Reads]
    labels: list[str]
    """Classes that new images can be asked for."""
    reads_prompts: bool
    """Whether it makes images of what a text says."""


class ModelView(View):
    """One model."""

    id: str
    """Of a foundation model ``provider.name``; of a custom model the end of its ARN."""
    name: str
    arn: str
    kind: str
    """``foundation`` or ``custom``."""
    status: str
    base: str | None = None
    """ARN of what a custom model was trained from; none of a whole network from outside."""
    job: str | None = None
    """Id of the job that made it; none of a model from outside."""
    source: str | None = None
    """Address that a model from outside was copied from."""
    failure: str | None = None
    """Why a model from outside was not taken."""
    created: datetime | None = None
    base_kind: str
    """What the base model at the bottom is made for: ``causal_lm`` writes, an ``encoder`` reads texts,
    and so on."""
    writes: bool
    """Whether it answers chats; what its base is made for where its files are on another server."""
    abilities: AbilitiesView | None = None
    """In the answer about one model; none in lists, and where its files or its package are not here."""


class ModelsView(View):
    """Foundation models, then the account's own in the order they were made."""

    models: list[ModelView]


class DeletedModelView(View):
    """A model that was deleted."""

    model: str
    """Its ARN."""


class CertificateView(View):
    """The certificate of a custom model, and what it goes back to."""

    model: str
    certificate: dict[str, Any]
    """As ``certificate.json`` holds it: record, lineage, curves, operations, energy, reports."""
    lineage: list[str]
    """ARNs from this model down to the foundation model."""
    shares: list[str]
    """Measures whose values are shares, which read best as percent."""
    errors: list[str]
    """Measures of which less is better."""


def operations(context: Context) -> list[NativeOperation]:
    """Everything about models."""
    models, one = _Models(context), "/api/v1/models/{model}"
    return [
        NativeOperation(
            "listModels", "GET", "/api/v1/models", models.list_models, "All models there are.",
            ModelsView,
        ),
        NativeOperation("getModel", "GET", one, models.get, "One model by id, name or ARN.", ModelView),
        NativeOperation(
            "deleteModel", "DELETE", one, models.delete,
            "Delete a custom model that nothing answers with and no job starts from; its job stays.",
            DeletedModelView,
        ),
        NativeOperation(
            "getCertificate", "GET", f"{one}/certificate", models.certificate,
            "What is certified of a custom model, and its lineage.", CertificateView,
        ),
        NativeOperation(
            "downloadCertificate", "GET", f"{one}/certificate.json", models.certificate_file,
            "The bytes of a custom model's certificate.json, as `luthier verify` reads them.",
        ),
    ]  # fmt: skip


class _Models:
    def __init__(self, context: Context) -> None:
        self.context = context

    def list_models(self, request: Request) -> ModelsView:
        self.context.record(request, "ListModels", "*")
        own = select(CustomModel).where(
            CustomModel.account == request.account, CustomModel.status != RESERVED
        )
        with self.context.database.read() as session:
            found = list(session.scalars(own.order_by(CustomModel.seq)))
        views = [self._foundation(each) for each in foundation_models()]
        return ModelsView(models=views + [self._custom(each) for each in found])

    def get(self, request: Request) -> ModelView:
        with self.context.database.read() as session:
            base = find_foundation(self.context.arns, request.params["model"])
            found = base or self.context.asked_model(request, session, "GetModel")
        if isinstance(found, FoundationModel):
            self.context.record_base("GetModel", found)
            view = self._foundation(found)
        else:
            view = self._custom(found)
        return view.model_copy(update={"abilities": _abilities(found)})

    def delete(self, request: Request) -> DeletedModelView:
        with self.context.database.read() as session:
            model = self.context.asked_model(request, session, "DeleteModel")
        self.context.delete_model(model)
        return DeletedModelView(model=model.arn(self.context.arns))

    def certificate(self, request: Request) -> CertificateView:
        lineage: list[str] = []
        with self.context.database.read() as session:
            model = below = self.context.asked_model(request, session, "GetModel")
            lineage.append(below.arn(self.context.arns))
            # A whole network from outside has nothing below it.
            while below.base_model:
                lineage.append(below.base_model)
                if ":custom-model/" not in lineage[-1]:
                    break
                try:
                    below = self.context.custom(session, request.account, lineage[-1])
                except Fault:
                    break  # deleted since; its ARN is all that is left of it here
        certificate = json.loads(_certificate_text(model))
        return CertificateView(
            model=lineage[0],
            certificate=certificate,
            lineage=lineage,
            shares=sorted(SHARES),
            errors=sorted(LESS_IS_BETTER),
        )

    def certificate_file(self, request: Request) -> Response:
        with self.context.database.read() as session:
            model = self.context.asked_model(request, session, "GetModel")
        # Its hash is of these bytes: JavaScript, which reads 32.0 and writes 32, would change them.
        headers = {
            "Content-Type": "application/json",
            "Content-Disposition": 'attachment; filename="certificate.json"',
        }
        return Response(200, _certificate_text(model).encode("utf-8", "replace"), headers)

    def _foundation(self, model: FoundationModel) -> ModelView:
        return ModelView(
            id=model.id,
            name=model.base,
            arn=self.context.arns.foundation_model(model.id),
            kind="foundation",
            status="ACTIVE",
            created=model.created,
            base_kind=model.kind,
            writes=writes(model),
        )

    def _custom(self, model: CustomModel) -> ModelView:
        sent = model.details.get("request", {}).get("modelSourceConfig", {})
        source: str | None = sent.get("s3DataSource", {}).get("s3Uri")
        return ModelView(
            id=model.id,
            name=model.name,
            arn=model.arn(self.context.arns),
            kind="custom",
            status=model.status,
            base=model.base_model or None,
            job=model.job_id,
            source=source,
            failure=model.failure,
            created=model.created,
            base_kind=kind_of(model),
            writes=writes(model),
        )


def _certificate_text(model: CustomModel) -> str:
    from luthier.library.models import find
    from luthier.workflows.certificate.certificate import read_certificate

    if model.stored_id is None:
        raise Fault("Conflict", f"The model {model.name} is {model.status} and has no certificate.")
    return read_certificate(find(model.stored_id)).text()


def _abilities(model: FoundationModel | CustomModel) -> AbilitiesView | None:
    from luthier.library.models import find

    try:
        if isinstance(model, FoundationModel):
            found = abilities_of_base(model.base)
        elif model.stored_id is not None:
            found = abilities_of(find(model.stored_id))
        else:
            return None
    except (LuthierError, OSError):
        return None  # its files are on another server, damaged, or of a package that is gone
    return AbilitiesView(**asdict(found))
