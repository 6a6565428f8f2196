"""What a model does without training: asked as it is, with examples, with what a search finds.

These are what fine-tuning has to beat. Examples come as earlier turns of the conversation (Brown et al.
2020, few-shot), drawn once for all questions, or for each question the nearest by BM25 (Liu et al.
2022, "What makes good in-context examples for GPT-3?", which uses embeddings; BM25 needs no second
model, and is joined with one where it is given). Documents are cut into passages and put before the
question (Lewis et al. 2020, without its trained retriever). Held-out rows only are measured, and the
answers are never searched.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from luthier.data.shapes.texts import LabelledText
from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError
from luthier.evaluation.retrieval import Retriever
from luthier.evaluation.significance import RowScores
from luthier.graders.base import Embedder
from luthier.types import Example, Message, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network

EXAMPLES = 4
"""Examples in a prompt; more help less and less, and every one is read again for each answer."""
PASSAGES = 2
"""Passages of documents in a prompt."""
WORDS = 150
"""Words of a passage."""
SHORT = 24
"""Answers of at most so many tokens are compared as they are; longer ones have a loss only."""
ROOM = 4
"""Tokens that an answer may have beyond the longest right one."""


@dataclass(frozen=True)
class Prompted:
    """What one way to ask gives on held-out rows."""

    name: str
    loss: float
    """Nats for each token of the right answers: how much they surprise the model."""
    exact: RowScores | None
    """Whether greedy answers are the right ones, white space aside; of short answers only."""
    prompt_tokens: float
    """Mean tokens that are read for one answer."""
    seconds: float
    """Seconds for one answer on this machine, in batches; of reading alone where none is written."""


@dataclass(frozen=True)
class Question:
    """A row as something to ask."""

    asked: tuple[Message, ...]
    answer: str

    @property
    def text(self) -> str:
        """What is asked, without what the system says."""
        return "\n".join(turn.content for turn in self.asked if turn.role != "system")


def questions_of(rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Question]:
    """Rows with one right answer as questions; classes are asked for by their names.

    Raises:
        RecipeError: for rows that hold no question, such as raw text.
    """
    return [_question(row, labels) for row in rows]


def _question(row: Row, labels: Sequence[str]) -> Question:
    if (turns := row.turns()) and turns[-1].role == "assistant":
        return Question(turns[:-1], turns[-1].content)
    if turns and (expected := row.expected_reply()) is not None:
        return Question(turns, expected)
    if isinstance(row, LabelledText) and isinstance(row.label, str):
        # By the system, as examples would repeat it, and what is nearest is found by the texts alone.
        ask = f"Which one of these is each text: {', '.join(labels)}? Answer with the name alone."
        return Question((Message("system", ask), Message("user", row.text)), row.label)
    raise RecipeError("these rows ask nothing with one right answer")


PromptTechnique = Literal["as it is", "prompt engineering", "RAG"]
Technique = PromptTechnique | Literal["simple baselines", "fine-tuning", "fine-tuning and RAG"]
"""How rows are answered, as advice and comparisons call it."""


@dataclass(frozen=True)
class Way:
    """One way to ask several questions of a model that was not trained for them."""

    technique: PromptTechnique
    name: str
    context: Sequence[Sequence[Question | str]]
    """Examples or passages for each question."""
    shows_training_rows: bool = False
    """Whether examples are given; a tuned model has learned from these."""


def ways_to_ask(
    questions: Sequence[Question],
    train: Sequence[Question],
    documents: Sequence[str],
    embed: Embedder | None = None,
) -> list[Way]:
    """As it is, with examples of ``train``, the nearest of them, and passages of ``documents``.

    What is nearest is found by words, and once more by words and meaning where there is ``embed``.
    """
    ways = [Way("as it is", "asked as it is", [()] * len(questions))]
    searches: dict[str, Embedder | None] = {"": None}
    if embed is not None:
        searches = {" by words": None, " by words and meaning": embed}
    if train:
        shown = few_shot(train, EXAMPLES, 0)
        ways.append(
            Way("prompt engineering", f"{len(shown)} examples", [shown] * len(questions), True)
        )
        for by, search in searches.items():
            nearest = NearestExamples(train, search).of(questions, EXAMPLES)
            name = f"{EXAMPLES} nearest examples{by}"
            ways.append(Way("prompt engineering", name, nearest, True))
    if documents:
        for by, search in searches.items():
            passages = retrieve_passages(questions, documents, embed=search)
            ways.append(Way("RAG", f"passages of the documents{by}", passages))
    return ways


class Prompting:
    """A network in memory that is asked the held-out questions in several ways."""

    def __init__(self, network: Network, chat: ChatFormat, context: int) -> None:
        self.network, self.chat, self.context = network, chat, context

    def fitting(
        self, questions: Sequence[Question], context: Sequence[Sequence[Question | str]]
    ) -> list[int]:
        """Places of the questions that fit into the context with the ``context`` of each."""
        room = self.context - ROOM
        encoded = (self._encode(*each) for each in self._prompt_answer_pairs(questions, context))
        return [place for place, example in enumerate(encoded) if len(example) <= room]

    def measure(
        self,
        name: str,
        questions: Sequence[Question],
        context: Sequence[Sequence[Question | str]],
        done: Callable[[int], None] = lambda _: None,
    ) -> Prompted:
        """Loss and answers with the ``context`` of each question: examples, or passages.

        All of them must fit, one at least: see :meth:`fitting`.
        """
        from luthier.objectives.logprobs import mean_nll

        pairs = self._prompt_answer_pairs(questions, context)
        examples = [self._encode(*pair, index) for index, pair in enumerate(pairs)]
        began = time.perf_counter()
        loss = mean_nll(self.network, examples, READING_BUDGET)
        seconds = (time.perf_counter() - began) / len(examples)
        learned = [int(np.count_nonzero(example.weight_T)) for example in examples]
        read = sum(map(len, examples)) - sum(learned)
        exact = None
        if np.median(learned) <= SHORT:
            began = time.perf_counter()
            exact = self._exact(pairs, max(learned), done)
            seconds = (time.perf_counter() - began) / len(examples)
        return Prompted(name, loss, exact, read / len(examples), seconds)

    def _prompt_answer_pairs(
        self, questions: Sequence[Question], context: Sequence[Sequence[Question | str]]
    ) -> list[tuple[tuple[Message, ...], str]]:
        """What stands before each answer, and the answer."""
        return [
            (conversation_of(each, with_, self.chat), each.answer)
            for each, with_ in zip(questions, context, strict=True)
        ]

    def _encode(self, turns: tuple[Message, ...], answer: str, index: int = 0) -> Example:
        encoded = self.chat.encode_reply((*turns, Message("assistant", answer)), len(turns))
        return Example(encoded.ids_T, encoded.learned_T.astype(np.float32), index)

    def _exact(
        self,
        pairs: Sequence[tuple[tuple[Message, ...], str]],
        longest: int,
        done: Callable[[int], None],
    ) -> RowScores:
        from luthier.models.decoding import sample
        from luthier.models.sampling import Sampling

        prompts = [self.chat.encode_prompt(turns) for turns, _ in pairs]
        written = sample(
            self.network, prompts, 1, Sampling(max_tokens=longest + ROOM),
            stop_ids=self.chat.stop_ids, batch_size=32, done=done,
        )  # fmt: skip
        replies = [
            self.chat.decode_reply(prompt_T, found.text_ids).text
            for prompt_T, (found,) in zip(prompts, written, strict=True)
        ]
        return RowScores.of([
            reply.strip() == answer.strip()
            for reply, (_, answer) in zip(replies, pairs, strict=True)
        ])  # fmt: skip


def conversation_of(
    question: Question, context: Sequence[Question | str], chat: ChatFormat
) -> tuple[Message, ...]:
    """What stands before the answer: examples as turns before, passages inside the last question.

    For the ``plain`` template, which has no turns, all is one text.
    """
    turns: list[Message] = []
    passages = [each for each in context if isinstance(each, str)]
    shown = [each for each in context if isinstance(each, Question)]
    said = [turn.content for turn in question.asked if turn.role == "system"]
    if chat.template == "plain":
        examples = (f"{each.text}\n{each.answer}" for each in shown)
        return (Message("user", "\n\n".join([*said, *examples, *passages, question.text])),)
    for each in shown:
        turns += [turn for turn in each.asked if turn.role != "system"]
        turns.append(Message("assistant", each.answer))
    rest = [turn for turn in question.asked if turn.role != "system"]
    if passages:
        before = "\n\n".join(["Use this where it helps:", *passages])
        rest[-1] = Message(rest[-1].role, f"{before}\n\n{rest[-1].content}")
    turns += rest
    if said and not chat.takes_system:
        turns[0] = Message(turns[0].role, "\n\n".join([*said, turns[0].content]))
    elif said:
        turns.insert(0, Message("system", "\n\n".join(said)))
    return tuple(turns)


def few_shot(train: Sequence[Question], count: int, seed: int) -> list[Question]:
    """``count`` examples with answers as different as can be, in a random order."""
    order = random.Random(seed).sample(range(len(train)), len(train))
    first: dict[str, int] = {}
    for number in order:
        first.setdefault(train[number].answer, number)
    fresh = list(first.values())
    others = [number for number in order if first[train[number].answer] != number]
    return [train[number] for number in [*fresh, *others][:count]]


class NearestExamples:
    """Training questions that are nearest to others."""

    def __init__(self, train: Sequence[Question], embed: Embedder | None = None) -> None:
        self.train = train
        self._retriever = Retriever([each.text for each in train], embed)

    def of(self, questions: Sequence[Question], count: int) -> list[list[Question]]:
        """The ``count`` nearest to each with their answers; what stands last is heeded most."""
        places = self._retriever.nearest([each.text for each in questions], count)
        return [[self.train[place] for place in reversed(each)] for each in places]


def cut_passages(documents: Sequence[str]) -> list[str]:
    """Documents in passages of some :data:`WORDS` words, cut at the ends of lines where there are."""
    return [passage for document in documents for passage in _cut(document)]


def _cut(document: str) -> Iterator[str]:
    held: list[str] = []
    for line in document.split("\n"):
        words = line.split()
        if held and len(held) + len(words) > WORDS:
            yield " ".join(held)
            held = []
        held += words
        while len(held) > WORDS:
            yield " ".join(held[:WORDS])
            held = held[WORDS:]
    if held:
        yield " ".join(held)


def retrieve_passages(
    questions: Sequence[Question],
    documents: Sequence[str],
    count: int = PASSAGES,
    embed: Embedder | None = None,
) -> list[list[str]]:
    """For each question the ``count`` passages nearest to it, the nearest last."""
    passages = cut_passages(documents)
    places = Retriever(passages, embed).nearest([each.text for each in questions], count)
    return [[passages[place] for place in reversed(each)] for each in places]
