"""Exports of the native face: custom models written for other software, as work of the queue."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from luthier.exports.export import Format
from luthier.server.http.messages import Request
from luthier.server.jobs.submit import submit_export
from luthier.server.native.operations import Context, Input, NativeOperation, View, not_found
from luthier.server.tables import exports
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.exports import ModelExport

State = Literal["Queued", "Running", "Stopping", "Completed", "Failed", "Stopped"]
"""Where an export may stand."""


class NewExport(Input):
    """What is to be written, and where."""

    output: str = Field(min_length=1, max_length=2048)
    """Address below which a folder ``model-export-ID`` is written: ``s3://bucket/prefix``."""
    format: Format = "safetensors"
    """For transformers, PEFT and diffusers; ``onnx`` for ONNX Runtime; ``gguf`` for llama.cpp."""
    merged: bool | None = None
    """Whether an adapter is folded into its base; else it is written alone, as safetensors if not
    given."""
    quantization: str | None = Field(default=None, max_length=16)
    """Type of the weights: f32, f16, bf16, or for GGUF q8_0, q6_k, q5_k_m, q4_k_m or q4_0."""


class ExportView(View):
    """Where an export stands."""

    id: str
    model: str
    """ARN."""
    model_name: str
    format: Format
    merged: bool | None = None
    quantization: str | None = None
    output: str
    state: State
    progress: dict[str, Any] | None = None
    """While it goes on: ``phase`` (``merge``, ``trace``, ``write``, ``compare``, ``upload``), ``done``
    and ``total`` (bytes of ``write`` and ``upload``), and ``estimated_finish`` of the phase."""
    result: dict[str, Any] | None = None
    """Of a completed one: its ``address``, its ``files`` with bytes and SHA-256, and how near their
    answers are to those of the model (``compared``)."""
    failure: str | None = None
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None


class ExportsView(View):
    """Exports, the newest first."""

    exports: list[ExportView]
    next: int | None = None
    """``position`` of the next page; none at the end."""


class ExportsPage(Input):
    """Which exports are wanted."""

    state: State | None = None
    model: str | None = Field(default=None, max_length=2048)
    """ARN of the custom model whose exports are wanted, also of one that was deleted since."""
    limit: int = Field(default=100, ge=1, le=1000)
    position: int | None = Field(default=None, ge=0, le=2**62)
    """``next`` of the page before."""


def operations(context: Context) -> list[NativeOperation]:
    """Everything about exports."""
    face, one = _Exports(context), "/api/v1/exports/{export}"
    return [
        NativeOperation(
            "createExport", "POST", "/api/v1/models/{model}/exports", face.create,
            "Have a custom model written for other software.", ExportView, body=NewExport, status=201,
        ),
        NativeOperation(
            "listExports", "GET", "/api/v1/exports", face.list_exports, "Exports, the newest first.",
            ExportsView, query=ExportsPage,
        ),
        NativeOperation("getExport", "GET", one, face.get, "One export by its id.", ExportView),
        NativeOperation(
            "stopExport", "POST", f"{one}/stop", face.stop,
            "Stop an export; one that has ended is a conflict.", ExportView,
        ),
    ]  # fmt: skip


class _Exports:
    def __init__(self, context: Context) -> None:
        self.context = context

    def create(self, request: Request, body: NewExport) -> ExportView:
        context = self.context
        with context.database.read() as session:
            asked = context.asked_model(request, session, "CreateExport", active=True)
        context.locations.check_writable(request.account, body.output)
        with context.database.write() as session:
            model = session.get(CustomModel, asked.seq, with_for_update=True)
            if model is None:  # deleted meanwhile
                raise not_found("model", request.params["model"])
            made = submit_export(
                session,
                model,
                model.arn(context.arns),
                body.output,
                body.format,
                body.merged,
                body.quantization,
            )
            view = _view(made)
        context.wake()
        return view

    def list_exports(self, request: Request, page: ExportsPage) -> ExportsView:
        self.context.record(request, "ListExports", "*")
        states = (page.state,) if page.state else ()
        with self.context.database.read() as session:
            found = exports.list_exports(
                session,
                request.account,
                states,
                model=page.model,
                limit=page.limit + 1,
                position=page.position,
            )
        following = found[page.limit - 1].seq if len(found) > page.limit else None
        return ExportsView(exports=[_view(each) for each in found[: page.limit]], next=following)

    def get(self, request: Request) -> ExportView:
        self._record(request, "GetExport")
        with self.context.database.read() as session:
            found = exports.get(session, request.account, request.params["export"])
        return _view(_existing(request, found))

    def stop(self, request: Request) -> ExportView:
        self._record(request, "StopExport")
        with self.context.database.write() as session:
            found = exports.get(session, request.account, request.params["export"], lock=True)
            view = _view(exports.stop(session, _existing(request, found)))
        self.context.wake()
        return view

    def _record(self, request: Request, action: str) -> None:
        self.context.record(request, action, f"model-export/{request.params['export']}")


def _existing(request: Request, found: ModelExport | None) -> ModelExport:
    if found is None:
        raise not_found("export", request.params["export"])
    return found


def _view(export: ModelExport) -> ExportView:
    return ExportView(**{name: getattr(export, name) for name in ExportView.model_fields})
