"""Exports of the native API: background jobs that convert custom models to other formats."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import Query
from pydantic import Field

from luthier.exports.export import Format
from luthier.server.http.routes import Name
from luthier.server.jobs.submit import submit_export
from luthier.server.native.operations import (
    Input,
    NativeCall,
    Page,
    ResultState,
    View,
    native_router,
    not_found,
)
from luthier.server.tables import results
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.exports import ModelExport

router = native_router()


class NewExport(Input):
    """Model format and destination of a new export."""

    output: str = Field(min_length=1, max_length=2048)
    """S3 address for the folder ``model-export-ID``: ``s3://bucket/prefix``."""
    format: Format = "safetensors"
    """``safetensors`` for transformers, PEFT and diffusers, ``onnx`` for ONNX Runtime, ``gguf`` for
    llama.cpp."""
    merged: bool | None = None
    """Merge an adapter into the base model. The default writes a safetensors adapter without the
    base model."""
    quantization: str | None = Field(default=None, max_length=16)
    """Type of the weights: f32, f16, bf16, or for GGUF q8_0, q6_k, q5_k_m, q4_k_m or q4_0."""


class ExportView(View):
    """State and result of an export."""

    id: str
    model: str
    """ARN of the model."""
    model_name: str
    format: Format
    merged: bool | None = None
    quantization: str | None = None
    output: str
    state: ResultState
    progress: dict[str, Any] | None = None
    """Progress of a running export: ``phase`` (``merge``, ``trace``, ``write``, ``compare`` or
    ``upload``), ``done`` and ``total`` (bytes of ``write`` and ``upload``)."""
    result: dict[str, Any] | None = None
    """Result of a completed export: ``address``, ``files`` with size and SHA-256, and ``compared``,
    the difference between outputs of the model and of the export."""
    failure: str | None = None
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None


class ExportsView(View):
    """Exports, newest first."""

    exports: list[ExportView]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class ExportsPage(Page):
    """Filters and page of a list of exports."""

    state: ResultState | None = None
    model: str | None = Field(default=None, max_length=2048)
    """ARN of the exported custom model. The model may be deleted."""


@router.post("/models/{model}/exports", status_code=201)
def create_export(call: NativeCall, model: Name, body: NewExport) -> ExportView:
    """Create an export of a custom model."""
    context = call.context
    with context.database.read() as session:
        named = call.model(session, model, active=True)
    context.locations.check_writable(call.account, body.output)
    with context.database.write() as session:
        row = session.get(CustomModel, named.seq, with_for_update=True)
        if row is None:  # deleted by another request
            raise not_found("model", model)
        arn, kind = row.arn(context.arns), body.format
        export = submit_export(session, row, arn, body.output, kind, body.merged, body.quantization)
        call.record_created(f"model-export/{export.id}")
        view = _view(export)
    context.wake()
    return view


@router.get("/exports")
def list_exports(call: NativeCall, page: Annotated[ExportsPage, Query()]) -> ExportsView:
    """List exports, newest first."""
    states = (page.state,) if page.state else ()
    conditions = () if page.model is None else (ModelExport.model == page.model,)
    with call.context.database.read() as session:
        limit, position = page.limit + 1, page.position
        rows = results.list_works(
            session, ModelExport, call.account, states, *conditions, limit=limit, position=position
        )
    return ExportsView(exports=[_view(each) for each in rows[: page.limit]], next=page.next(rows))


@router.get("/exports/{export}")
def get_export(call: NativeCall, export: Name) -> ExportView:
    """Return an export."""
    with call.context.database.read() as session:
        row = results.get(session, ModelExport, call.account, export)
    return _view(_existing(export, row))


@router.post("/exports/{export}/stop")
def stop_export(call: NativeCall, export: Name) -> ExportView:
    """Stop an export. Stopping an ended export is a conflict."""
    call.record(f"model-export/{export}")
    with call.context.database.write() as session:
        row = results.get(session, ModelExport, call.account, export, lock=True)
        view = _view(results.stop(session, _existing(export, row)))
    call.context.wake()
    return view


def _existing(name: str, export: ModelExport | None) -> ModelExport:
    if export is None:
        raise not_found("export", name)
    return export


def _view(export: ModelExport) -> ExportView:
    return ExportView(**{name: getattr(export, name) for name in ExportView.model_fields})
