"""Techniques without training: prompts, examples and retrieval, the rivals of fine-tuning.

Examples are earlier turns of the conversation (Brown et al. 2020, few-shot): drawn once for all
questions, or the nearest examples for each question (Liu et al. 2022, "What makes good in-context
examples for GPT-3?"). Passages of documents precede the question (Lewis et al. 2020, without a
trained retriever). The search uses BM25, combined with an encoder if given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.data.conversations.citations import add_passages
from luthier.data.files.read import read_records
from luthier.data.files.sources import files_of
from luthier.data.shapes import of_shape
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.texts import LabelledText
from luthier.documents.answers import PASSAGES
from luthier.documents.passages import cut
from luthier.documents.readers import DocumentPage
from luthier.errors import RecipeError
from luthier.evaluation.retrieval import TextSearch
from luthier.graders.base import Embedder
from luthier.types import Message, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

EXAMPLES = 4
"""Examples in a prompt: further examples help less and cost input tokens in each answer."""
PLACEHOLDER = re.compile(r"\{(\w+)\}")

Records = Mapping[tuple[str, int], Mapping[str, object]]
"""Columns of rows, by file and line."""
PassageSearch = Callable[[Sequence[Message]], tuple[Sequence[str], bool]]
"""Returns the passages for a conversation, and whether they may answer its question."""


@dataclass(frozen=True)
class Question:
    """A question with its answer."""

    asked: tuple[Message, ...]
    answer: str

    @property
    def text(self) -> str:
        """The question without the system message."""
        return "\n".join(turn.content for turn in self.asked if turn.role != "system")


def questions_of(rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Question]:
    """Return the question of each row; questions about labels list ``labels``.

    Raises:
        RecipeError: for rows without a single right answer, such as raw text.
    """
    return [_question(row, labels) for row in rows]


def questions_with_labels(
    rows: Sequence[Row], train: Sequence[Row]
) -> tuple[list[Question], list[Question]]:
    """Return the questions of ``rows`` and of ``train``, which list the labels of both."""
    both = [*(of_shape(LabelledText, rows) or ()), *(of_shape(LabelledText, train) or ())]
    labels = sorted({row.label for row in both if isinstance(row.label, str)})
    return questions_of(rows, labels), questions_of(train, labels)


def _question(row: Row, labels: Sequence[str]) -> Question:
    if (turns := row.turns()) and turns[-1].role == "assistant":
        return Question(turns[:-1], turns[-1].content)
    if turns and (expected := row.expected_reply()) is not None:
        return Question(turns, expected)
    if isinstance(row, LabelledText) and isinstance(row.label, str):
        # In the system message: examples would repeat the list, and search uses the text alone.
        ask = f"Which one of these is each text: {', '.join(labels)}? Answer with the name alone."
        return Question((Message("system", ask), Message("user", row.text)), row.label)
    raise RecipeError("These rows have no question with a single right answer.")


PromptTechnique = Literal["zero-shot", "prompt engineering", "RAG"]
Technique = (
    PromptTechnique
    | Literal[
        "simple baselines", "fine-tuning", "fine-tuning and RAG", "fine-tuning and examples",
        "fine-tuning and instructions",
    ]
)  # fmt: skip
"""Name of a technique in advice and comparisons."""


@dataclass(frozen=True)
class PromptVariant:
    """A technique with the examples or passages for each question."""

    technique: PromptTechnique
    name: str
    context: Sequence[Sequence[Question | str]]
    questions: Sequence[Question] = ()
    """Questions with own instructions, instead of the questions of the rows."""
    declined: Sequence[int] = ()
    """Numbers of the questions that the search declines, without a query of the model."""

    @property
    def tuned_technique(self) -> Technique:
        """Name of the technique for a tuned model."""
        if self.technique == "prompt engineering":
            return "fine-tuning and instructions" if self.questions else "fine-tuning and examples"
        return "fine-tuning and RAG" if self.technique == "RAG" else "fine-tuning"


def prompt_variants(
    questions: Sequence[Question],
    train: Sequence[Question],
    documents: Sequence[str],
    embed: Embedder | None = None,
    search_index: PassageSearch | None = None,
) -> list[PromptVariant]:
    """Return the techniques: unchanged, with examples, with the nearest examples, with passages of
    ``documents``, and with passages of an index.

    The nearest examples are found by words, and with ``embed`` also by words and meaning.
    """
    variants = [PromptVariant("zero-shot", "zero-shot", [()] * len(questions))]
    searches: dict[str, Embedder | None] = {"": None}
    if embed is not None:
        searches = {" by words": None, " by words and meaning": embed}
    if train:
        examples = few_shot(train, EXAMPLES, 0)
        variants.append(
            PromptVariant(
                "prompt engineering", f"{len(examples)} examples", [examples] * len(questions)
            )
        )
        for by, search in searches.items():
            nearest = nearest_examples(questions, train, EXAMPLES, search)
            name = f"{EXAMPLES} nearest examples{by}"
            variants.append(PromptVariant("prompt engineering", name, nearest))
    if documents:
        for by, search in searches.items():
            passages = retrieve_passages(questions, documents, embed=search)
            variants.append(PromptVariant("RAG", f"passages of the documents{by}", passages))
    if search_index is not None:
        found = [search_index(each.asked) for each in questions]
        declined = [number for number, (_, may_answer) in enumerate(found) if not may_answer]
        context = [passages for passages, _ in found]
        variants.append(PromptVariant("RAG", "the index", context, declined=declined))
    return variants


def own_prompts(
    templates: Mapping[str, str],
    rows: Sequence[Row],
    questions: Sequence[Question],
    records: Records,
) -> list[PromptVariant]:
    """Return a technique for each of ``templates``, by name.

    A template with placeholders (``{column}``, or ``{prompt}`` for the whole question) is the user
    message. A template without placeholders is the system message.

    Raises:
        RecipeError: for an unknown column, or a column with the expected replies.
    """
    variants = []
    fields = [
        {"prompt": question.text, **records.get((row.file, row.line), {})}
        for row, question in zip(rows, questions, strict=True)
    ]
    for name, template in templates.items():
        columns = {*PLACEHOLDER.findall(template)}
        if unknown := sorted(columns - fields[0].keys()):
            raise RecipeError(
                f'{name}: "{{{unknown[0]}}}" is no column of the rows. Columns: '
                f"{', '.join(fields[0])}"
            )
        for column in columns:
            known = zip(fields, questions, strict=True)
            # Otherwise a template could contain the answer, and would win every comparison.
            if all(str(row.get(column)) == question.answer for row, question in known):
                raise RecipeError(f'{name}: "{{{column}}}" is the expected reply. Remove it.')
        asked = []
        for row, question in zip(fields, questions, strict=True):
            turns = [turn for turn in question.asked if turn.role != "system"]
            turns = [Message("system", template), *turns]
            if columns:
                filled = PLACEHOLDER.sub(lambda each: str(row.get(each[1], "")), template)  # noqa: B023
                turns = [Message("user", filled)]
            asked.append(Question(tuple(turns), question.answer))
        context: list[Sequence[Question | str]] = [()] * len(rows)
        variants.append(PromptVariant("prompt engineering", name, context, asked))
    return variants


def records_of(source: str) -> Records:
    """Return the columns of all rows of ``source``."""
    return {
        (str(path), line): record
        for path in files_of(source)
        for line, record in read_records(path, [])
    }


def rows_of_variant(
    rows: Sequence[Row],
    questions: Sequence[Question],
    variant: PromptVariant,
    chat: ChatFormat | None,
) -> list[Row]:
    """Return ``rows`` as conversations of a technique, with the members that graders use.

    ``chat`` is ``None`` for a model at an endpoint, which applies its own template.
    """
    if variant.technique == "zero-shot" and not isinstance(rows[0], LabelledText):
        return list(rows)
    return [
        Conversation(
            row.file,
            row.line,
            (*conversation_of(question, context, chat), Message("assistant", question.answer)),
            question.answer,
            members=row.members,
            tools=row.tools,
        )
        for row, question, context in zip(
            rows, variant.questions or questions, variant.context, strict=True
        )
    ]


def conversation_of(
    question: Question, context: Sequence[Question | str], chat: ChatFormat | None
) -> tuple[Message, ...]:
    """Return the prompt: examples as earlier turns, and passages inside the last question.

    The ``plain`` template has no turns, so all parts become one text.
    """
    turns: list[Message] = []
    passages = [each for each in context if isinstance(each, str)]
    examples = [each for each in context if isinstance(each, Question)]
    system = [turn.content for turn in question.asked if turn.role == "system"]
    last_turns = [turn for turn in question.asked if turn.role != "system"]
    if passages:
        last_turns = add_passages(last_turns, passages)
    if chat is not None and chat.template.kind == "plain":
        example_texts = (f"{each.text}\n{each.answer}" for each in examples)
        last = "\n".join(turn.content for turn in last_turns)
        return (Message("user", "\n\n".join([*system, *example_texts, last])),)
    for each in examples:
        # The question's own system message stands once at the start.
        turns += [turn for turn in each.asked if turn.role != "system"]
        turns.append(Message("assistant", each.answer))
    turns += last_turns
    # Templates without a system role would drop the instructions, or refuse the prompt.
    if system and chat is not None and not chat.supports_system_prompt:
        turns[0] = Message(turns[0].role, "\n\n".join([*system, turns[0].content]))
    elif system:
        turns.insert(0, Message("system", "\n\n".join(system)))
    return tuple(turns)


def few_shot(train: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Return ``count`` random examples, with as many different answers as possible."""
    order = random.Random(seed).sample(range(len(train)), len(train))
    first: dict[str, int] = {}
    for number in order:
        first.setdefault(train[number].answer, number)
    rest = [number for number in order if first[train[number].answer] != number]
    return [train[number] for number in [*first.values(), *rest][:count]]


def nearest_examples(
    questions: Sequence[Question],
    train: Sequence[Question],
    count: int,
    embed: Embedder | None = None,
) -> list[list[Question]]:
    """Return the ``count`` nearest training questions for each question, the nearest last.

    Models attend most to the last example.
    """
    retriever = TextSearch([each.text for each in train], embed)
    places = retriever.nearest([each.text for each in questions], count)
    return [[train[place] for place in reversed(each)] for each in places]


def retrieve_passages(
    questions: Sequence[Question],
    documents: Sequence[str],
    count: int = PASSAGES,
    embed: Embedder | None = None,
) -> list[list[str]]:
    """Return the ``count`` nearest passages for each question, the nearest first."""
    passages = [each.content for text in documents for each in cut([DocumentPage(text)])]
    places = TextSearch(passages, embed).nearest([each.text for each in questions], count)
    return [[passages[place] for place in each] for each in places]
