"""Submission of jobs, imports, exports and measurements to the queue: names, quotas and recipe, in one
transaction.

The registration of a CLI model for an account needs no queue.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from luthier.errors import NameInUse, RecipeError, WrongState
from luthier.files import folder_size
from luthier.library.models import StoredModel, check_active, is_recorded
from luthier.limits import AccountQuotas
from luthier.models.base_kinds import sole_objective
from luthier.models.catalog import begins_random
from luthier.models.manifest import MANIFEST
from luthier.server.stores.removal import is_removed
from luthier.server.tables import exports, imports, storage
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import (
    ACTIVE,
    CREATING,
    FAILED,
    IMPORTED,
    LONGEST_NAME,
    NAME,
    RESERVED,
    CustomModel,
)
from luthier.server.tables.database import count_rows, lock_by_name, new_id, now
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.foundation import (
    AnyModel,
    FoundationModel,
    foundation_model,
    kind_of,
    root_of,
    writes,
)
from luthier.server.tables.jobs import QUEUED, QUEUED_OR_RUNNING, Job, record, run_name
from luthier.server.tables.measurements import (
    MeasuredModel,
    Report,
    create,
)
from luthier.server.tables.queue import in_flight, next_turn

if TYPE_CHECKING:
    from luthier.recipe import Recipe

FINE_TUNING, CONTINUED_PRE_TRAINING = "FINE_TUNING", "CONTINUED_PRE_TRAINING"
DISTILLATION, REINFORCEMENT = "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING, DISTILLATION, REINFORCEMENT)

_GROUPS = (
    "training", "adaptation", "objective", "sampling", "insights", "teacher", "method", "forgetting",
)  # fmt: skip
SETTABLE_DATA = (
    "long_rows", "validation_share", "label_issues", "group_column", "columns", "augmentation",
    "severity", "chat_template_kwargs",
)  # fmt: skip
"""Data fields that a request may set. Other data fields name files, models or machines."""
_TEACHER = ("batch_size",)
_NAMING = (
    "grader", "graders", "teacher", "judge", "reward", "model", "feature_model", "url",
)  # fmt: skip
"""Fields for a model, an address or a grader."""
_GRADER_PARTS = {"mix": "parts", "multi": "graders"}
"""Graders of graders, and the field with the graders by name."""
CLIENT_GRADERS = (
    "exact", "first_line", "number", "regex", "similarity", "json_schema", "string_check",
    "text_similarity", "python", *_GRADER_PARTS,
)  # fmt: skip
"""Graders for clients: text graders, and code in the sandbox.

Other graders query models with the server's keys or read files. Only the operator can register
them.
"""
HELD_OUT = (
    "The job has no validation data: of 20 rows or more, a tenth (at most 200 rows) is held out to "
    "measure the model. With validation data, the job trains on all rows."
)
"""Event of a job that holds out rows."""
MOST_CORES = 16
"""Default number of threads of a job; more threads do not help small networks."""


@dataclass(frozen=True)
class Submission:
    """A request for a customization job, checked for form, not yet for names and quotas."""

    account: str
    api: str
    """``bedrock``, ``openai`` or ``native``."""
    job_name: str
    model_name: str
    customization_type: str
    """One of :data:`TYPES`."""
    base: AnyModel
    """Base model; a custom model is ``Active``."""
    training: Sequence[str]
    """Addresses of the training data."""
    validators: Sequence[str] = ()
    """Addresses of validation data, each measured separately."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe by group: ``{"training": {"epochs": 2}, "adaptation": {"rank": 8}}``."""
    teacher: AnyModel | None = None
    grader: Mapping[str, Any] | None = None
    """Grader of reinforcement fine-tuning: ``method`` and fields."""
    output: str | None = None
    """Address of the output folder for metrics."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Request members for replies of the API, ready for JSON."""
    without_effect: Sequence[str] = ()
    """Warnings about members without effect, for the events of the job."""
    openai_id: str | None = None
    """``ft:…`` id of the resulting model."""
    priority: int = 0
    time_limit: int | None = None
    """Maximum seconds of work."""
    hold_out: bool = True
    """True if a job without validation data holds out rows, as the CLI does."""


def submit(
    session: Session, submission: Submission, arns: Arns, limits: AccountQuotas | None = None
) -> Job:
    """Queue a job and reserve the model's name, in the caller's transaction.

    Raises:
        NameInUse: if the account has a job or a model of the same name.
        QuotaExceeded: if the account has too many unfinished jobs or models.
        RecipeError: for wrong settings.
    """
    limits = limits or AccountQuotas()
    # Only PostgreSQL needs the lock: SQLite has one writer.
    # Without the lock, concurrent submissions of an account could pass the quotas together.
    lock_by_name(session, f"submit {submission.account}")
    _check_free(session, Job, submission.account, submission.job_name)
    _check_free(session, CustomModel, submission.account, submission.model_name)
    storage.check_count(
        in_flight(session, Job, submission.account), limits, "jobs_in_flight",
        "unfinished customization jobs", "Wait, or stop some jobs.",
    )  # fmt: skip
    _check_model_quota(session, submission.account, limits)
    job_id, moment = new_id(), now()
    recipe = recipe_of(submission, job_id)
    job = Job(
        id=job_id,
        account=submission.account,
        name=submission.job_name,
        model_name=submission.model_name,
        api=submission.api,
        customization_type=submission.customization_type,
        foundation=submission.base.bottom,
        base_model=submission.base.arn(arns),
        command="distil" if submission.customization_type == DISTILLATION else "tune",
        recipe=recipe.plain(),
        request=dict(submission.request),
        output=submission.output,
        validators=list(submission.validators),
        state=QUEUED,
        details={"sources": list(submission.training)},
        priority=submission.priority,
        turn=next_turn(session, Job, submission.account, Job.state.in_(QUEUED_OR_RUNNING)),
        cores=recipe.training.threads,
        time_limit=submission.time_limit,
        created=moment,
        modified=moment,
    )
    session.add(job)
    # The unique constraint decides between two submissions of one name that both passed the check.
    _flush(session, "job")
    session.add(_reserve_model(submission, job))
    _flush(session, "model")
    record(session, job.id, "state", "The job was created.", state=QUEUED)
    if (
        submission.hold_out
        and not submission.validators
        and "validation_share" not in job.recipe["data"]
    ):
        record(session, job.id, "message", HELD_OUT)
    for text in submission.without_effect:
        record(session, job.id, "warning", text)
    return job


def check_client_grader(fields: Any) -> dict[str, Any]:
    """Check a client's grader and return the fields.

    Raises:
        RecipeError: if clients may not define the grader.
    """
    if isinstance(fields, str):
        fields = {"method": fields}
    method = fields.get("method") if isinstance(fields, Mapping) else None
    # A list of what is allowed: a grader that a plugin adds must not become available to clients
    # without a decision.
    if method not in CLIENT_GRADERS:
        raise RecipeError(
            f"grader {method!r} is not available to clients. Choose one of {', '.join(CLIENT_GRADERS)}"
        )
    checked = dict(fields)
    # A text would name a file on the server.
    if method == "json_schema" and not isinstance(checked.get("against"), Mapping):
        raise RecipeError("grader json_schema: `against` must be a JSON schema (an object)")
    if part := _GRADER_PARTS.get(method):
        inner = checked.get(part)
        if not isinstance(inner, Mapping):
            raise RecipeError(f"grader {method}: `{part}` must be an object of graders by name")
        checked[part] = {name: check_client_grader(each) for name, each in inner.items()}
    return checked


def submit_import(
    session: Session,
    account: str,
    name: str,
    source: str,
    request: Mapping[str, Any],
    limits: AccountQuotas | None = None,
    trusted: bool = False,
) -> CustomModel:
    """Queue the import of a model from the folder ``source``, in the caller's transaction.

    ``request`` contains the members that the API returns. If ``trusted`` is set, which requires an
    administrator, the chat template is approved.

    Raises:
        NameInUse: if the account has a model of the same name.
        QuotaExceeded: if the account has too many models.
    """
    limits = limits or AccountQuotas()
    lock_by_name(session, f"submit {account}")
    _check_free(session, CustomModel, account, name)
    _check_model_quota(session, account, limits)
    model = CustomModel(
        id=new_id(),
        account=account,
        name=name,
        foundation=IMPORTED,
        root="",
        base_model="",
        status=CREATING,
        details={"request": dict(request), "trusted": trusted},
        created=now(),
    )
    session.add(model)
    session.flush()
    imports.create_import(session, model, source)
    return model


def register_model(
    session: Session,
    account: str,
    name: str,
    stored: StoredModel,
    arns: Arns,
    limits: AccountQuotas | None = None,
) -> CustomModel:
    """Register a model of the CLI for ``account``, in the caller's transaction.

    The files are not copied, and are removed when the account deletes the model.

    Raises:
        QuotaExceeded: if the account has too many models, or no space for this one.
        WrongState: if the model belongs to an account, or was deleted.
        RecipeError: for a wrong or taken name, a base model, or a withheld model.
    """
    limits = limits or AccountQuotas()
    # Two accounts may register the model at once.
    lock_by_name(session, f"register {stored.id}")
    lock_by_name(session, f"submit {account}")
    if foundation_model(name) is not None:
        raise RecipeError(f"{name} is the name of a base model. Choose a different name")
    if len(name) > LONGEST_NAME or not re.fullmatch(NAME, name):
        raise RecipeError(
            f"{name!r} is not a valid name. Use at most {LONGEST_NAME} letters and digits, with single "
            "hyphens or underscores in between"
        )
    if ":" not in stored.id or not is_recorded(stored):
        raise RecipeError(
            f"{stored.id} is a base model. Every account can use base models without registration"
        )
    check_active(stored)
    if is_removed(stored.id) or not (stored.folder / MANIFEST).is_file():
        raise WrongState(f"{stored.id} is deleted; only derived models still use its files")
    registered = session.scalar(select(CustomModel).filter_by(stored_id=stored.id))
    if registered is not None:
        raise WrongState(
            f"{stored.id} already belongs to account {registered.account}, as {registered.name}"
        )
    try:
        _check_free(session, CustomModel, account, name)
    except NameInUse as error:
        raise RecipeError(
            f"account {account} has a model {name}. Choose a different name"
        ) from error
    _check_model_quota(session, account, limits)
    model_id, base = new_id(), _base_of(session, account, stored)
    model = CustomModel(
        id=model_id,
        account=account,
        name=name,
        foundation=base.bottom if base else IMPORTED,
        root=base.root if base else imports.root_name(model_id),
        base_model=base.arn(arns) if base else "",
        stored_id=stored.id,
        stored_bytes=folder_size(stored.folder),
        status=ACTIVE,
        details={"kind": stored.kind},
        created=now(),
    )
    session.add(model)
    _flush(session, "model")
    # After the flush, in the same transaction: the row must exist to be counted, and a full quota
    # removes the row again.
    storage.charge(session, account, limits, stored_bytes=model.stored_bytes or 0)
    return model


def _base_of(session: Session, account: str, stored: StoredModel) -> AnyModel | None:
    """Return the account's parent model of ``stored``, or the foundation model if there is no
    parent."""
    of_account = select(CustomModel).filter_by(account=account, stored_id=stored.manifest.parent)
    parent = session.scalar(of_account) if stored.manifest.parent else None
    return parent or foundation_model(stored.root)


def submit_export(
    session: Session,
    model: CustomModel,
    arn: str,
    output: str,
    format: str,
    merged: bool | None = None,
    quantization: str | None = None,
) -> ModelExport:
    """Queue an export of ``model`` to the address ``output``, in the caller's transaction.

    ``arn`` is the model's ARN. See :mod:`luthier.exports.export` for the other arguments.

    Raises:
        RecipeError: if the model is not ``Active``, or for wrong settings.
    """
    from luthier.exports.export import check_settings

    check_settings(format, merged, quantization)
    _stored_id(model)
    lock_by_name(session, f"submit {model.account}")
    return exports.create_export(session, model, arn, output, format, merged, quantization)


def submit_report(
    session: Session,
    table: type[Report],
    account: str,
    request: Mapping[str, Any],
    models: Sequence[MeasuredModel],
    limits: AccountQuotas | None = None,
    **columns: Any,
) -> Report:
    """Queue an evaluation, comparison or study, in the caller's transaction.

    Raises:
        QuotaExceeded: if the account has too much such work, or no space for a report.
    """
    limits = limits or AccountQuotas()
    lock_by_name(session, f"submit {account}")
    storage.check_count(
        in_flight(session, table, account), limits, "jobs_in_flight",
        f"unfinished {table.plural}", "Wait, or stop some of them.",
    )  # fmt: skip
    storage.check(session, account, limits, stored_bytes=1)
    return create(session, table, account, request, models, **columns)


def recipe_of(submission: Submission, job_id: str) -> Recipe:
    """Return the recipe of a job, with addresses as data.

    Raises:
        RecipeError: for invalid fields.
    """
    # These modules import all objectives, which would delay the start of the server.
    from luthier.recipe import Recipe, parse
    from luthier.workflows.distil.recipe import DistilRecipe

    fields = _settings(submission.settings)
    # Runs of all accounts share a folder, so the name is the random id, and not the client's name.
    fields["name"] = run_name(job_id)
    fields["base"] = _stored_id(submission.base)
    data = {"train": submission.training[0], **fields.get("data", {})}
    if not submission.hold_out and not submission.validators:
        data.setdefault("validation_share", 0.0)
    # Validation rows that are also training rows are a warning: the client chose both.
    data["severity"] = {"leakage.many": "warning", **data.get("severity", {})}
    fields["data"] = data
    training = dict(fields.get("training", {}))
    cores = os.cpu_count() or 1
    # Fixed in the recipe, because the number of threads changes the bits of the model.
    training.setdefault("threads", min(cores, MOST_CORES))
    if isinstance(training["threads"], int) and training["threads"] > cores:
        raise RecipeError(f"`training.threads` exceeds the {cores} cores of the server")
    fields["training"] = training
    objective = dict(fields.get("objective", {}))
    kind = submission.customization_type
    if kind == DISTILLATION:
        if submission.teacher is None:
            raise RecipeError("a distillation needs a teacher")
        fields["teacher"] = {**fields.get("teacher", {}), "model": _stored_id(submission.teacher)}
    elif kind == REINFORCEMENT:
        if submission.grader is None:
            raise RecipeError("reinforcement fine-tuning needs a grader")
        objective = {"method": "grpo", **objective, "grader": dict(submission.grader)}
    elif kind == CONTINUED_PRE_TRAINING:
        method = "causal_lm" if writes(submission.base) else "masked_lm"
        objective = {"method": method, **objective}
    elif kind != FINE_TUNING:
        raise RecipeError(f"unknown customization type {kind!r}. Choose one of {', '.join(TYPES)}")
    elif (own := sole_objective(kind_of(submission.base))) is not None:
        objective = {"method": own, **objective}
    # Without a method, the rows decide: preferences are trained with DPO.
    if objective:
        fields["objective"] = objective
    root = root_of(submission.base)
    if root is not None and begins_random(root.base):
        # The engine's default, stated for the view of the job.
        fields.setdefault("adaptation", {"method": "full"})
    recipe = parse(DistilRecipe if kind == DISTILLATION else Recipe, fields)
    if kind != DISTILLATION and recipe.objective is not None and recipe.objective.other_models:
        raise RecipeError(f"objective {recipe.objective.method} needs DISTILLATION and a teacher")
    return recipe


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request.

    The APIs resolve models, graders and teachers, because these belong to accounts.

    Raises:
        RecipeError: for fields that a request may not set.
    """
    data, teacher = settings.get("data", {}), settings.get("teacher", {})
    refused = [key for key in settings if key not in (*_GROUPS, "data")]
    for group in ("objective", "insights", "sampling"):
        named = settings.get(group, {})
        refused += [
            # A nested table could name a model or an address of another account, which only the
            # APIs resolve.
            f"{group}.{key}"
            for key in named
            if key in _NAMING or _contains_mapping(named[key])
        ]
    refused += [f"data.{key}" for key in data if key not in SETTABLE_DATA]
    refused += [f"teacher.{key}" for key in teacher if key not in _TEACHER]
    refused += [f"forgetting.{key}" for key in settings.get("forgetting", {}) if key == "probes"]
    if refused:
        raise RecipeError(f"a customization job cannot set {', '.join(refused)}")
    return dict(settings)


def _contains_mapping(value: Any) -> bool:
    """Return whether a value may contain a field of :data:`_NAMING`."""
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value)
    )


def _check_free(session: Session, table: type[Job | CustomModel], account: str, name: str) -> None:
    """Raise :class:`NameInUse` if a job or model of the account has the name."""
    taken = select(table.id).where(table.account == account, table.name == name)
    if session.scalar(taken) is not None:
        raise NameInUse("job" if table is Job else "model")


def _check_model_quota(session: Session, account: str, limits: AccountQuotas) -> None:
    """Raise :class:`QuotaExceeded` if the account has reached the quota of models."""
    storage.check_count(
        count_rows(session, CustomModel.account == account), limits, "custom_models",
        "custom models, unfinished models included", "Delete some models.",
    )  # fmt: skip
    # The model will count as stored: report a full quota now, not hours later.
    storage.check(session, account, limits, stored_bytes=1)


def _flush(session: Session, kind: str) -> None:
    try:
        session.flush()
    except IntegrityError as error:
        raise NameInUse(kind) from error


def _reserve_model(submission: Submission, job: Job) -> CustomModel:
    # Imported models have no foundation model that would tell the kind.
    kind = submission.base.details.get("kind") if isinstance(submission.base, CustomModel) else None
    return CustomModel(
        id=new_id(),
        account=job.account,
        name=job.model_name,
        foundation=job.foundation,
        root=submission.base.root,
        base_model=job.base_model,
        job_id=job.id,
        openai_id=submission.openai_id,
        status=RESERVED,
        details={"kind": kind} if kind else {},
        created=job.created,
    )


def _stored_id(model: AnyModel) -> str:
    """Return the id of a model in the library."""
    if isinstance(model, FoundationModel):
        return model.base
    if model.status != ACTIVE or model.stored_id is None:
        fix = "Choose another model" if model.status == FAILED else "Wait until the state is Active"
        raise RecipeError(f"custom model {model.name} is {model.status}. {fix}")
    return model.stored_id
