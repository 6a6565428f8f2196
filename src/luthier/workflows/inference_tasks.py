"""Tasks of batch inference: a prediction, an embedding or a reply for each row of a file.

A task streams its source and answers rows by shard. Any process on machines of one kind gives a
shard the same bits, so the shards of a file together equal the output of a single process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

from luthier.data.files.parsing import Record
from luthier.data.files.writers import json_records, pack
from luthier.data.prompts import PREDICTED, stream_inputs, stream_prompts
from luthier.data.shapes.conversations import Conversation, PromptOnly
from luthier.errors import DataError, Location, Problem, RecipeError
from luthier.files import json_lines
from luthier.inference.embeddings import EMBEDDING, EmbeddingFormat, check_sides, embedding_line
from luthier.inference.explanation import explain as explain_label
from luthier.inference.inference import Chat
from luthier.inference.prediction import BLOCK_PROMPTS, BLOCK_ROWS, Predictor, keep_likeliest
from luthier.models.decoding.sampling import Sampling
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.inference.generation import GeneratedReply, Generator, Prompt
    from luthier.inference.prediction import Predictor
    from luthier.library.models import StoredModel

REASONING = "reasoning"
"""Key of the reasoning before a completion, in printed and written records."""
NUMBERS = "numbers"
"""Count of the numbers of all embeddings."""
TRUNCATED = "truncated"
"""Count of the rows that were longer than the context."""


@dataclass(frozen=True)
class InputRow:
    """A row of a source."""

    file: str
    line: int
    record: Record
    """Fields that are written next to the answer."""
    content: Any
    """Content for the model."""


@dataclass(frozen=True)
class ShardAnswer:
    """Output for the rows of a shard."""

    data: bytes
    counts: dict[str, int] = field(default_factory=dict)
    """Counts by name, such as anomalies."""


OnDone = Callable[[int], None]
"""Function of the number of answered rows."""
Answer = Callable[[Sequence[InputRow], OnDone], ShardAnswer]
"""Function that answers the rows of a shard; :class:`DataError` names every unanswerable row."""


@dataclass(frozen=True, kw_only=True)
class InferenceTask(ABC):
    """A model, a source of rows, and the kind of answer."""

    kind: ClassVar[str]
    shard_rows: ClassVar[int]
    answer_key: ClassVar[str]
    """Field of the answer, reserved in the rows."""

    model: str
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return plain values for :func:`parse_task`."""
        return {"kind": self.kind, **asdict(self)}

    def settings(self) -> dict[str, Any]:
        """Return the plain settings that decide an answer, without model and source."""
        return {key: value for key, value in self.plain().items() if key not in ("model", "source")}

    def rows(self, problems: list[Problem]) -> Iterator[InputRow]:
        """Yield the rows of the source in order; append problems to ``problems``."""
        for record, row in stream_inputs(self.source, problems, self.columns, self.answer_key):
            yield InputRow(row.file, row.line, record, row)

    def records(self, rows: Sequence[InputRow]) -> list[Record]:
        """Return the fields of ``rows`` that are written next to the answers.

        Raises:
            DataError: with every row that cannot be written or answered.
        """
        return json_records([(row.record, Location(row.file, row.line)) for row in rows])

    def needed_models(self) -> list[StoredModel]:
        """Return the models with required files."""
        from luthier.library.models import find

        return [find(self.model)]

    @abstractmethod
    def open(self) -> Answer:
        """Load the model, once for all shards."""

    @contextmanager
    def open_output(
        self, file: BinaryIO, output: Path, rows: int, width: int
    ) -> Iterator[BinaryIO]:
        """Open the output of all ``rows``, to which the shards are written in order.

        The output is compressed according to the extension. ``file`` is the file with the name
        ``output``. ``width`` is the number of values per row if the task counts :data:`NUMBERS`.
        """
        with pack(file, output) as packed:
            yield packed


@dataclass(frozen=True, kw_only=True)
class PredictTask(InferenceTask):
    """Add a label, rating, tags, text or embedding to each row, as ``luthier predict``."""

    kind: ClassVar[str] = "predict"
    shard_rows: ClassVar[int] = BLOCK_ROWS
    answer_key: ClassVar[str] = PREDICTED

    top: int | None = None
    explain: bool = False
    pictures: bool = False

    def open(self) -> Answer:
        """See :class:`InferenceTask`."""
        predictor = _open_predictor(self.model, self.explain)

        def answer(rows: Sequence[InputRow], done: OnDone) -> ShardAnswer:
            contents = [row.content for row in rows]
            answers = predict_rows(predictor, contents, done, self.top, self.explain, self.pictures)
            lines = prediction_lines(self.records(rows), answers)
            return ShardAnswer(lines.encode(), anomaly_counts(answers))

        return answer


@dataclass(frozen=True, kw_only=True)
class EmbedTask(InferenceTask):
    """Write the embedding of each row, as ``luthier embed``, to JSON Lines or a NumPy file."""

    kind: ClassVar[str] = "embed"
    shard_rows: ClassVar[int] = BLOCK_ROWS
    answer_key: ClassVar[str] = EMBEDDING

    form: EmbeddingFormat
    """``jsonl``, with the fields of the rows, or ``npy``, little-endian float32 numbers alone."""

    def __post_init__(self) -> None:
        """Reject Parquet, because the types of columns depend on all rows."""
        if self.form == "parquet":
            raise RecipeError(
                "Several processes write embeddings as .jsonl or .npy, because the types of a Parquet "
                "file depend on all rows. Name a .jsonl or .npy file."
            )

    @contextmanager
    def open_output(
        self, file: BinaryIO, output: Path, rows: int, width: int
    ) -> Iterator[BinaryIO]:
        """See :class:`InferenceTask`; numbers have NumPy's header."""
        if self.form == "jsonl":
            with super().open_output(file, output, rows, width) as packed:
                yield packed
        else:
            # The number of rows is known before the first embedding, so the header need not be
            # written again at the end.
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, header)
            yield file

    def records(self, rows: Sequence[InputRow]) -> list[Record]:
        """See :class:`InferenceTask`."""
        check_sides([row.content for row in rows])
        return super().records(rows) if self.form == "jsonl" else [row.record for row in rows]

    def open(self) -> Answer:
        """See :class:`InferenceTask`."""
        predictor = _open_predictor(self.model)

        def answer(rows: Sequence[InputRow], done: OnDone) -> ShardAnswer:
            contents: list[Row] = [row.content for row in rows]
            row_NH, truncated = predictor.embed_rows(contents, done)
            counts = {NUMBERS: row_NH.size, TRUNCATED: truncated}
            if self.form == "npy":
                return ShardAnswer(row_NH.astype("<f4").tobytes(), counts)
            found = zip(self.records(rows), contents, row_NH, strict=True)
            return ShardAnswer("".join(embedding_line(*each) for each in found).encode(), counts)

        return answer


@dataclass(frozen=True, kw_only=True)
class GenerateTask(InferenceTask):
    """Generate a reply to each prompt, as ``luthier generate``."""

    kind: ClassVar[str] = "generate"
    shard_rows: ClassVar[int] = BLOCK_PROMPTS
    answer_key: ClassVar[str] = "completion"

    sampling: Sampling

    def rows(self, problems: list[Problem]) -> Iterator[InputRow]:
        """See :class:`InferenceTask`."""
        for record, row in stream_prompts(self.source, problems, self.columns):
            yield InputRow(row.file, row.line, record, row)

    def records(self, rows: Sequence[InputRow]) -> list[Record]:
        """Return the prompt and the further fields of each row; a reply becomes ``expected``."""
        return json_records([(_record_beside(row), Location(row.file, row.line)) for row in rows])

    def open(self) -> Answer:
        """See :class:`InferenceTask`."""
        from luthier.inference.generation import Generator
        from luthier.library.models import check_active, find

        stored = check_active(find(self.model, is_able=Generator.is_able))
        generator = Generator.open(stored)

        def answer(rows: Sequence[InputRow], done: OnDone) -> ShardAnswer:
            prompts = fitting_prompts(rows, generator, self.sampling)
            answers = generator.answers(prompts, self.sampling, done=done)
            return ShardAnswer(reply_lines(self.records(rows), answers).encode())

        return answer


def _record_beside(row: InputRow) -> Record:
    """Return the fields of a row next to its completion, with the question as ``prompt``."""
    content: PromptOnly | Conversation = row.content
    replaced = {"prompt", "completion"}
    if isinstance(content, PromptOnly):
        prompt: Any = content.prompt
    else:
        prompt = [turn.to_dict() for turn in content.messages]
        replaced.add("messages")
    reply = row.record.get("completion") if content.expected is None else content.expected
    rest = {key: value for key, value in row.record.items() if key not in replaced}
    # Without an expected reply, such as a null in a column of a table, the row's reply is expected.
    if reply is not None and rest.get("expected") in (None, "", [], {}):
        rest.pop("expected", None)
    return {"prompt": prompt, **({} if reply is None else {"expected": reply}), **rest}


def fitting_prompts(
    rows: Sequence[InputRow], generator: Generator, sampling: Sampling
) -> list[Prompt]:
    """Return the prompts of the rows.

    Raises:
        DataError: with every prompt that leaves too little room for a reply.
    """
    contents: list[PromptOnly | Conversation] = [row.content for row in rows]
    prompts: list[Prompt] = [
        each.prompt if isinstance(each, PromptOnly) else Chat(each.messages, each.tools)
        for each in contents
    ]
    problems = list[Problem]()
    for row, prompt in zip(rows, prompts, strict=True):
        if refusal := generator.refusal(prompt, sampling):
            fix = "Shorten the prompt, or lower `--max-tokens`."
            problems.append(Problem("row.too_long", refusal, fix, Location(row.file, row.line)))
    if problems:
        raise DataError(problems)
    return prompts


TASKS: Mapping[str, type[InferenceTask]] = {
    task.kind: task for task in (PredictTask, EmbedTask, GenerateTask)
}


def parse_task(plain: Mapping[str, Any]) -> InferenceTask:
    """Create the task of plain values from :meth:`InferenceTask.plain`, also after a JSON round
    trip."""
    fields = dict(plain)
    task = TASKS[fields.pop("kind")]
    if sampling := fields.get("sampling"):
        # Keys of JSON are text.
        bias = {int(token): value for token, value in sampling["logit_bias"].items()}
        stop = tuple(sampling["stop"])
        fields["sampling"] = Sampling(**{**sampling, "stop": stop, "logit_bias": bias})
    return task(**fields)


def prediction_lines(records: Sequence[Record], answers: Sequence[dict[str, Any]]) -> str:
    """Return JSON Lines of rows with predictions."""
    pairs = zip(records, answers, strict=True)
    return json_lines({**record, PREDICTED: answer} for record, answer in pairs)


def anomaly_counts(answers: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the number of judged, anomalous and unjudged rows."""
    verdicts = [answer["anomalous"] for answer in answers if "anomalous" in answer]
    return {
        "verdicts": len(verdicts),
        "anomalous": verdicts.count(True),
        "not_judged": verdicts.count(None),
    }


def reply_lines(records: Sequence[Record], answers: Sequence[GeneratedReply]) -> str:
    """Return JSON Lines of prompts with replies and reasoning."""
    return json_lines(
        {"prompt": record["prompt"], "completion": answer.text, **record, **reasoning_of(answer)}
        for record, answer in zip(records, answers, strict=True)
    )


def reasoning_of(answer: GeneratedReply) -> dict[str, str]:
    """Return the reasoning under its key, if any."""
    return {REASONING: answer.reasoning} if answer.reasoning else {}


def predict_rows(
    predictor: Predictor,
    rows: Sequence[Row],
    done: OnDone,
    top: int | None,
    explain: bool,
    pictures: bool = False,
) -> list[dict[str, Any]]:
    """Return the prediction for each row, with ``explain`` also the contribution of each word or
    cell, and with ``pictures`` the heat map of an image."""
    # An explanation takes many times as long as the prediction, so it alone counts as progress.
    answers = predictor.answers(rows, (lambda count: None) if explain else done)
    if explain:
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
            answer["explanation"] = explain_label(predictor, row, answer, pictures)
            done(number)
    keep_likeliest(answers, top)
    return answers


def _open_predictor(model: str, precise: bool = False) -> Predictor:
    from luthier.library.models import check_active, find

    return Predictor.open(check_active(find(model, is_able=Predictor.is_able)), precise)
