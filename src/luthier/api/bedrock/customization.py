"""CreateModelCustomizationJob: from members of a request to a job in the queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from luthier.api.bedrock import hyperparameters
from luthier.api.bedrock.control import Request, not_found, tags_of
from luthier.api.bedrock.foundation import customizations
from luthier.api.bedrock.identifiers import (
    JOB,
    find_foundation,
    find_model,
    job_arn,
)
from luthier.api.wire import Fault
from luthier.jobs.submit import (
    DISTILLATION,
    FINE_TUNING,
    REINFORCEMENT,
    BaseModel,
    Submission,
    submit,
)
from luthier.store import tags
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.foundation import FoundationModel

_CONFIGS = {DISTILLATION: "distillationConfig", REINFORCEMENT: "rftConfig"}
"""Which member of ``customizationConfig`` a type needs; the others take none."""
_SHOWN = (
    "clientRequestToken",
    "roleArn",
    "customModelKmsKeyId",
    "trainingDataConfig",
    "outputDataConfig",
    "customizationConfig",
    "vpcConfig",
)
"""Members that are told again."""


def create_job(request: Request) -> dict[str, Any]:
    """Put a job into the queue; the same token gives the same job."""
    request.allow_kind(JOB)
    answer = request.replayed()
    if answer is not None:
        return answer
    job_tags, model_tags = tags_of(request.get("jobTags")), tags_of(request.get("customModelTags"))
    asked = _submission(request)
    for uri in (*asked.training, *asked.validators):
        request.control.locations.check(request.account, uri)
    if asked.output is not None:
        request.control.locations.check_writable(request.account, asked.output)

    limits = request.control.quotas(request.account)

    def make(session: Session) -> dict[str, Any]:
        job = submit(session, asked, request.arns, limits)
        arn = job_arn(request.arns, job)
        tags.put(session, arn, job_tags)
        reserved = session.query(CustomModel).filter_by(job_id=job.id).one()
        # The model has them from its first moment.
        tags.put(session, reserved.arn(request.arns), model_tags)
        return {"jobArn": arn}

    answer = request.once(make)
    request.control.submitted()
    return answer


def _submission(request: Request) -> Submission:
    kind = request.get("customizationType", FINE_TUNING)
    config = _config(kind, request.get("customizationConfig"))
    sent = request.get("hyperParameters", {})
    shown, settings = hyperparameters.read(sent)
    teacher, grader, typed = None, None, {}
    if kind == DISTILLATION:
        teacher = _teacher(request, config["teacherModelConfig"])
        longest = config["teacherModelConfig"].get("maxResponseLengthForInference")
        if longest is not None:
            settings = hyperparameters.merged(settings, _longest_answer(longest))
    elif kind == REINFORCEMENT:
        grader = _grader(request, config)
        typed = config.get("hyperParameters", {})
        settings = hyperparameters.merged(settings, hyperparameters.read_rft(typed))
        # Defaults that the typed ones replace are not shown.
        shown |= {name: str(typed[name]) for name in (shown.keys() & typed.keys()) - sent.keys()}
    members = {name: request[name] for name in _SHOWN if name in request.members}
    validation = request.get("validationDataConfig", {"validators": []})
    return Submission(
        account=request.account,
        face="bedrock",
        job_name=request["jobName"],
        model_name=request["customModelName"],
        customization_type=kind,
        base=_base(request, kind),
        training=[_training(request["trainingDataConfig"])],
        validators=[each["s3Uri"] for each in validation["validators"]],
        settings=settings,
        teacher=teacher,
        grader=grader,
        output=request["outputDataConfig"]["s3Uri"],
        request={**members, "hyperParameters": shown},
        without_effect=hyperparameters.without_effect(typed),
    )


def _config(kind: str, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The member of ``customizationConfig`` that belongs to ``kind``; empty where it takes none."""
    if kind == "IMPORTED":
        raise _invalid("customizationType", "IMPORTED is of imported models; no job makes one.")
    needed = _CONFIGS.get(kind)
    found = next(iter(given), None) if given else None
    if found != needed:
        wanted = f"needs {needed}" if needed else "takes none"
        raise _invalid("customizationConfig", f"The customization type {kind} {wanted}.")
    config: Mapping[str, Any] = given[found] if given and found else {}
    return config


def _base(request: Request, kind: str) -> BaseModel:
    identifier = request["baseModelIdentifier"]
    base = find_foundation(request.arns, identifier)
    if base is not None:
        supported = customizations(base)
        if kind not in (*supported, *[REINFORCEMENT] * base.writes):
            known = ", ".join(supported)
            text = f"The base model {base.id} does not support {kind}; it supports {known}."
            raise _invalid("customizationType", text)
        return base
    with request.control.database.read() as session:
        model = find_model(session, request.arns, request.account, identifier)
    if model is None:
        raise not_found("base model", identifier)
    if model.status != ACTIVE:
        text = f"The base model {identifier} is {model.status}; wait until it is Active."
        raise _invalid("baseModelIdentifier", text)
    return model


def _training(config: Mapping[str, Any]) -> str:
    if "invocationLogsConfig" in config:
        raise _invalid(
            "trainingDataConfig", "invocationLogsConfig is not supported by this server."
        )
    if "s3Uri" not in config:
        raise _invalid("trainingDataConfig", "trainingDataConfig needs s3Uri.")
    return str(config["s3Uri"])


def _teacher(request: Request, config: Mapping[str, Any]) -> FoundationModel:
    identifier = config["teacherModelIdentifier"]
    found = find_foundation(request.arns, identifier)
    if found is None:
        raise not_found("teacher model", identifier)
    if not found.writes:
        raise _invalid("customizationConfig", f"The teacher {found.id} does not write text.")
    return found


def _longest_answer(tokens: int) -> dict[str, dict[str, Any]]:
    if tokens < 1:
        text = "maxResponseLengthForInference has to be at least 1."
        raise _invalid("customizationConfig", text)
    return {"sampling": {"max_tokens": tokens}}


def _grader(request: Request, config: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        function = config["graderConfig"]["lambdaGrader"]["lambdaArn"]
    except KeyError as error:
        raise _invalid("customizationConfig", "rftConfig needs a lambdaGrader.") from error
    found = request.control.grader(request.account, function)
    if found is None:
        text = f"No grader is registered with this server under {function}."
        raise _invalid("customizationConfig", text)
    return found


def _invalid(parameter: str, text: str) -> Fault:
    return Fault("Validation", text, parameter=parameter)
