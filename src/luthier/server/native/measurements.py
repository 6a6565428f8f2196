"""Evaluations and comparisons of the native API: background jobs that end with a report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.evaluation.significance import LESS_IS_BETTER
from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.jobs.data import peek_rows
from luthier.server.jobs.measurements import check_measurement, columns_of, learned_columns
from luthier.server.jobs.submit import submit_report
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    Page,
    ResultState,
    View,
    native_router,
    not_found,
)
from luthier.server.stores.locations import Locations
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables import measurements, results
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.jobs import Job
from luthier.server.tables.measurements import (
    COMPARISON,
    EVALUATION,
    MeasuredModel,
    Measurement,
    ReportWork,
)

router = native_router()
Model = Annotated[str, Field(min_length=1, max_length=2048)]
"""Base model, custom model or deployment, by any name."""
Address = Annotated[str, Field(min_length=1, max_length=2048)]
"""``s3://bucket/key``, a key that ends in ``/`` for all objects below, or the id of a file."""
Graders = Annotated[
    dict[str, str | dict[str, Any]] | list[str], Field(default_factory=dict, max_length=32)
]
"""Graders by name, or names of graders."""


class _NewMeasurement(Input):
    rows: Address
    """Held-out rows: an address, or the id of an uploaded file."""
    graders: Graders
    """Graders of replies: names (``["exact"]``), or fields by name. The default follows from the
    rows. In a comparison, the first grader decides."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of the rows by key; an empty name ignores the key or column. The default are the
    columns of the model's training rows, if the rows have them."""
    time_limit: int = Field(default=21_600, ge=1, le=604_800)
    """Time limit in seconds. One measurement runs at a time on a machine."""


class EvaluationFields(_NewMeasurement):
    """Rows and graders of evaluations."""

    max_tokens: int = Field(default=128, ge=1, le=8192)
    """Token limit of a reply."""
    on_grader_error: Literal["fail", "zero"] = "fail"
    """Effect of a reply without a grade."""
    turns: Literal["last", "calls", "all"] = "last"
    """Replies of a conversation to generate."""
    slices: tuple[str, ...] = Field(default=(), max_length=16)
    """Score slices: ``label``, ``length``, ``language`` or a column of the rows."""
    long_rows: Literal["error", "drop", "truncate"] | None = None
    """How to handle rows longer than the context."""


class NewEvaluation(EvaluationFields):
    """Model, rows and graders of a new evaluation."""

    model: Model
    """Base model, custom model or deployment."""


class NewComparison(_NewMeasurement):
    """Models, rows and graders of a new comparison."""

    models: tuple[Model, ...] = Field(min_length=1, max_length=10)
    """Custom models or deployments."""
    base: Model | None = None
    """Model without tuning. The default is the foundation model of the first model."""
    training: Address | None = None
    """Rows for examples and baselines. The default are the rows of the first model's job, if they have
    a single address, and answers."""
    prompts: dict[str, str] = Field(default_factory=dict, max_length=10)
    """Own instructions or templates with ``{column}``, by name."""
    max_tokens: int = Field(default=64, ge=1, le=8192)
    """Token limit of a reply."""
    show: int = Field(default=0, ge=0, le=50)
    """Number of rows with replies in the report."""
    seeds: int = Field(default=0, ge=0, le=16)
    """Replies sampled per row, to measure consistency."""


class MeasurementView(View):
    """State and report of an evaluation, comparison or study."""

    id: str
    models: list[str]
    """Names of the models, as sent. In a comparison, the base is the last model. In a study, the base
    models."""
    request: dict[str, Any]
    """Fields of the request."""
    state: ResultState
    progress: dict[str, Any] | None = None
    """Progress of a running measurement: ``phase``, ``done`` and ``total`` (rows or replies)."""
    report: dict[str, Any] | None = None
    """Report of ``luthier evaluate``, ``compare`` or ``study`` with ``--json``; missing in lists. The
    report of an evaluation also has the ``worst`` answers."""
    lower_is_better: list[str]
    """Names of measures with lower values being better."""
    failure: str | None = None
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None


class MeasurementsView(View):
    """Evaluations, comparisons or studies, newest first."""

    measurements: list[MeasurementView]
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class DeletedMeasurementView(View):
    """Response to the deletion of an evaluation, comparison or study."""

    id: str


class MeasurementsPage(Page):
    """Filter and page of a list of evaluations, comparisons or studies."""

    state: ResultState | None = None
    model: str | None = Field(default=None, max_length=2048)
    """ARN of the first model. The model may be deleted."""


@router.post("/evaluations", status_code=201)
def create_evaluation(call: NativeCall, body: NewEvaluation) -> MeasurementView:
    """Create an evaluation of a model on held-out rows."""
    return _create(call, EVALUATION, body, [model_of(call, body.model)])


@router.post("/comparisons", status_code=201)
def create_comparison(call: NativeCall, body: NewComparison) -> MeasurementView:
    """Create a comparison of custom models with their base, prompting and baselines."""
    from luthier.library.models import describe

    models = [model_of(call, name) for name in body.models]
    base = body.base or describe(models[0]["stored_id"]).root
    return _create(call, COMPARISON, body, [*models, model_of(call, base)])


def add_operations(router: APIRouter, table: type[ReportWork], kind: str, kinds: str) -> None:
    """Add the operations that evaluations, comparisons and studies share.

    ``kinds`` is the plural of the name ``kind``.
    """
    own = (Measurement.kind == kind,) if table is Measurement else ()

    def find(call: Call, session: Session, name: str, *, lock: bool = False) -> ReportWork:
        """Return the work, and record the ARN for the audit log."""
        call.record(f"{kind}/{name}")
        row = results.get(session, table, call.account, name, lock=lock)
        if row is None or getattr(row, "kind", kind) != kind:
            raise not_found(kind, name)
        return row

    def list_all(call: NativeCall, page: Annotated[MeasurementsPage, Query()]) -> MeasurementsView:
        states = (page.state,) if page.state else ()
        first = () if page.model is None else (table.models[0]["arn"].as_string() == page.model,)
        with call.context.database.read() as session:
            rows = results.list_works(
                session, table, call.account, states, *own, *first,
                limit=page.limit + 1, position=page.position,
            )  # fmt: skip
        views = [view_report(each, None) for each in rows[: page.limit]]
        return MeasurementsView(measurements=views, next=page.next(rows))

    def get(call: NativeCall, id: Name) -> MeasurementView:
        with call.context.database.read() as session:
            row = find(call, session, id)
            return view_report(row, row.result)

    def report(call: NativeCall, id: Name) -> Response:
        with call.context.database.read() as session:
            row = find(call, session, id)
            html = row.page
        if html is None:
            raise Fault("Conflict", f"The {kind} {id} is {row.state} and has no report.")
        return Response(html.encode("utf-8", "replace"), media_type="text/html; charset=utf-8")

    def stop(call: NativeCall, id: Name) -> MeasurementView:
        with call.context.database.write() as session:
            row = find(call, session, id, lock=True)
            view = view_report(results.stop(session, row), None)
        call.context.wake()
        return view

    def delete(call: NativeCall, id: Name) -> DeletedMeasurementView:
        with call.context.database.write() as session:
            measurements.delete(session, find(call, session, id, lock=True))
        return DeletedMeasurementView(id=id)

    one = f"/{kinds}/{{id}}"
    for method, path, name, text, operation in (
        ("GET", f"/{kinds}", f"list_{kinds}", f"List {kinds}, newest first.", list_all),
        ("GET", one, f"get_{kind}", f"Return the {kind} with its report.", get),
        ("GET", f"{one}/report", f"get_{kind}_report", f"Return the page of the {kind}.", report),
        ("POST", f"{one}/stop", f"stop_{kind}", f"Stop the {kind}.", stop),
        ("DELETE", one, f"delete_{kind}", f"Delete the ended {kind} with its report.", delete),
    ):
        # The name of the function determines the operation and the action.
        operation.__name__, operation.__doc__ = name, text
        router.add_api_route(path, operation, methods=[method])


for _kind in (EVALUATION, COMPARISON):
    add_operations(router, Measurement, _kind, f"{_kind}s")


def _create(
    call: Call, kind: str, body: _NewMeasurement, models: Sequence[MeasuredModel]
) -> MeasurementView:
    context = call.context
    call.record(f"{kind}/*")
    request = request_of(context.locations, call.account, body)
    learned = learned_columns(models[0])
    request["columns"] = body.columns or columns_of(
        context.locations, call.account, learned, request["rows"]
    )
    # One set of columns must read both files.
    if kind == COMPARISON and not request["training"] and request["columns"] == learned:
        request["training"] = _training_rows(call, models[0], learned)
    check_measurement(context.locations, call.account, kind, request, models)
    with context.database.write() as session:
        limits = context.quotas(call.account)
        row = submit_report(session, Measurement, call.account, request, models, limits, kind=kind)
        call.record_created(f"{kind}/{row.id}")
        view = view_report(row, None)
    context.wake()
    return view


def _training_rows(call: Call, model: MeasuredModel, columns: dict[str, str]) -> str | None:
    """Return the address of the rows of the model's job, if a comparison can use the rows."""
    from luthier.library.models import describe
    from luthier.workflows.prompting import questions_of

    made = (CustomModel.account == call.account) & (CustomModel.stored_id == model["stored_id"])
    with call.context.database.read() as session:
        job = session.scalar(
            select(Job).join(CustomModel, CustomModel.job_id == Job.id).where(made)
        )
        sources = [] if job is None else job.details["sources"]
    if len(sources) != 1:
        return None
    try:
        call.context.locations.check(call.account, sources[0])
        if describe(model["stored_id"]).writes:
            rows = peek_rows(call.context.locations, call.account, sources[0], columns).rows
            # Raw text and prompts without replies are no examples.
            return sources[0] if rows and questions_of(rows) else None
    except RefusedInput:
        return None
    return sources[0]


def request_of(locations: Locations, account: str, body: Input) -> dict[str, Any]:
    """Return the fields of a body, with addresses in place of the ids of files."""
    request = body.model_dump(mode="json")
    for member in ("rows", "training", "validation", "earlier"):
        if (value := request.get(member)) and locations.uploads.get(account, value):
            request[member] = file_address(value)
    return request


def model_of(call: Call, name: str) -> MeasuredModel:
    """Return the model that a name stands for now."""
    target = call.context.models.target(call.account, name)
    if target is None:
        raise not_found("model", name)
    return MeasuredModel(name=name, arn=target.model, stored_id=target.stored_id)


def view_report(row: ReportWork, report: dict[str, Any] | None) -> MeasurementView:
    """Return the work for a response."""
    fields: dict[str, Any] = {
        "models": [each["name"] for each in row.models],
        "report": report,
        "lower_is_better": sorted(LESS_IS_BETTER),
    }
    fields |= {
        name: getattr(row, name) for name in MeasurementView.model_fields.keys() - fields.keys()
    }
    return MeasurementView(**fields)
