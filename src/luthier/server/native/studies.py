"""Studies of the native API: trainings with different settings, side by side, as a background job."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from luthier.server.jobs.studies import bases_of, check_study
from luthier.server.jobs.submit import FINE_TUNING, Submission, submit_report
from luthier.server.native.measurements import (
    Address,
    MeasurementView,
    Model,
    add_operations,
    model_of,
    request_of,
    view_report,
)
from luthier.server.native.operations import Input, NativeCall, native_router
from luthier.server.tables.studies import STUDY, Study

router = native_router()


class NewStudy(Input):
    """Rows and settings of a new study; see ``luthier study``."""

    base: Model
    """Base model of all trainings, unless ``base`` is varied."""
    training: Address
    """Rows, of which a part is held out."""
    validation: Address | None = None
    """Held-out rows, instead of a part of the training rows."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of all trainings by group, as of a job."""
    preset: str | None = None
    """``methods``, ``layers``, ``rate``, ``rows``, ``augmentation`` or ``bits``, without ``vary``."""
    vary: tuple[str, ...] = Field(default=(), max_length=10)
    """Varied fields: ``["adaptation.method=lora,full"]``; in a search also ``KEY=LOW..HIGH``."""
    seeds: int = Field(default=1, ge=1, le=10)
    """Trainings of each combination."""
    search: int | None = Field(default=None, ge=1, le=200)
    """Number of trials, instead of all combinations."""
    forgetting: bool = False
    """Measure the drift from the base; for text generation."""
    earlier: Address | None = None
    """Rows of an earlier task, measured before and after each training."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Limits of the choice: ``ms``, ``mb``, ``minutes`` or ``drift``."""
    max_minutes: float | None = Field(default=None, gt=0, le=10**6)
    """Start no training that would exceed this time."""


@router.post("/studies", status_code=201)
def create_study(call: NativeCall, body: NewStudy) -> MeasurementView:
    """Create a study."""
    from luthier.workflows.study.grid import parse_dimensions

    context = call.context
    call.record(f"{STUDY}/*")
    request = request_of(context.locations, call.account, body)
    names = sorted({body.base, *bases_of(parse_dimensions(body.vary))}, key=body.base.__ne__)
    models = [model_of(call, name) for name in names]
    submission = Submission(
        account=call.account,
        api="native",
        job_name=STUDY,
        model_name=STUDY,
        customization_type=FINE_TUNING,
        base=context.base(call.account, body.base),
        training=[request["training"]],
        validators=[request["validation"]] if request["validation"] else [],
        settings=body.settings,
    )
    recipe = check_study(context.locations, submission, request, models)
    # A default that counts as set would stay when another method is varied.
    fields = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    with context.database.write() as session:
        limits = context.quotas(call.account)
        row = submit_report(
            session, Study, call.account, request, models, limits,
            recipe=fields, cores=recipe.training.threads,
        )  # fmt: skip
        call.record_created(f"{STUDY}/{row.id}")
        view = view_report(row, None)
    context.wake()
    return view


add_operations(router, Study, STUDY, "studies")
