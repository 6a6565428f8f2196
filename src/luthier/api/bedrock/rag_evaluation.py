"""Evaluation jobs of RAG systems: rows bring what was retrieved, and maybe what was answered from it.

A judge grades each turn by rubrics (:mod:`luthier.graders.rubrics`). The form of the rows and of the
results is Bedrock's for precomputed RAG sources; no knowledge base is asked, as there are none here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from luthier.api.bedrock.evaluation_tasks import DataSet, JobParts, JobTask
from luthier.api.http.messages import Caller, CheckedBody, Fault
from luthier.data.shapes.conversations import PromptOnly
from luthier.graders import Answer
from luthier.graders.rubrics import BEDROCK_RAG_METRICS, BEDROCK_RETRIEVAL_METRICS
from luthier.store.evaluations import EvaluationRun
from luthier.types import Message
from luthier.validation import describe_error, expected_type

MOST_TURNS = 5
"""Of a row; of one that shows what was retrieved alone, Bedrock takes a single turn."""
MOST_PASSAGES = 100
"""Retrieved, and cited, by a turn: a judge may be asked about each."""
MOST_PROBLEMS = 3
"""What is wrong with a row beyond is not told."""
RELEVANCE, COVERAGE = "Builtin.ContextRelevance", "Builtin.ContextCoverage"
FAITHFULNESS = "Builtin.Faithfulness"
PRECISION, CITED = "Builtin.CitationPrecision", "Builtin.CitationCoverage"
_HINTS = {
    "conversationTurns": "a list of turns with a prompt and an output",
    "conversationTurns.prompt": 'as {"content": [{"text": "…"}]}',
    "conversationTurns.output": "what your system retrieved and answered; no knowledge base is asked",
    "conversationTurns.output.knowledgeBaseIdentifier": "the ragSourceIdentifier of the job",
}
"""What a member is, by its place."""


class RowPart(CheckedBody):
    """A part of a row. Further members are let be, and written with the results."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextContent(RowPart):
    """A text."""

    text: str


class TextBlocks(RowPart):
    """A prompt or a reference."""

    content: Annotated[list[TextContent], Field(min_length=1)]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(each.text for each in self.content)


class Passage(RowPart):
    """A text that was retrieved."""

    content: TextContent


class RetrievalResults(RowPart):
    """All that was retrieved for a turn."""

    retrievalResults: Annotated[list[Passage], Field(max_length=MOST_PASSAGES)]


class TextResponsePart(RowPart):
    """A part of an answer."""

    text: str


class ResponsePart(RowPart):
    """The same."""

    textResponsePart: TextResponsePart


class Citation(RowPart):
    """A part of an answer, and the passages that it cites."""

    generatedResponsePart: ResponsePart
    retrievedReferences: list[Passage]


class Output(RowPart):
    """What a RAG system gave."""

    knowledgeBaseIdentifier: str
    text: str | None = None
    retrievedResults: RetrievalResults | None = None
    """As Bedrock calls them where nothing is generated."""
    retrievedPassages: RetrievalResults | None = None
    """The same where something is."""
    citations: Annotated[list[Citation], Field(max_length=MOST_PASSAGES)] | None = None

    @property
    def passages(self) -> list[str] | None:
        """Texts that were retrieved, by either name: one file may be evaluated both ways."""
        found = self.retrievedPassages or self.retrievedResults
        return None if found is None else [each.content.text for each in found.retrievalResults]

    @property
    def cited_passages(self) -> list[tuple[str, str]]:
        """Each passage that is cited, behind the part of the answer that cites it."""
        return [
            (citation.generatedResponsePart.textResponsePart.text, passage.content.text)
            for citation in self.citations or ()
            for passage in citation.retrievedReferences
        ]


class ConversationTurn(RowPart):
    """A request, what would be right, and what came."""

    prompt: TextBlocks
    referenceResponses: list[TextBlocks] | None = None
    output: Output

    @property
    def reference(self) -> str | None:
        """What is right; several are all right."""
        return "\n\nor\n\n".join(each.text for each in self.referenceResponses or ()) or None


class RagRow(RowPart):
    """A conversation."""

    conversationTurns: Annotated[list[ConversationTurn], Field(min_length=1, max_length=MOST_TURNS)]


@dataclass(frozen=True)
class RagSource:
    """The RAG system whose results are evaluated."""

    identifier: str
    generates: bool
    """Whether it answered, beside what it retrieved."""

    @staticmethod
    def of(inference_config: Mapping[str, Any]) -> RagSource:
        """From ``inferenceConfig``.

        Raises:
            Fault: Validation, for a knowledge base.
        """
        (config,) = inference_config["ragConfigs"]
        if "precomputedRagSourceConfig" not in config:
            text = (
                "There are no knowledge bases here: bring what your RAG system retrieved and answered "
                "with the rows, and name it in precomputedRagSourceConfig."
            )
            raise Fault("Validation", text, parameter="inferenceConfig")
        ((kind, source),) = config["precomputedRagSourceConfig"].items()
        return RagSource(source["ragSourceIdentifier"], kind == "retrieveAndGenerateSourceConfig")

    @property
    def rubrics(self) -> Mapping[str, str]:
        """What it can be measured by."""
        return BEDROCK_RAG_METRICS if self.generates else BEDROCK_RETRIEVAL_METRICS


class RagJobTask(JobTask):
    """The task of a job that evaluates a RAG system."""

    def __init__(self, parts: JobParts, run: EvaluationRun, caller: Caller) -> None:
        """Raises :class:`Fault` where the judge is gone, or may not be asked any more."""
        self.source = RagSource.of(run.request["inferenceConfig"])
        super().__init__(parts, run, caller, self.source.rubrics)

    def problem(self, data: DataSet, record: Any) -> str:
        """What is wrong with the form of a row, or what its metrics need and is not there."""
        try:
            row = RagRow.model_validate(record)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            return f"{'; '.join(map(_describe, found[:MOST_PROBLEMS]))}."
        return next(self._problems(data.metrics, row), "")

    def _problems(self, metrics: Sequence[str], row: RagRow) -> Iterator[str]:
        if not self.source.generates and len(row.conversationTurns) > 1:
            yield "conversationTurns has several turns; what is retrieved alone is one turn a row."
        for number, turn in enumerate(row.conversationTurns):
            where, output = f"conversationTurns[{number}]", turn.output
            if not turn.prompt.text.strip():
                yield f"{where}.prompt has no text."
            if output.knowledgeBaseIdentifier != self.source.identifier:
                yield (
                    f"{where}.output.knowledgeBaseIdentifier is not the ragSourceIdentifier of the "
                    f"job, {self.source.identifier}."
                )
            if self.source.generates and output.text is None:
                yield f"{where}.output.text is required: the answer, which is graded."
            if output.passages is None and (not self.source.generates or FAITHFULNESS in metrics):
                name = "retrievedPassages" if self.source.generates else "retrievedResults"
                yield (
                    f"{where}.output.{name}.retrievalResults is required: the passages that were "
                    "retrieved, or [] where none were."
                )
            if COVERAGE in metrics and not turn.reference:
                yield f"{where}.referenceResponses is required, as {COVERAGE} compares with it."
            if output.citations is None and not {PRECISION, CITED}.isdisjoint(metrics):
                yield (
                    f"{where}.output.citations is required by the metrics of citations, or [] where "
                    "nothing is cited."
                )
            if len(output.cited_passages) > MOST_PASSAGES:
                yield f"{where}.output.citations cites more than {MOST_PASSAGES} passages."

    def measure(
        self, data: DataSet, record: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
        """Have each turn graded, behind the turns before it."""
        before: list[Message] = []
        results = []
        for turn in RagRow.model_validate(record).conversationTurns:
            before.append(Message("user", turn.prompt.text))
            results.append([self._score(metric, turn, tuple(before)) for metric in data.metrics])
            before.append(Message("assistant", turn.output.text or ""))
        line = {
            "conversationTurns": [
                {**turn, "results": scores}
                for turn, scores in zip(_turns(record), results, strict=True)
            ]
        }
        return line, [score for scores in results for score in scores]

    def error_line(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Without results."""
        return {"conversationTurns": [{**turn, "results": []} for turn in _turns(record)]}

    def folder(self, data: DataSet) -> str:
        """By the number of the RAG source, of which there is one."""
        return "inference_configs/0"

    def _score(
        self, metric: str, turn: ConversationTurn, asked: Sequence[Message]
    ) -> dict[str, Any]:
        """One metric of one turn; what is counted by passages is their mean."""
        output = turn.output
        passages, reply = output.passages or [], output.text or ""

        def answer(
            graded: str, by: Sequence[str] | None = None, reference: str | None = None
        ) -> Answer:
            return Answer(asked, graded, reference, PromptOnly("row", 1, ""), passages=by)

        if metric == RELEVANCE:
            return self.judge(metric, [*map(answer, passages)], "No passages were retrieved.")
        if metric == COVERAGE:
            if not passages:
                return self.judge_score(metric, 0.0, "No passages were retrieved.")
            return self.judge(metric, [answer("\n\n".join(passages), reference=turn.reference)])
        if metric == FAITHFULNESS:
            return self.judge(metric, [answer(reply, passages)])
        if metric == PRECISION:
            parts = [answer(part, [passage]) for part, passage in output.cited_passages]
            return self.judge(metric, parts, "The answer cites nothing.")
        if metric == CITED:
            cited = dict.fromkeys(passage for _, passage in output.cited_passages)
            return self.judge(metric, [answer(reply, [*cited])])
        return self.judge(metric, [answer(reply, reference=turn.reference)])


def _turns(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns as they stand in the results: what was given, and what the RAG system made of it."""
    return [
        {
            "inputRecord": {name: value for name, value in turn.items() if name != "output"},
            "output": turn["output"],
        }
        for turn in record["conversationTurns"]
    ]


def _describe(error: Mapping[str, Any]) -> str:
    """What is wrong at one place of a row, and what belongs there."""
    place = ""
    for part in error["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    hint = _HINTS.get(".".join(part for part in error["loc"] if isinstance(part, str)))
    text = f"{place.removeprefix('.') or 'it'}{describe_error(error)}"
    return (
        f"{text}: {hint}" if hint and (error["type"] == "missing" or expected_type(error)) else text
    )
