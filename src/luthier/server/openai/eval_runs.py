"""Requests for eval runs: sources of rows, messages for the model, and grading criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.graders import Answer, Grader, GraderModels, ScoreModel, grader_from
from luthier.graders.templates import check_template, fill_template, value_at
from luthier.models.decoding.sampling import Constraint
from luthier.server.openai.chat import ChatRequest
from luthier.server.openai.generation import STRUCTURED, Judge
from luthier.server.openai.graders import grader_fields, text_content
from luthier.server.openai.protocol import Body, invalid, missing, validate

MOST_ROWS = 50_000
"""Maximum number of rows of a run."""
MOST_CRITERIA = 32
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
    source: Annotated[FileContent | FileId, Field(discriminator="type")]
    input_messages: Annotated[Template | ItemReference, Field(discriminator="type")] | None = None
    model: Annotated[str, Field(min_length=1)] | None = None
    sampling_params: SamplingParameters | None = None

    @property
    def sampling(self) -> SamplingParameters:
        """Sampling parameters of the request, or the defaults."""
        return self.sampling_params or SamplingParameters()

    def check(self) -> None:
        """Reject missing members, invalid templates and invalid sampling parameters."""
        if self.type == "jsonl":
            return
        for name in ("model", "input_messages"):
            if getattr(self, name) is None:
                raise missing(f"data_source.{name}")
        for location, template in self._templates():
            try:
                check_template(template, sampled=False)
            except ValueError as error:
                raise invalid(f"{error}.", location, "invalid_value") from error
        self._probe.check()

    def check_constraint(self, check: Callable[[Constraint, str], None]) -> None:
        """Call ``check`` with the constraint on replies and the constraint's location, if the run
        has a constraint."""
        if self.type == "jsonl" or not (constraint := self._probe.constraint):
            return
        member = "text.format.schema" if self.type == "responses" else "response_format"
        if self.sampling.structured_outputs is not None:
            member = STRUCTURED
        check(constraint, f"data_source.sampling_params.{member}")

    @property
    def _probe(self) -> ChatRequest:
        """Chat request with the parameters of the run, used to check the parameters."""
        # Chat completions check each parameter, so that both APIs accept the same values.
        probe = self.chat_body([{"role": "user", "content": "-"}])
        return validate(probe, ChatRequest, "data_source.sampling_params")

    def _templates(self) -> Iterator[tuple[str, str]]:
        where = "data_source.input_messages"
        if isinstance(self.input_messages, ItemReference):
            yield f"{where}.item_reference", "{{" + self.input_messages.item_reference + "}}"
        elif self.input_messages is not None:
            for index, message in enumerate(self.input_messages.template):
                text = text_content(message.content)
                location = f"{where}.template[{index}].content"
                if not isinstance(text, str):
                    raise invalid("Evals support text only. Remove images and audio.", location)
                yield location, text

    def messages(self, row: Answer) -> list[dict[str, Any]]:
        """Return the messages for a row.

        Raises:
            RowRefused: If the row lacks a value of a placeholder, or the text is too long.
            Fault: If ``item_reference`` is not a list of messages.
        """
        scope = {"item": row.row.members or {}}
        # OpenAI allows a text or a list in a row.
        if isinstance(self.input_messages, ItemReference):
            value = value_at(self.input_messages.item_reference, scope)
            if isinstance(value, str):
                return [{"role": "user", "content": value}]
            if not isinstance(value, list):
                text = f"{self.input_messages.item_reference} is not a list of messages."
                raise invalid(text, "data_source.input_messages", "invalid_messages")
            return value
        assert self.input_messages is not None  # see check()
        return [
            {
                "role": message.role,
                "content": fill_template(text_content(message.content), scope, row),
            }
            for message in self.input_messages.template
        ]

    def chat_body(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the body of a chat completion for ``messages``."""
        sampling = self.sampling
        response_format, tools = sampling.response_format, sampling.tools
        if self.type == "responses":
            response_format = (sampling.text or {}).get("format")
            if isinstance(response_format, dict) and response_format.get("type") == "json_schema":
                schema = _without_type(response_format)
                response_format = {"type": "json_schema", "json_schema": schema}
            tools = tools and [
                {"type": tool.get("type"), "function": _without_type(tool)} for tool in tools
            ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_completion_tokens": sampling.max_completion_tokens or TOKENS,
            "temperature": TEMPERATURE if sampling.temperature is None else sampling.temperature,
            "top_p": TOP_P if sampling.top_p is None else sampling.top_p,
            "seed": SEED if sampling.seed is None else sampling.seed,
            "response_format": response_format,
            "structured_outputs": sampling.structured_outputs,
            "tools": tools,
        }
        return {name: value for name, value in body.items() if value is not None}


def _without_type(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name != "type"}


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


class CriterionMembers(Body):
    """Members of a criterion that belong to no grader."""

    name: Label
    pass_threshold: float | None = None


def parse_criteria(criteria: Sequence[Mapping[str, Any]], judge: Judge) -> list[Criterion]:
    """Parse ``testing_criteria``; ``judge`` finds the models of graders.

    Raises:
        Fault: 400, naming the criterion and the error.
    """
    parsed: dict[str, Criterion] = {}
    for index, criterion in enumerate(criteria):
        where = f"testing_criteria[{index}]"
        grader: Grader = grader_from(grader_fields(criterion, where, judge))
        members = validate(criterion, CriterionMembers, where)
        if members.name in parsed:
            text = f"Two criteria have the name '{members.name}'. Rename one of them."
            raise invalid(text, f"{where}.name", "invalid_value")
        threshold = _threshold(criterion["type"], members.pass_threshold, grader, where)
        parsed[members.name] = Criterion(members.name, criterion["type"], grader, threshold)
    return list(parsed.values())


def _threshold(kind: str, given: float | None, grader: Grader, where: str) -> float:
    """Return the pass threshold.

    OpenAI documents no default; the default here is the middle of the range.
    """
    # These graders only know right and wrong.
    if kind in ("string_check", "label_model"):
        return 1.0
    lowest, highest = grader.range if isinstance(grader, ScoreModel) else (0.0, 1.0)
    if given is None and kind == "text_similarity":
        raise missing(f"{where}.pass_threshold")
    if given is None:
        return (lowest + highest) / 2
    if given > highest and (grader.is_share or isinstance(grader, ScoreModel)):
        text = f"No row can reach this threshold. The highest score is {highest:g}."
        raise invalid(text, f"{where}.pass_threshold", "invalid_value")
    return given
