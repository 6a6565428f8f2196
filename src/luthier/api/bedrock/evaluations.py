"""Evaluation jobs: create, get, list, stop, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.api.bedrock.control import (
    ControlRequest,
    ListColumns,
    Operate,
    failure_message,
    invalid,
    list_answer,
    not_found,
    page,
    tags_of,
)
from luthier.api.bedrock.evaluation_tasks import (
    ACCURACIES,
    ACCURACY,
    ROBUSTNESS,
    TOXICITY,
    JobParts,
    JobTask,
    ModelJobTask,
    converse_members,
)
from luthier.api.bedrock.rag_evaluation import RagJobTask, RagSource
from luthier.api.evaluations import EvaluationRunner
from luthier.api.http.messages import Caller, Fault
from luthier.api.identifiers import EVALUATION, find_evaluation, invocable, invoked_arn
from luthier.graders.rubrics import BEDROCK_METRICS
from luthier.store import evaluations as store
from luthier.store import storage, tags
from luthier.store.database import new_id
from luthier.store.evaluations import EvaluationRun
from luthier.store.models import find, writes

FACE = "bedrock"
MODEL, RAG = "ModelEvaluation", "RagEvaluation"
_AUTOMATED = (ACCURACY, ROBUSTNESS)
_STATUS = {
    store.QUEUED: "InProgress",
    store.IN_PROGRESS: "InProgress",
    store.COMPLETED: "Completed",
    store.FAILED: "Failed",
    store.CANCELED: "Stopped",
}
_SHOWN = (
    "jobDescription",
    "roleArn",
    "customerEncryptionKeyId",
    "applicationType",
    "evaluationConfig",
    "inferenceConfig",
    "outputDataConfig",
)
"""Members that are told again."""
_COLUMNS = ListColumns(EvaluationRun.created, EvaluationRun.seq, EvaluationRun.name)


def job_task(parts: JobParts, run: EvaluationRun, caller: Caller) -> JobTask:
    """The task of a job; raises :class:`Fault` where a model is gone, or may not be asked any more."""
    kind = RagJobTask if run.application == RAG else ModelJobTask
    return kind(parts, run, caller)


def create_job(request: ControlRequest) -> dict[str, Any]:
    """Put a job into the queue; the same token gives the same job."""
    request.allow_kind(EVALUATION)
    answer = request.earlier_answer()
    if answer is not None:
        return answer
    runner = _runner(request)
    job_tags = tags_of(request.get("jobTags"))
    automated, application = _automated_config(request), _application(request)
    judges = automated.get("evaluatorModelConfig", {}).get("bedrockEvaluatorModels", ())
    source = None
    if application == RAG:
        source = RagSource.of(request["inferenceConfig"])
        if not judges:
            text = "A RAG system is evaluated by a judge: name it in evaluatorModelConfig."
            raise invalid("evaluatorModelConfig", text)
    else:
        _check_model(request, request["inferenceConfig"]["models"])
    for judge in judges:
        _check_invocable(request, judge["modelIdentifier"])
    for config in automated["datasetMetricConfigs"]:
        _check_set(config)
        if source is not None:
            kind = "retrieve-and-generate" if source.generates else "retrieve-only"
            _check_metrics(config, tuple(source.rubrics), f"of {kind} jobs")
        elif judges:
            _check_metrics(config, tuple(BEDROCK_METRICS), "with evaluatorModelConfig")
        else:
            _check_metrics(config, _AUTOMATED, "without evaluatorModelConfig")
            _check_task_type(config)
        location = config["dataset"]["datasetLocation"]["s3Uri"]
        request.control.locations.check(request.account, location)
    output = request["outputDataConfig"]["s3Uri"]
    request.control.locations.check_writable(request.account, output)

    def make(session: Session) -> dict[str, Any]:
        storage.lock(session, request.account)  # of two jobs of one name the second sees the first
        name = request["jobName"]
        taken = select(EvaluationRun.seq).where(*_mine(request), EvaluationRun.name == name)
        if session.scalar(taken) is not None:
            raise Fault("Conflict", "The provided job name is currently in use.")
        job = runner.create(
            session,
            request.request.caller,
            face=FACE,
            name=name,
            request=request.members_sent(_SHOWN),
            application=application,
            run_id=new_id(),
        )
        arn = _arn(request, job)
        tags.put(session, arn, job_tags)
        return {"jobArn": arn}

    answer = request.once(make)
    runner.wake()
    return answer


def _automated_config(request: ControlRequest) -> Mapping[str, Any]:
    """The configuration of what is computed here; all else is refused in words."""
    config = request["evaluationConfig"]
    if "human" in config:
        raise invalid("evaluationConfig", "There are no people here who could evaluate.")
    automated: Mapping[str, Any] = config["automated"]
    if "customMetricConfig" in automated:
        text = "customMetricConfig is not supported by this server; use the metrics of a judge."
        raise invalid("customMetricConfig", text)
    return automated


def _application(request: ControlRequest) -> str:
    """What is evaluated, as ``inferenceConfig`` has it and ``applicationType`` may say once more."""
    member = next(iter(request["inferenceConfig"]))
    found = RAG if member == "ragConfigs" else MODEL
    if request.get("applicationType", found) != found:
        raise invalid("applicationType", f"With {member} in inferenceConfig it is {found}.")
    return found


def _check_model(request: ControlRequest, models: list[Mapping[str, Any]]) -> None:
    if len(models) != 1:
        text = "A job evaluates one model: make one for each, on the same data sets."
        raise invalid("inferenceConfig", text)
    model = models[0].get("bedrockModel")
    if model is not None:
        converse_members(model.get("inferenceParams"))
        _check_invocable(request, model["modelIdentifier"])
        return
    configs = request["evaluationConfig"]["automated"]["datasetMetricConfigs"]
    if any(ROBUSTNESS in config["metricNames"] for config in configs):
        text = f"{ROBUSTNESS} asks a model again: it needs bedrockModel in inferenceConfig."
        raise invalid("metricNames", text)


def _check_invocable(request: ControlRequest, identifier: str) -> None:
    arn = invoked_arn(request.arns, identifier)
    request.control.authorize(request.request.caller, "bedrock:InvokeModel", arn)
    found = invocable(request.control.database, request.arns, request.account, identifier)
    if not writes(find(found.stored_id)):
        raise invalid("modelIdentifier", f"The model {identifier} writes no text.")


def _check_set(config: Mapping[str, Any]) -> None:
    """Refuse data sets that are not had here, with what there is."""
    data = config["dataset"]
    if data["name"] in (".", ".."):
        raise invalid("dataset", "A data set is a folder of results: it cannot be called so.")
    if "datasetLocation" not in data:
        text = (
            f"The data set {data['name']} is AWS's own and not here: name rows of yours by "
            "datasetLocation."
        )
        raise invalid("dataset", text)


def _check_metrics(config: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse metrics that are not among the ``known``, which are those ``where`` this job is."""
    names = config["metricNames"]
    if len(set(names)) != len(names):
        raise invalid("metricNames", "A metric is named twice.")
    for name in names:
        if name == TOXICITY:
            text = (
                f"{TOXICITY} needs a classifier of toxic language, which is not here; a judge grades "
                "Builtin.Harmfulness."
            )
            raise invalid("metricNames", text)
        if name not in known:
            text = f"There is no metric {name} {where}; there are {', '.join(known)}."
            raise invalid("metricNames", text)


def _check_task_type(config: Mapping[str, Any]) -> None:
    """Refuse types of tasks whose accuracy is not computed here."""
    task_type = config["taskType"]
    generated = config["metricNames"] == [ROBUSTNESS] and task_type == "Generation"
    if not generated and task_type not in ACCURACIES:
        reason = "is a BERTScore" if task_type == "Summarization" else "is not defined"
        text = (
            f"Accuracy of the task type {task_type} {reason}, and not computed here; there are "
            f"{', '.join(ACCURACIES)}, and the metrics of a judge."
        )
        raise invalid("taskType", text)


def get_job(request: ControlRequest) -> dict[str, Any]:
    """One job by its ARN."""
    with request.control.database.read() as session:
        job = _evaluation_job(request, session, request["jobIdentifier"])
        failure = failure_message(job.error_message)
        return {
            "jobArn": _arn(request, job),
            "jobName": job.name,
            "status": _STATUS[job.status],
            "jobType": "Automated",
            "creationTime": job.created,
            "lastModifiedTime": job.completed or job.created,
            "failureMessages": [failure] if failure else None,
            **job.request,
            "applicationType": job.application,
        }


def list_jobs(request: ControlRequest) -> dict[str, Any]:
    """Jobs of the account by creation."""
    request.allow("*")
    query = select(EvaluationRun).where(
        *_mine(request),
        *_COLUMNS.conditions(request),
    )
    if application := request.get("applicationTypeEquals"):
        query = query.where(EvaluationRun.application == application)
    if status := request.get("statusEquals"):
        states = [state for state, shown in _STATUS.items() if shown == status]
        query = query.where(EvaluationRun.status.in_(states))
    with request.control.database.read() as session:
        rows, token = page(request, session, query, _COLUMNS)
        summaries = [_summary(request, job) for job in rows]
    return list_answer("jobSummaries", summaries, token)


def stop_job(request: ControlRequest) -> dict[str, Any]:
    """Stop a job: nothing more happens to one that is stopped."""
    with request.control.database.write() as session:
        job = _evaluation_job(request, session, request["jobIdentifier"], lock=True)
        if job.status in (store.COMPLETED, store.FAILED):
            raise Fault("Conflict", f"The job {job.name} is {_STATUS[job.status]}.")
        if job.status != store.CANCELED:
            store.end(job, store.CANCELED)
    _runner(request).wake()
    return {}


def delete_jobs(request: ControlRequest) -> dict[str, Any]:
    """Forget jobs that have ended; their results stay in the bucket."""
    errors, deleted = [], []
    for identifier in request["jobIdentifiers"]:
        request.allow(identifier)
    with request.control.database.write() as session:
        for identifier in dict.fromkeys(request["jobIdentifiers"]):
            job = find_evaluation(session, request.arns, request.account, identifier, lock=True)
            if job is None:
                text = f"Could not find evaluation job {identifier}."
                errors.append(_error(identifier, "ResourceNotFoundException", text))
            elif job.status not in store.ENDED:
                text = f"The job {job.name} is {_STATUS[job.status]}: stop it first."
                errors.append(_error(identifier, "ConflictException", text))
            else:
                store.delete_run(session, job)
                tags.drop(session, identifier)
                deleted.append({"jobIdentifier": identifier, "jobStatus": "Deleting"})
    return {"errors": errors, "evaluationJobs": deleted}


def _error(identifier: str, code: str, message: str) -> dict[str, Any]:
    return {"jobIdentifier": identifier, "code": code, "message": message}


def _evaluation_job(
    request: ControlRequest, session: Session, identifier: str, *, lock: bool = False
) -> EvaluationRun:
    request.allow(identifier)
    found = find_evaluation(session, request.arns, request.account, identifier, lock=lock)
    if found is None:
        raise not_found("evaluation job", identifier)
    return found


def _summary(request: ControlRequest, job: EvaluationRun) -> dict[str, Any]:
    members = job.request
    automated = members["evaluationConfig"]["automated"]
    judges = automated.get("evaluatorModelConfig", {}).get("bedrockEvaluatorModels", ())
    inference, models = _inference_summary(members["inferenceConfig"]), None
    if "modelConfigSummary" in inference:
        models = inference["modelConfigSummary"].get("bedrockModelIdentifiers")
    types = dict.fromkeys(each["taskType"] for each in automated["datasetMetricConfigs"])
    return {
        "jobArn": _arn(request, job),
        "jobName": job.name,
        "status": _STATUS[job.status],
        "creationTime": job.created,
        "jobType": "Automated",
        "evaluationTaskTypes": list(types),
        "modelIdentifiers": models,
        "evaluatorModelIdentifiers": [each["modelIdentifier"] for each in judges] or None,
        "inferenceConfigSummary": inference,
        "applicationType": job.application,
    }


def _inference_summary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is evaluated, by its identifiers."""
    if "ragConfigs" in config:
        source = RagSource.of(config).identifier
        return {"ragConfigSummary": {"precomputedRagSourceIdentifiers": [source]}}
    (model,) = config["models"]
    if "bedrockModel" in model:
        models = {"bedrockModelIdentifiers": [model["bedrockModel"]["modelIdentifier"]]}
    else:
        source = model["precomputedInferenceSource"]["inferenceSourceIdentifier"]
        models = {"precomputedInferenceSourceIdentifiers": [source]}
    return {"modelConfigSummary": models}


def _mine(request: ControlRequest) -> tuple[Any, ...]:
    return EvaluationRun.account == request.account, EvaluationRun.face == FACE


def _arn(request: ControlRequest, job: EvaluationRun) -> str:
    return request.arns.of(job.account, EVALUATION, job.id)


def _runner(request: ControlRequest) -> EvaluationRunner:
    runner = request.control.evaluations
    if runner is None:
        raise Fault("Validation", f"{request.operation.name} is not supported by this server.")
    return runner


OPERATIONS: dict[str, Operate] = {
    "CreateEvaluationJob": create_job,
    "GetEvaluationJob": get_job,
    "ListEvaluationJobs": list_jobs,
    "StopEvaluationJob": stop_job,
    "BatchDeleteEvaluationJob": delete_jobs,
}
