"""From what a face was asked to work in the queue, a job, an import or an export: names, quota, recipe,
one transaction. A model of the command line becomes one of an account without any work.
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
from luthier.server.tables import exports, imports, storage
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import (
    ACTIVE,
    CREATING,
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
from luthier.server.tables.jobs import GOING_ON, QUEUED, Job, record, run_name
from luthier.server.tables.queue import in_flight, next_turn
from luthier.server.tables.removal import is_removed

if TYPE_CHECKING:
    from luthier.recipe import Recipe

FINE_TUNING, CONTINUED_PRE_TRAINING = "FINE_TUNING", "CONTINUED_PRE_TRAINING"
DISTILLATION, REINFORCEMENT = "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING, DISTILLATION, REINFORCEMENT)

_GROUPS = (
    "training", "adaptation", "objective", "sampling", "insights", "teacher", "method", "forgetting",
)  # fmt: skip
SETTABLE_DATA = (
    "long_rows", "validation_share", "group_column", "columns", "augmentation", "severity",
    "chat_template_kwargs",
)  # fmt: skip
"""Fields of a recipe that a request may set; the others name files, models or other machines."""
_TEACHER = ("batch_size",)
_NAMING = (
    "grader", "graders", "teacher", "judge", "reward", "model", "feature_model", "url",
)  # fmt: skip
"""Fields that name a model, an address or what grades."""
_GRADER_PARTS = {"mix": "parts", "multi": "graders"}
"""Graders made of others, and the field that holds them by name."""
CLIENT_GRADERS = (
    "exact", "first_line", "number", "regex", "similarity", "json_schema", "string_check",
    "text_similarity", "python", *_GRADER_PARTS,
)  # fmt: skip
"""Graders that clients of the service may write themselves: they score texts alone, in the sandbox
where they hold code. Others ask any model with the server's keys, or read files. Models that judge are
named through a face, which finds them for the account; whoever runs the server can register others."""
MOST_CORES = 16
"""Threads of one job where nothing is said; more hardly help networks of the sizes tuned here."""


@dataclass(frozen=True)
class Submission:
    """A customization job as a face understood it: checked for form, not yet for names and quota."""

    account: str
    face: str
    """``bedrock``, ``openai`` or ``native``."""
    job_name: str
    model_name: str
    customization_type: str
    """One of ``TYPES``."""
    base: AnyModel
    """A custom model is ``Active``."""
    training: Sequence[str]
    """Addresses of the training data."""
    validators: Sequence[str] = ()
    """Addresses of validation data; each is measured by itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe by group: ``{"training": {"epochs": 2}, "adaptation": {"rank": 8}}``."""
    teacher: AnyModel | None = None
    """Of a distillation."""
    grader: Mapping[str, Any] | None = None
    """Of reinforcement fine-tuning: ``method`` and fields of a grader."""
    output: str | None = None
    """Address below which metrics are written."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What the face shows again, ready for JSON."""
    without_effect: Sequence[str] = ()
    """What was asked, is shown again and changes nothing: the job's first events say so."""
    openai_id: str | None = None
    """``ft:…`` id that the model is to have."""
    priority: int = 0
    time_limit: int | None = None
    """Seconds of work at most."""


def submit(
    session: Session, submission: Submission, arns: Arns, limits: AccountQuotas | None = None
) -> Job:
    """Put a job into the queue and reserve the name of its model, in the caller's transaction.

    Raises:
        NameInUse: where the account has a job or a model of that name.
        QuotaExceeded: where it has too many jobs that have not ended, or too many models.
        RecipeError: for settings that no recipe can have.
    """
    limits = limits or AccountQuotas()
    lock_by_name(session, f"submit {submission.account}")
    _check_free(session, Job, submission.account, submission.job_name)
    _check_free(session, CustomModel, submission.account, submission.model_name)
    storage.check_count(
        in_flight(session, Job, submission.account), limits, "jobs_in_flight",
        "customization jobs that have not ended", "Wait for some of them, or stop them.",
    )  # fmt: skip
    _check_model_quota(session, submission.account, limits)
    job_id, moment = new_id(), now()
    recipe = recipe_of(submission, job_id)
    job = Job(
        id=job_id,
        account=submission.account,
        name=submission.job_name,
        model_name=submission.model_name,
        face=submission.face,
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
        turn=next_turn(session, Job, submission.account, Job.state.in_(GOING_ON)),
        cores=recipe.training.threads,
        time_limit=submission.time_limit,
        created=moment,
        modified=moment,
    )
    session.add(job)
    _flush(session, "job")
    session.add(_reserve_model(submission, job))
    _flush(session, "model")
    record(session, job.id, "state", "The job was created.", state=QUEUED)
    for text in submission.without_effect:
        record(session, job.id, "warning", text)
    return job


def check_client_grader(fields: Any) -> dict[str, Any]:
    """``fields`` of a grader, where a client may write them.

    Raises:
        RecipeError: for one that asks models or addresses, or reads files.
    """
    if isinstance(fields, str):
        fields = {"method": fields}
    method = fields.get("method") if isinstance(fields, Mapping) else None
    if method not in CLIENT_GRADERS:
        raise RecipeError(
            f"grader {method!r} cannot be used here; there are {', '.join(CLIENT_GRADERS)}"
        )
    checked = dict(fields)
    if method == "json_schema" and not isinstance(checked.get("against"), Mapping):
        raise RecipeError("grader json_schema: `against` is the schema itself, an object")
    if part := _GRADER_PARTS.get(method):
        inner = checked.get(part)
        if not isinstance(inner, Mapping):
            raise RecipeError(f"grader {method}: `{part}` holds graders by name")
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
    """Have a model copied from the folder ``source``, in the caller's transaction.

    ``request`` is what the API shows again. The chat template of a ``trusted`` model, which an
    administrator imports, is approved.

    Raises:
        NameInUse: where the account has a model of that name.
        QuotaExceeded: where it has all the models that it may have.
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
    """Give a model that the command line made to ``account``, in the caller's transaction.

    Nothing is copied: it is ``Active`` at once, and its files go when the account deletes it.

    Raises:
        QuotaExceeded: where it has all the models that it may have, or no room for this one.
        WrongState: where the model belongs to an account already, or was deleted by one.
        RecipeError: for a name that the faces do not take or that another model has, a base model, and
            a model that is withheld.
    """
    limits = limits or AccountQuotas()
    # Two accounts at once, too.
    lock_by_name(session, f"register {stored.id}")
    lock_by_name(session, f"submit {account}")
    if foundation_model(name) is not None:
        text = (
            f"{name} is a base model, which would answer in its place: give this one another name"
        )
        raise RecipeError(text)
    if len(name) > LONGEST_NAME or not re.fullmatch(NAME, name):
        raise RecipeError(
            f"a model of the service cannot be called {name!r}: give it another name, of letters and "
            f"digits with single hyphens or underscores between them, {LONGEST_NAME} characters at most"
        )
    if ":" not in stored.id or not is_recorded(stored):
        raise RecipeError(
            f"{stored.id} is a base model, which belongs to no account: those of the catalogue and of "
            "`luthier pretrain` are there for all"
        )
    check_active(stored)
    if is_removed(stored.id) or not (stored.folder / MANIFEST).is_file():
        raise WrongState(f"{stored.id} was deleted, and only models that were made from it need it")
    registered = session.scalar(select(CustomModel).filter_by(stored_id=stored.id))
    if registered is not None:
        raise WrongState(
            f"{stored.id} is registered already: it belongs to account {registered.account}, as "
            f"{registered.name}"
        )
    try:
        _check_free(session, CustomModel, account, name)
    except NameInUse as error:
        text = f"account {account} has a model {name}: give this one another name"
        raise RecipeError(text) from error
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
    storage.charge(session, account, limits, stored_bytes=model.stored_bytes or 0)
    return model


def _base_of(session: Session, account: str, stored: StoredModel) -> AnyModel | None:
    """What ``stored`` was made from, where ``account`` has that; else the foundation model below it."""
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
    """Have ``model``, whose ARN is ``arn``, written for other software, in the caller's transaction.

    Its files go below the address ``output``; the rest is as of ``luthier.exports.export``.

    Raises:
        RecipeError: for a model that is not ``Active``, and for settings that go with no model.
    """
    from luthier.exports.export import check_settings

    check_settings(format, merged, quantization)
    _stored_id(model)
    lock_by_name(session, f"submit {model.account}")
    return exports.create_export(session, model, arn, output, format, merged, quantization)


def recipe_of(submission: Submission, job_id: str) -> Recipe:
    """The recipe of a job; its data are addresses.

    Raises:
        RecipeError: naming each field that cannot be used.
    """
    # All objectives and adaptations: too much for the start of a server.
    from luthier.recipe import Recipe, parse
    from luthier.workflows.distil.recipe import DistilRecipe

    fields = _settings(submission.settings)
    fields["name"] = run_name(job_id)
    fields["base"] = _stored_id(submission.base)
    data = {"train": submission.training[0], **fields.get("data", {})}
    if not submission.validators:
        # Every row is there to be learned: nobody asked to hold some out.
        data.setdefault("validation_share", 0.0)
    # What people measure on is theirs to choose: the job says so, and goes on.
    data["severity"] = {"leakage.many": "warning", **data.get("severity", {})}
    fields["data"] = data
    training = dict(fields.get("training", {}))
    cores = os.cpu_count() or 1
    training.setdefault("threads", min(cores, MOST_CORES))
    if isinstance(training["threads"], int) and training["threads"] > cores:
        raise RecipeError(f"training.threads: there are {cores} cores")
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
        raise RecipeError(f"unknown customization type {kind!r}; there are {', '.join(TYPES)}")
    elif (own := sole_objective(kind_of(submission.base))) is not None:
        objective = {"method": own, **objective}
    # Fine-tuning goes by its rows: what is preferred is learned by DPO.
    if objective:
        fields["objective"] = objective
    root = root_of(submission.base)
    if root is not None and begins_random(root.base):
        # As the engine chooses where a recipe names none.
        fields.setdefault("adaptation", {"method": "full"})
    recipe = parse(DistilRecipe if kind == DISTILLATION else Recipe, fields)
    if kind != DISTILLATION and recipe.objective is not None and recipe.objective.other_models:
        raise RecipeError(f"objective {recipe.objective.method} needs DISTILLATION and a teacher")
    return recipe


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, where only fields are set that a request may set.

    Models, graders and teachers are never among them: whose they are is for the faces to find out.
    """
    data, teacher = given.get("data", {}), given.get("teacher", {})
    refused = [key for key in given if key not in (*_GROUPS, "data")]
    for group in ("objective", "insights", "sampling"):
        named = given.get(group, {})
        refused += [
            f"{group}.{key}" for key in named if key in _NAMING or _holds_mapping(named[key])
        ]
    refused += [f"data.{key}" for key in data if key not in SETTABLE_DATA]
    refused += [f"teacher.{key}" for key in teacher if key not in _TEACHER]
    refused += [f"forgetting.{key}" for key in given.get("forgetting", {}) if key == "probes"]
    if refused:
        raise RecipeError(f"a customization job cannot set {', '.join(refused)}")
    return dict(given)


def _holds_mapping(value: Any) -> bool:
    """Whether a value could hold a field of :data:`_NAMING` further down."""
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value)
    )


def _check_free(session: Session, table: type[Job | CustomModel], account: str, name: str) -> None:
    """Refuse a name that a job, or a model, of the account has."""
    taken = select(table.id).where(table.account == account, table.name == name)
    if session.scalar(taken) is not None:
        raise NameInUse("job" if table is Job else "model")


def _check_model_quota(session: Session, account: str, limits: AccountQuotas) -> None:
    """Refuse one more custom model where the account has all that it may have."""
    storage.check_count(
        count_rows(session, CustomModel.account == account), limits, "custom_models",
        "custom models, those in the making among them", "Delete some of them.",
    )  # fmt: skip
    # What it makes counts as stored: who has no room left would learn so hours later.
    storage.check(session, account, limits, stored_bytes=1)


def _flush(session: Session, kind: str) -> None:
    try:
        session.flush()
    except IntegrityError as error:
        raise NameInUse(kind) from error


def _reserve_model(submission: Submission, job: Job) -> CustomModel:
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
    """Id under which the store opens it."""
    if isinstance(model, FoundationModel):
        return model.base
    if model.status != ACTIVE or model.stored_id is None:
        raise RecipeError(f"custom model {model.name} is {model.status}; wait until it is Active")
    return model.stored_id
