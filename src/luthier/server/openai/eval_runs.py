"""Data sources and tasks of eval runs: read rows, query the model, grade replies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import RefusedInput, RowRefused
from luthier.files import numbered_lines
from luthier.graders import (
    Answer,
    Grader,
    GraderModels,
    JsonSchema,
    ScoreModel,
    grader_from,
)
from luthier.graders.templates import (
    check_template,
    fill_template,
    names_nothing,
    places_in,
    value_at,
)
from luthier.limits import ServerLimits
from luthier.models.sampling import Constraint
from luthier.server.http.messages import Caller, Fault
from luthier.server.openai.chat import ChatRequest
from luthier.server.openai.eval_runner import (
    MOST_ROW_BYTES,
    MOST_ROWS,
    EvaluationTask,
    parse_row,
)
from luthier.server.openai.generation import STRUCTURED, Answers, Judge
from luthier.server.openai.graders import graded_once, grader_fields, text_content
from luthier.server.openai.protocol import Body, error_of, invalid, missing, validate
from luthier.server.tables import evaluations as store
from luthier.server.tables.evaluations import EvaluationRun, GradedRow
from luthier.server.tables.uploaded_files import UploadedFiles

MOST_CRITERIA = 32
MOST_MISMATCH = 300
"""Maximum length of a schema error in characters: jsonschema repeats the whole value."""
TOKENS, TEMPERATURE, TOP_P, SEED = 2048, 1.0, 1.0, 42
"""Default sampling parameters."""

Label = Annotated[str, Field(min_length=1, max_length=256)]
"""Name of an eval or a run."""


class ContentRow(Body):
    """A row in the request."""

    item: dict[str, Any]
    sample: dict[str, Any] | None = None


class FileContent(Body):
    """Source of rows in the request."""

    type: Literal["file_content"]
    content: Annotated[list[ContentRow], Field(min_length=1, max_length=MOST_ROWS)]


class FileId(Body):
    """Source of rows in an uploaded file."""

    type: Literal["file_id"]
    id: Annotated[str, Field(min_length=1)]


class Stored(Body):
    """Source of replies that OpenAI stores. Always rejected: luthier stores no replies."""

    type: Literal["stored_completions", "responses"]


class TemplateMessage(Body):
    """A message with template placeholders."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | dict[str, Any] | list[str | dict[str, Any]]


class Template(Body):
    """Messages with placeholders, the same for all rows."""

    type: Literal["template"]
    template: Annotated[list[TemplateMessage], Field(min_length=1, max_length=100)]


class ItemReference(Body):
    """Reference to the messages in each row."""

    type: Literal["item_reference"]
    item_reference: str


class SamplingParameters(Body):
    """Sampling parameters of a run."""

    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    """Output format, in the form of chat completions."""
    text: dict[str, Any] | None = None
    """Output format, in the form of responses (member ``format``)."""
    tools: list[dict[str, Any]] | None = None
    structured_outputs: dict[str, Any] | None = None
    """Output format, in vLLM's form."""


class DataSource(Body):
    """Source of rows, and the model and messages of a run."""

    type: Literal["jsonl", "completions", "responses"]
    source: Annotated[FileContent | FileId | Stored, Field(discriminator="type")]
    input_messages: Annotated[Template | ItemReference, Field(discriminator="type")] | None = None
    model: Annotated[str, Field(min_length=1)] | None = None
    sampling_params: SamplingParameters | None = None

    @property
    def sampling(self) -> SamplingParameters:
        """Sampling parameters of the request, or the defaults."""
        return self.sampling_params or SamplingParameters()

    def check(self, item_schema: Mapping[str, Any]) -> None:
        """Reject unsupported sources, and templates that no row of the schema can fill."""
        if isinstance(self.source, Stored):
            text = (
                "Answers are not kept here: send rows as 'file_content', or as the 'file_id' of an "
                "upload with one JSON object of 'item' (and 'sample') a line."
            )
            raise invalid(text, "data_source.source.type", "unsupported_value")
        if self.type == "jsonl":
            return
        for name in ("model", "input_messages"):
            if getattr(self, name) is None:
                raise missing(f"data_source.{name}")
        for place, template in self._templates():
            try:
                check_template(template, sampled=False)
            except ValueError as error:
                raise invalid(f"{error}.", place, "invalid_value") from error
            check_places(template, item_schema, place)
        self._probe.check()

    def check_constraint(self, check: Callable[[Constraint, str], None]) -> None:
        """Call ``check`` with the constraint on replies and the constraint's location, if the run
        has a constraint."""
        if self.type == "jsonl" or not (constraint := self._probe.constraint):
            return
        form = "text.format.schema" if self.type == "responses" else "response_format"
        if self.sampling.structured_outputs is not None:
            form = STRUCTURED
        check(constraint, f"data_source.sampling_params.{form}")

    @property
    def _probe(self) -> ChatRequest:
        """Chat request with the parameters of the run, used to check the parameters."""
        probe = self.chat_body([{"role": "user", "content": "-"}])
        return validate(probe, ChatRequest, "data_source.sampling_params")

    def _templates(self) -> Iterator[tuple[str, str]]:
        where = "data_source.input_messages"
        if isinstance(self.input_messages, ItemReference):
            yield f"{where}.item_reference", "{{" + self.input_messages.item_reference + "}}"
        elif self.input_messages is not None:
            for index, message in enumerate(self.input_messages.template):
                text = text_content(message.content)
                place = f"{where}.template[{index}].content"
                if not isinstance(text, str):
                    raise invalid("Models that are evaluated here read text alone.", place)
                yield place, text

    def messages(self, row: Answer) -> list[dict[str, Any]]:
        """Return the messages for a row.

        Raises:
            RowRefused: If the row lacks a value of a placeholder, or the text is too long.
            Fault: If ``item_reference`` is not a list of messages.
        """
        scope = {"item": row.row.members or {}}
        if isinstance(self.input_messages, ItemReference):
            found = value_at(self.input_messages.item_reference, scope)
            if isinstance(found, str):
                return [{"role": "user", "content": found}]
            if not isinstance(found, list):
                text = f"{self.input_messages.item_reference} is no list of messages."
                raise invalid(text, "data_source.input_messages")
            return found
        assert self.input_messages is not None  # see check()
        return [
            {
                "role": each.role,
                "content": fill_template(text_content(each.content), scope, row),
            }
            for each in self.input_messages.template
        ]

    def chat_body(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the body of a chat completion for ``messages``."""
        sampling = self.sampling
        form, tools = sampling.response_format, sampling.tools
        if self.type == "responses":
            form = (sampling.text or {}).get("format")
            if isinstance(form, dict) and form.get("type") == "json_schema":
                inner = {name: value for name, value in form.items() if name != "type"}
                form = {"type": "json_schema", "json_schema": inner}
            tools = tools and [
                {
                    "type": each.get("type"),
                    "function": {name: value for name, value in each.items() if name != "type"},
                }
                for each in tools
            ]
        given: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_completion_tokens": sampling.max_completion_tokens or TOKENS,
            "temperature": TEMPERATURE if sampling.temperature is None else sampling.temperature,
            "top_p": TOP_P if sampling.top_p is None else sampling.top_p,
            "seed": SEED if sampling.seed is None else sampling.seed,
            "response_format": form,
            "structured_outputs": sampling.structured_outputs,
            "tools": tools,
        }
        return {name: value for name, value in given.items() if value is not None}


def check_places(given: Any, item_schema: Any, where: str) -> None:
    """Reject placeholders in ``given`` that no row of the schema can fill.

    Raises:
        Fault: 400, with the location of the template below ``where``.
    """
    if isinstance(given, str):
        for place in places_in(given):
            if names_nothing(place, {"properties": {"item": item_schema}}):
                text = f"{{{{{place}}}}} names what no row that matches item_schema can have."
                raise invalid(text, where, "invalid_value")
    elif isinstance(given, Mapping):
        for name, each in given.items():
            check_places(each, item_schema, f"{where}.{name}")
    elif isinstance(given, list | tuple):
        for index, each in enumerate(given):
            check_places(each, item_schema, f"{where}[{index}]")


@dataclass(frozen=True)
class Criterion:
    """A grader and the pass threshold."""

    name: str
    type: str
    grader: Grader
    threshold: float

    def open(self, models: GraderModels) -> Criterion:
        """Return the criterion with loaded models."""
        grader = self.grader.with_models(models) if self.grader.models else self.grader
        return replace(self, grader=grader)


def criteria_of(
    given: Sequence[Mapping[str, Any]], judge: Judge, item_schema: Mapping[str, Any]
) -> list[Criterion]:
    """Parse ``testing_criteria``; ``judge`` finds the models of graders.

    Raises:
        Fault: 400, naming the criterion and the error.
    """
    found: dict[str, Criterion] = {}
    for index, each in enumerate(given):
        where = f"testing_criteria[{index}]"
        grader: Grader = grader_from(grader_fields(each, where, judge))
        name = each.get("name")
        if not isinstance(name, str) or not name or len(name) > 256:
            text = "A criterion needs a 'name' of 1 to 256 characters."
            raise invalid(text, f"{where}.name", "missing_required_parameter")
        if name in found:
            text = f"Two criteria are called '{name}': results could not be told apart."
            raise invalid(text, f"{where}.name", "invalid_value")
        for member in ("input", "reference", "graders"):
            check_places(each.get(member), item_schema, f"{where}.{member}")
        found[name] = Criterion(name, each["type"], grader, _threshold(each, grader, where))
    return list(found.values())


def _threshold(given: Mapping[str, Any], grader: Grader, where: str) -> float:
    """Return the pass threshold. OpenAI documents no default; the default here is the middle of the
    range."""
    threshold = given.get("pass_threshold")
    if given["type"] in ("string_check", "label_model"):
        return 1.0
    if threshold is None and given["type"] == "text_similarity":
        raise missing(f"{where}.pass_threshold")
    if threshold is None:
        return sum(grader.range) / 2 if isinstance(grader, ScoreModel) else 0.5
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise invalid("A threshold is a number.", f"{where}.pass_threshold", "invalid_type")
    highest = grader.range[1] if isinstance(grader, ScoreModel) else math.inf
    if grader.is_share:
        highest = min(highest, 1.0)
    try:
        if math.isfinite(threshold) and threshold <= highest:
            return float(threshold)
    except OverflowError:
        pass
    most = f" of at most {highest:g}, the highest score" if highest < math.inf else ""
    text = f"A threshold is a number{most}: no row could pass."
    raise invalid(text, f"{where}.pass_threshold", "invalid_value")


@dataclass(frozen=True)
class EvalParts:
    """Services that eval tasks use."""

    files: UploadedFiles
    answers: Answers
    """Return the chat completion for a body."""
    judges: Callable[[str], Judge]
    """Return the function that finds grading models of an account."""
    models: GraderModels
    limits: ServerLimits


class EvalTask(EvaluationTask):
    """Task of a run of an eval."""

    def __init__(self, parts: EvalParts, run: EvaluationRun, caller: Caller) -> None:
        """Raise :class:`Fault` if a grading model is deleted or forbidden."""
        self.parts, self.run = parts, run
        request = run.request
        self.source = validate(request["data_source"], DataSource, "data_source")
        self.schema = JsonSchema(against=request["item_schema"])
        judge, names = parts.judges(caller.account), dict[str, str]()

        def find(name: str, where: str) -> str:
            stored = judge(name, where)
            names.setdefault(stored, name)
            return stored

        self.criteria = [
            each.open(parts.models)
            for each in criteria_of(request["testing_criteria"], find, request["item_schema"])
        ]
        if self.source.model is not None:
            # If the evaluated model is deleted, each row reports the error.
            try:
                names[judge(self.source.model, "data_source.model")] = self.source.model
            except Fault as fault:
                if fault.code == "AccessDenied":
                    raise
        self.model_names = names

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the result of comparing each row with the eval's schema."""
        return ((f"row {number}", self._problem(line)) for number, line in self._lines())

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield row numbers and rows with ``item`` and ``sample``."""
        for number, line in self._lines():
            yield number, json.loads(line)

    def grade(self, caller: Caller, number: int, row: Any) -> GradedRow:
        """Query the model, if the run has a model, and grade the reply."""
        item = row["item"]
        answer = self._answer(number, item, "")
        if self.source.type == "jsonl":
            sample = _given_sample(row.get("sample") or {})
        else:
            try:
                messages = self.source.messages(answer)
            except RowRefused as refused:
                raise invalid(refused.problem.message) from refused
            body = self.source.chat_body(messages)
            sample = _sample(body, self.parts.answers(caller.account, body))
        text = "".join(each["content"] or "" for each in sample["output"])
        results = [self._result(each, self._answer(number, item, text)) for each in self.criteria]
        statuses = {each["name"]: _status(each) for each in results}
        worst = next(
            (each for each in (store.ERROR, store.FAIL) if each in statuses.values()), None
        )
        record = {"item": item, "results": results, "sample": sample}
        return GradedRow(worst or store.PASS, record, statuses)

    def error_row(self, row: Any, fault: Fault) -> GradedRow:
        """Return a result with the error and an empty sample."""
        told = error_of(fault)
        error = {"code": told["code"] or told["type"], "message": told["message"]}
        sample = _empty_sample(self.source.model or "") | {"error": error, "finish_reason": "error"}
        return GradedRow(store.ERROR, {"item": row["item"], "results": [], "sample": sample})

    def _answer(self, number: int, item: Mapping[str, Any], reply: str) -> Answer:
        row = PromptOnly("item", number, "", members=item)
        return Answer((), reply, None, row, self.parts.limits.grading_text_characters)

    def _result(self, criterion: Criterion, answer: Answer) -> dict[str, Any]:
        score, parts, trouble = graded_once(criterion.grader, answer)
        passed = trouble is None and score >= criterion.threshold
        found: dict[str, Any] = {
            "name": criterion.name,
            "type": criterion.type,
            "score": score,
            "passed": passed,
            "sample": None,
        }
        if parts:
            found["sub_scores"] = parts
        if trouble is not None:
            found["error"] = {"code": trouble.rule, "message": trouble.problem.message}
        return found

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        source = self.source.source
        if isinstance(source, FileContent):
            given = self.run.request["data_source"]["source"]["content"]
            yield from ((n, json.dumps(row).encode()) for n, row in enumerate(given, 1))
        elif isinstance(source, FileId):
            row = self.parts.files.get(self.run.account, source.id)
            if row is None:
                raise RefusedInput(f"The file {source.id} is gone.")
            yield from numbered_lines(self.parts.files.read(row), MOST_ROW_BYTES)

    def _problem(self, line: bytes) -> str:
        """Return the problem of a row, or an empty string."""
        try:
            row = parse_row(line)
        except ValueError as error:
            return str(error)
        if not isinstance(row, dict) or not isinstance(row.get("item"), dict):
            return "it needs an object 'item'."
        sample = row.get("sample") or {}
        if not isinstance(sample, dict) or not isinstance(sample.get("output_text", ""), str):
            return "'sample' is an object with a text 'output_text'."
        try:
            mismatch = self.schema.first_error(row["item"])
        except (TimeoutError, ValueError) as slow:
            raise RefusedInput(f"The item_schema cannot be applied: {slow}.") from slow
        if mismatch is None:
            return ""
        short = mismatch if len(mismatch) <= MOST_MISMATCH else f"{mismatch[:MOST_MISMATCH]}…"
        return f"'item' does not match item_schema: {short}."


def _status(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return store.ERROR
    return store.PASS if result["passed"] else store.FAIL


def _empty_sample(model: str) -> dict[str, Any]:
    """Return a sample with all members and no reply."""
    return {
        "input": [],
        "output": [],
        "finish_reason": "",
        "model": model,
        "usage": {
            "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cached_tokens": 0,
        },
        "error": None,
        "temperature": TEMPERATURE,
        "max_completion_tokens": 0,
        "top_p": TOP_P,
        "seed": SEED,
    }  # fmt: skip


def _given_sample(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample of a row that contains a reply."""
    text = given.get("output_text")
    output = [] if text is None else [{"role": "assistant", "content": text}]
    return _empty_sample("") | {"output": output}


def _sample(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample of a chat request and completion."""
    (choice,), usage = answered["choices"], answered["usage"]
    message = choice["message"]
    output = {"role": "assistant", "content": message["content"] or ""}
    if "tool_calls" in message:
        output["tool_calls"] = message["tool_calls"]
    return {
        "input": [
            {"role": each["role"], "content": text_content(each.get("content")) or ""}
            for each in asked["messages"]
        ],
        "output": [output],
        "finish_reason": choice["finish_reason"],
        "model": asked["model"],
        "usage": {name: usage[name] for name in
                  ("prompt_tokens", "completion_tokens", "total_tokens")} | {"cached_tokens": 0},
        "error": None,
        **{name: asked[name] for name in ("temperature", "max_completion_tokens", "top_p", "seed")},
    }  # fmt: skip
