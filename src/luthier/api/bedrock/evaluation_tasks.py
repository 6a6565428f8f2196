"""What an evaluation job of Bedrock does: rows of data sets, answers, metrics, results in the bucket.

Automated metrics compare with a reference; those of a judge are grades by a rubric
(:mod:`luthier.graders.rubrics`). What needs AWS's own data sets, a BERT or a classifier of toxic
language is refused when the job is made.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from luthier.api.bedrock import converse
from luthier.api.bedrock.bodies import NativeBody, parsed_native
from luthier.api.bedrock.shapes import body_members, operation_models
from luthier.api.evaluations import MOST_ROW_BYTES, EvaluationTask, parse_row
from luthier.api.http.messages import Caller, Fault, inference_faults
from luthier.api.http.routing import Authorize
from luthier.api.identifiers import ModelIds
from luthier.chat_models.base import SamplingSpec
from luthier.data.shapes.conversations import PromptOnly
from luthier.encryption.files import pieces_of
from luthier.errors import LocationRefused
from luthier.evaluation.robustness import perturbations, word_error_rate
from luthier.files import numbered_lines
from luthier.graders import Answer, Exact, Grader, GraderModels, Judge, StringCheck, TextSimilarity
from luthier.graders.judge import parse_verdict, verdict_trouble
from luthier.graders.rubrics import BEDROCK_METRICS, FAULTS, RUBRICS
from luthier.limits import ServerLimits
from luthier.serving.pool import ModelPool
from luthier.store import evaluations as store
from luthier.store.evaluations import EvaluationRun, GradedRow
from luthier.store.locations import Locations
from luthier.types import Message

ACCURACY, ROBUSTNESS, TOXICITY = "Builtin.Accuracy", "Builtin.Robustness", "Builtin.Toxicity"
MAX_TOKENS = 512
"""Of an answer where ``inferenceParams`` does not say."""
VERDICT_TOKENS = 256
"""Of a verdict, which is a sentence or two and a number."""
ALTERNATIVE = "<OR>"
"""Stands between references of which any may be right."""
_SPACE = uuid.UUID("8f0c6f0e-3d3c-4a59-9f7a-3a1c9d1b4b7e")
_REFERENCE = "{{item.expected}}"
ACCURACIES: Mapping[str, Grader] = {
    "Generation": StringCheck(reference=_REFERENCE, operation="ilike"),
    "QuestionAndAnswer": TextSimilarity(reference=_REFERENCE, evaluation_metric="rouge_1"),
    "Classification": Exact(ignore_case=True, ignore_punctuation=True),
}
"""How accuracy is computed, by the type of the task: whether the answer holds what is right, the F1 of
their words, whether they are the same label."""


def accuracy_of(task_type: str, response: str, reference: str) -> float:
    """From 0 to 1, by the reference that fits best."""
    row = PromptOnly("row", 1, "")
    return max(
        ACCURACIES[task_type].score(Answer((), response, each.strip(), row))
        for each in reference.split(ALTERNATIVE)
        if each.strip()
    )


class NativeParameters(NativeBody):
    """``inferenceParams`` without Converse's groups, as models name them."""

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    topP: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    maxTokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_gen_len: Annotated[int, Field(ge=1)] | None = None


def converse_members(inference_params: str | None) -> dict[str, Any]:
    """``inferenceParams`` as members of Converse; greedy, and of 512 tokens, where they do not say.

    Raises:
        Fault: Validation.
    """
    try:
        given = json.loads(inference_params) if inference_params else {}
    except ValueError:
        given = None
    if not isinstance(given, dict):
        text = 'inferenceParams has to be a JSON object, such as {"inferenceConfig": {…}}.'
        raise Fault("Validation", text, parameter="inferenceParams")
    groups = {"inferenceConfig", "additionalModelRequestFields"}
    if not given.keys() <= groups:
        native = parsed_native(NativeParameters, given).model_dump(exclude_none=True)
        tokens = next(
            (native[n] for n in ("maxTokens", "max_tokens", "max_gen_len") if n in native), None
        )
        config = {
            "temperature": native.get("temperature"),
            "topP": native.get("topP", native.get("top_p")),
            "maxTokens": tokens,
        }
        given = {"inferenceConfig": {k: v for k, v in config.items() if v is not None}}
    defaults = {"temperature": 0, "maxTokens": MAX_TOKENS}
    found = {**given, "inferenceConfig": {**defaults, **given.get("inferenceConfig", {})}}
    # As a whole request: what is wrong with it is said before the job is made.
    converse.generation_request(_request(found, "-"))
    return found


def _request(members: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    turn = {"role": "user", "content": [{"text": prompt}]}
    return body_members(operation_models()["Converse"], {**members, "messages": [turn]})


@dataclass(frozen=True)
class JobParts:
    """What the tasks of evaluation jobs stand on."""

    locations: Locations
    pool: ModelPool
    ids: ModelIds
    authorize: Authorize
    models: GraderModels
    """Opens the judge."""
    limits: ServerLimits

    def stored_id(self, caller: Caller, identifier: str) -> str:
        """The model that is asked, where the caller may.

        Raises:
            Fault: AccessDenied, ResourceNotFound, Validation.
        """
        self.check_right(caller, identifier)
        return self.ids.stored_id(caller.account, identifier)

    def check_right(self, caller: Caller, identifier: str) -> None:
        """Refuse who may not ask a model; raises :class:`Fault` AccessDenied."""
        self.authorize(caller, "bedrock:InvokeModel", self.ids.resource(identifier))


@dataclass(frozen=True)
class DataSet:
    """One data set of a job, and what is measured on it."""

    name: str
    task_type: str
    uri: str
    metrics: tuple[str, ...]

    @staticmethod
    def of(config: Mapping[str, Any]) -> DataSet:
        """From ``datasetMetricConfigs``."""
        data = config["dataset"]
        uri = data["datasetLocation"]["s3Uri"]
        return DataSet(data["name"], config["taskType"], uri, tuple(config["metricNames"]))

    @property
    def needs_reference(self) -> bool:
        """Whether each row has to say what is right."""
        return ACCURACY in self.metrics or (
            ROBUSTNESS in self.metrics and self.task_type != "Generation"
        )


class JobTask(EvaluationTask):
    """What the tasks of all jobs share: data sets, a judge, and results in the bucket."""

    noun, no_rows = "job", "The data sets have no rows."

    def __init__(
        self, parts: JobParts, run: EvaluationRun, caller: Caller, rubrics: Mapping[str, str]
    ) -> None:
        """``rubrics`` by the metrics of a judge.

        Raises:
            Fault: where a model is gone, or may not be asked any more.
        """
        self.parts, self.run = parts, run
        automated = run.request["evaluationConfig"]["automated"]
        self.sets = [DataSet.of(each) for each in automated["datasetMetricConfigs"]]
        self.model_names: dict[str, str] = {}
        self._identifiers: list[str] = []
        self.judges, self.judge_name = dict[str, Judge](), ""
        for each in automated.get("evaluatorModelConfig", {}).get("bedrockEvaluatorModels", ()):
            self.judge_name = each["modelIdentifier"]
            judge_id = self._stored_id(caller, self.judge_name)
            self.judges = {
                metric: Judge(
                    model=judge_id,
                    rubric=RUBRICS[rubric],
                    sampling=SamplingSpec(max_tokens=VERDICT_TOKENS),
                ).with_models(parts.models)
                for metric, rubric in rubrics.items()
            }
        self._files = ExitStack()

    def source_hash(self) -> str:
        """SHA-256 of the lines of all data sets, which lie in buckets."""
        found = hashlib.sha256()
        for _, place, _, line in self._lines():
            found.update(b"%d:%d:" % (place, len(line)) + line)
        return found.hexdigest()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Rows of all data sets, by the lines of their files."""
        for _, place, line_of, line in self._lines():
            yield line_of, self._line_problem(self.sets[place], line)

    def rows(self) -> Iterator[tuple[int, Any]]:
        """The number of a data set, and a record of it."""
        for number, place, _, line in self._lines():
            yield number, (place, json.loads(line))

    def grade(self, caller: Caller, number: int, row: Any) -> GradedRow:
        """Measure one row, where the caller may still ask the models."""
        for identifier in self._identifiers:
            self.parts.check_right(caller, identifier)
        place, record = row
        line, scores = self.measure(self.sets[place], record)
        statuses: dict[str, str] = {}
        for score in scores:
            if score["result"] is None:
                statuses[score["metricName"]] = store.ERROR
            statuses.setdefault(score["metricName"], store.PASS)
        worst = store.ERROR if store.ERROR in statuses.values() else store.PASS
        return GradedRow(worst, {"set": place, "line": line}, statuses)

    def error_row(self, row: Any, fault: Fault) -> GradedRow:
        """The record, and why there is no answer to it."""
        place, record = row
        line = self.error_line(record)
        line["error"] = {"errorCode": fault.code, "errorMessage": fault.message}
        return GradedRow(store.ERROR, {"set": place, "line": line})

    def finish(self, run: EvaluationRun, rows: Iterator[store.EvaluationRow]) -> None:
        """Write the lines of each data set where Bedrock writes them."""
        with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
            paths = [Path(folder) / str(place) for place in range(len(self.sets))]
            opened = [files.enter_context(path.open("wb")) for path in paths]
            for row in rows:
                record = row.record
                line = json.dumps(record["line"], ensure_ascii=False).encode()
                opened[record["set"]].write(line + b"\n")
            files.close()
            output = run.request["outputDataConfig"]["s3Uri"]
            for place, (data, path) in enumerate(zip(self.sets, paths, strict=True)):
                # By a name that follows from the job: written again after a crash, it is one file.
                name = f"{uuid.uuid5(_SPACE, f'{run.id}/{place}')}_output.jsonl"
                where = f"{run.name}/{run.id}/{self.folder(data)}/datasets/{data.name}/{name}"
                try:
                    self.parts.locations.write(run.account, output, where, path)
                except LocationRefused as refused:
                    text = f"The rows were graded, but results could not be written: {refused}"
                    raise LocationRefused(text) from refused

    def close(self) -> None:
        """Let the copies of the data sets go."""
        self._files.close()

    @abstractmethod
    def problem(self, data: DataSet, record: Any) -> str:
        """What is wrong with a row, and what would be right; empty where nothing is."""

    @abstractmethod
    def measure(
        self, data: DataSet, record: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
        """The line of results of a row, and the scores in it.

        Raises:
            Fault: where a model gave no answer.
        """

    @abstractmethod
    def error_line(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The line of a row that could not be measured."""

    @abstractmethod
    def folder(self, data: DataSet) -> str:
        """Where the results of a data set lie below those of the job."""

    def judge(self, metric: str, answers: Sequence[Answer], none: str = "") -> dict[str, Any]:
        """The mean of a judge's grades, and its reasons; no result where a verdict has no score.

        ``none`` is said where there are no answers.
        """
        judge = self.judges[metric]
        verdicts = judge.verdicts([judge.question(each) for each in answers]) if answers else ()
        points, reasons = list[int](), list[str]()
        for verdict in verdicts:
            found = parse_verdict(verdict) if isinstance(verdict, str) else None
            if found is not None:
                points.append(found)
            if isinstance(verdict, str) and found is not None:
                reasons.append(verdict)
            else:
                reasons.append(verdict_trouble("judge", verdict).message)
        result = (fmean(points) - 1) / 9 if points and len(points) == len(verdicts) else None
        if result is not None and metric in FAULTS:
            result = 1 - result
        if len(reasons) > 1:
            reasons = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
        return self.judge_score(metric, result, "\n\n".join(reasons) or none)

    def judge_score(self, metric: str, result: float | None, explanation: str) -> dict[str, Any]:
        """A score as Bedrock writes those of a judge."""
        detail = {"modelIdentifier": self.judge_name, "explanation": explanation}
        return {"metricName": metric, "result": result, "evaluatorDetails": [detail]}

    def _stored_id(self, caller: Caller, identifier: str) -> str:
        """The model behind an identifier, which rows of the job ask."""
        stored_id = self.parts.stored_id(caller, identifier)
        self.model_names[stored_id] = identifier
        self._identifiers.append(identifier)
        return stored_id

    @cached_property
    def _paths(self) -> list[list[Path]]:
        """Copies of the data sets, for as long as the task is there."""
        folder = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for place, data in enumerate(self.sets):
            (folder / str(place)).mkdir()
            copies = self.parts.locations.fetch(self.run.account, data.uri, folder / str(place))
            found.append([path for _, path in copies])
        return found

    def _lines(self) -> Iterator[tuple[int, int, str, bytes]]:
        """Lines of all data sets: their numbers from 1 through all of them, places, names and bytes."""
        number = 0
        for place, paths in enumerate(self._paths):
            for path in paths:
                file = f" ({path.name})" if len(paths) > 1 else ""
                for row, line in numbered_lines(pieces_of(path), MOST_ROW_BYTES):
                    number += 1
                    yield number, place, f"{self.sets[place].name}{file}, row {row}", line

    def _line_problem(self, data: DataSet, line: bytes) -> str:
        try:
            record = parse_row(line, self.parts.limits.json_values)
        except ValueError as error:
            return str(error)
        return self.problem(data, record)


class ModelJobTask(JobTask):
    """The task of a job that evaluates a model, or answers that come with the rows."""

    def __init__(self, parts: JobParts, run: EvaluationRun, caller: Caller) -> None:
        """Raises :class:`Fault` where a model is gone, or may not be asked any more."""
        super().__init__(parts, run, caller, BEDROCK_METRICS)
        (model,) = run.request["inferenceConfig"]["models"]
        self.stored_id, self.asked = None, dict[str, Any]()
        if "bedrockModel" in model:
            self.identifier = model["bedrockModel"]["modelIdentifier"]
            self.asked = converse_members(model["bedrockModel"].get("inferenceParams"))
            self.stored_id = self._stored_id(caller, self.identifier)
        else:
            self.identifier = model["precomputedInferenceSource"]["inferenceSourceIdentifier"]

    def measure(
        self, data: DataSet, record: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
        """Ask the model, where answers do not come with the rows, and measure what it said."""
        if self.stored_id is None:
            response = record["modelResponses"][0]["response"]
        else:
            response = self._ask(record["prompt"])
        scores = [self._score(data, metric, record, response) for metric in data.metrics]
        return self._line(record, response, scores), scores

    def error_line(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Without a response."""
        return self._line(record, None, [])

    def folder(self, data: DataSet) -> str:
        """By the model and the type of the task."""
        return f"models/{self.identifier.rpartition('/')[2]}/taskTypes/{data.task_type}"

    def problem(self, data: DataSet, record: Any) -> str:
        """What is wrong with a prompt, its reference, and the response that it brings."""
        if not isinstance(record, dict) or not _is_text(record.get("prompt")):
            return "it needs a text 'prompt'."
        reference = record.get("referenceResponse")
        if reference is not None and not isinstance(reference, str):
            return "'referenceResponse' has to be a text."
        if data.needs_reference and not _is_text(reference):
            return "it needs a 'referenceResponse', as its metrics compare with it."
        if self.stored_id is not None:
            return ""
        responses = record.get("modelResponses")
        if not isinstance(responses, list) or len(responses) != 1:
            return "it needs 'modelResponses' with one response, as no model is asked."
        (response,) = responses
        if not isinstance(response, dict) or not isinstance(response.get("response"), str):
            return "its response has to be a text."
        if response.get("modelIdentifier") != self.identifier:
            return f"its modelIdentifier is not the inferenceSourceIdentifier {self.identifier}."
        return ""

    def _line(
        self, record: Mapping[str, Any], response: str | None, scores: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        responses = (
            [] if response is None else [{"response": response, "modelIdentifier": self.identifier}]
        )
        return {
            "automatedEvaluationResult": {"scores": list(scores)},
            "inputRecord": {k: v for k, v in record.items() if k != "modelResponses"},
            "modelResponses": responses,
        }

    def _ask(self, prompt: str) -> str:
        assert self.stored_id is not None
        request = converse.generation_request(_request(self.asked, prompt))
        if request.seed is None:
            request = replace(request, seed=0)
        with inference_faults():
            (answer,) = self.parts.pool.submit(self.stored_id, request).whole()
        return answer.text

    def _score(
        self, data: DataSet, metric: str, record: Mapping[str, Any], response: str
    ) -> dict[str, Any]:
        reference = record.get("referenceResponse") or ""
        if metric in self.judges:
            row = PromptOnly("row", 1, record["prompt"])
            turns = (Message("user", record["prompt"]),)
            return self.judge(metric, [Answer(turns, response, reference or None, row)])
        if metric == ACCURACY:
            score = accuracy_of(data.task_type, response, reference)
        else:
            score = self._robustness(data.task_type, record["prompt"], reference, response)
        return {"metricName": metric.removeprefix("Builtin."), "result": score}

    def _robustness(self, task_type: str, prompt: str, reference: str, response: str) -> float:
        """By how much answers change with the prompt: words of texts, else the accuracy."""
        answers = [self._ask(other) for other in perturbations(prompt)]
        if not answers:
            return 0.0
        if task_type == "Generation":
            return fmean(word_error_rate(each, response) for each in answers)
        right = accuracy_of(task_type, response, reference)
        return fmean(abs(right - accuracy_of(task_type, each, reference)) for each in answers)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
