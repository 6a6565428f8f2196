"""The best prompt that a search finds for a model as it is: what tuning has to beat.

GEPA (Agrawal et al. 2025, arXiv:2507.19457), by its authors' library: a prompt answers a few training
rows, a model reads what went wrong and rewrites the instruction, and what does better there is measured
on rows that are kept for it. Prompts that are best on some of these rows are developed further (the
Pareto frontier). Beside the instruction the examples are searched: one that was answered wrong comes
in, another goes, or each question gets the ones nearest to it.

Left out: crossover of two prompts. The rows that models are compared on are never read.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gepa.api import optimize
from gepa.core.adapter import EvaluationBatch, GEPAAdapter

from luthier.errors import RecipeError
from luthier.gate.near_duplicates import normalize
from luthier.serving.prompting import EXAMPLES, NearestExamples, Question, Way, few_shot
from luthier.types import Message

if TYPE_CHECKING:
    from gepa.core.result import GEPAResult
    from gepa.core.state import GEPAState

    from luthier.chat_models.base import ModelSpec
    from luthier.graders.base import Embedder
    from luthier.serving.generation import Generator

MOST_EXAMPLES = 8
"""In a prompt."""
MINIBATCH = 8
"""Rows that a new prompt answers at most before it is measured on all that are kept for it."""
MEASURED_ROWS = 8, 128
"""Rows that prompts are measured on, at least and at most."""
TIME_SHARE = 0.06
"""Share of the time that measuring one prompt on these rows may take."""
REFLECTION_ROWS = 200
"""Training rows, at most, from which minibatches are drawn to see what goes wrong."""
MOST_CHARACTERS = 1500
"""Of an instruction."""
SHOWN = 160
"""Characters of it in a sentence."""
REFLECTION_TOKENS = 400
"""That a model may write as a new instruction."""
LEAST_ROWS = 24
"""Different training rows: fewer tell no prompt from another."""
NEAREST = "nearest"
"""How a candidate says that each question gets its own examples."""

Answers = Sequence[tuple[str, float]]
"""Replies with their scores, from 0 to 1."""


@dataclass(frozen=True)
class SearchedPrompt:
    """An instruction with examples, and how it came about."""

    instruction: str
    examples: tuple[Question, ...]
    """The same for all questions; none where each has its own."""
    nearest: int
    """Examples that each question gets, those nearest to it."""
    score: float
    """On the training rows that were kept to measure on."""
    first_score: float
    """There, of the best of the prompts it began with."""
    measured_rows: int
    candidates: int
    """Prompts that were measured on all these rows."""
    answers: int
    """That the search asked for."""
    seconds: float

    def way(
        self,
        questions: Sequence[Question],
        train: Sequence[Question],
        embed: Embedder | None = None,
    ) -> Way:
        """To ask ``questions`` like this; nearest examples are taken from ``train``.

        ``embed`` is what the search found them by.
        """
        context: Sequence[Sequence[Question | str]] = [self.examples] * len(questions)
        if self.nearest:
            context = NearestExamples(train, embed).of(questions, self.nearest)
        return Way(
            "prompt engineering", "a searched prompt", context, True, self.instruction, self.nearest
        )

    def describe(self) -> str:
        """In a sentence."""
        shown = f"{self.nearest} nearest" if self.nearest else f"{len(self.examples)} fixed"
        gained = f"{self.score:.1%} instead of {self.first_score:.1%}"
        if self.score <= self.first_score:
            gained = f"none is better than the one that it began with, {self.first_score:.1%}"
        instruction = "no instruction"
        if self.instruction:  # :meth:`Way.plain` has it whole
            further = " …" if len(self.instruction) > SHOWN else ""
            instruction = f"the instruction {self.instruction[:SHOWN]!r}{further}"
        return (
            f"the prompt was searched for {self.seconds:.0f} s: {self.answers:,} "
            f"answers, {self.candidates} prompts, {gained} "
            f"of {self.measured_rows} training rows; it has {shown} examples and "
            f"{instruction}"
        )


def search_prompt(
    answer: Callable[[Sequence[int], Way], Answers],
    reflect: Callable[[str, int], str],
    questions: Sequence[Question],
    seconds: float,
    most_answers: int = 1_000_000,
    embed: Embedder | None = None,
    needs_score: bool = False,
) -> SearchedPrompt:
    """Search for ``seconds``, or until everything that is measured is right.

    Args:
        answer: asks the model the training rows of these numbers, and scores what it replies.
        reflect: rewrites an instruction: what a model answers to a text, drawn with a seed.
        questions: the training rows.
        seconds: from now on; what is begun is finished.
        most_answers: of the model, beside it.
        embed: by which nearest examples are found, beside their words.
        needs_score: refuse to search where no reply scores above 0 by any of the first prompts.

    Raises:
        RecipeError: for fewer than 24 different training rows, and for the lack of a score.
    """
    began = time.monotonic()
    search = _Search(answer, reflect, questions, random.Random(0), embed)
    # As many rows to measure on as leave time for some fifteen prompts.
    probe = search.measured[: MEASURED_ROWS[0]]
    search.ask(probe, search.starts()[0])
    each = (time.monotonic() - began) / len(probe)
    count = min(
        max(MEASURED_ROWS[0], int(TIME_SHARE * seconds / max(each, 1e-4))), len(search.measured)
    )
    search.measured = search.measured[:count]
    scored = [
        (sum(score for _, score in search.ask(search.measured, start)), place, start)
        for place, start in enumerate(search.starts())
    ]
    first, _, start = max(scored, key=lambda found: (found[0], -found[1]))
    if needs_score and first <= 0:
        raise RecipeError(
            f"none of {search.answers:,} replies to training rows scores above 0, so nothing tells one "
            "prompt from another. Read some, and choose another grader where they are right in other "
            "words; search_seconds searches all the same"
        )

    def is_over(gepa_state: GEPAState[Any, Any]) -> bool:
        best = max(gepa_state.program_full_scores_val_set, default=0.0)
        return time.monotonic() - began >= seconds or search.answers >= most_answers or best >= 1

    found: GEPAResult[str, int] = optimize(
        seed_candidate=start, trainset=search.reflected, valset=search.measured, adapter=search,
        stop_callbacks=is_over, logger=_Silent(), skip_perfect_score=False, seed=0,
        reflection_minibatch_size=min(MINIBATCH, len(search.reflected), max(1, count // 2)),
        track_best_outputs=False,
    )  # fmt: skip
    best = found.candidates[found.best_idx]
    nearest, examples = search.examples_of(best)
    return SearchedPrompt(
        best["instruction"], tuple(questions[number] for number in examples), nearest,
        found.val_aggregate_scores[found.best_idx], first / count, count,
        found.num_candidates + len(scored) - 1, search.answers, time.monotonic() - began,
    )  # fmt: skip


class _Silent:
    """Where the library writes what it does."""

    def log(self, message: str) -> None:
        del message


class _Search(GEPAAdapter[int, tuple[int, str, float], str]):
    """The training rows, what is asked of them, and how a prompt is changed.

    A prompt is two texts: the instruction, and the numbers of the examples.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[int], Way], Answers],
        reflect: Callable[[str, int], str],
        questions: Sequence[Question],
        draw: random.Random,
        embed: Embedder | None,
    ) -> None:
        distinct: dict[str, int] = {}
        for number, question in enumerate(questions):
            distinct.setdefault(normalize(question.text), number)
        order = [*distinct.values()]
        if len(order) < LEAST_ROWS:
            raise RecipeError(
                f"a prompt is searched on {LEAST_ROWS} different training rows and more, and these "
                f"are {len(order)}"
            )
        draw.shuffle(order)
        held = max(MEASURED_ROWS[0], min(MEASURED_ROWS[1], len(order) // 3))
        held = min(held, len(order) - MINIBATCH)
        self.answer, self.reflect, self.questions, self.draw = answer, reflect, questions, draw
        self.measured, self.shown = order[:held], order[held:]
        self.reflected = self.shown[:REFLECTION_ROWS]
        self.answers = self.proposals = 0
        self._known: dict[tuple[int, str, str], tuple[str, float]] = {}
        self._index = NearestExamples([questions[number] for number in self.shown], embed)

    def starts(self) -> list[dict[str, str]]:
        """The prompts that are tried without a search: no example, some, the nearest."""
        pool = [self.questions[number] for number in self.shown]
        by_text = {id(question): number for question, number in zip(pool, self.shown, strict=True)}
        some = " ".join(str(by_text[id(each)]) for each in few_shot(pool, EXAMPLES, 0))
        kinds = "", some, f"{NEAREST} {EXAMPLES}"
        return [{"instruction": "", "examples": kind} for kind in kinds]

    @staticmethod
    def examples_of(candidate: Mapping[str, str]) -> tuple[int, list[int]]:
        """How many nearest examples a prompt has, or else which fixed ones."""
        words = candidate["examples"].split()
        if words[:1] == [NEAREST]:
            return int(words[1]), []
        return 0, [int(word) for word in words]

    def ask(self, numbers: Sequence[int], candidate: Mapping[str, str]) -> Answers:
        """What the model says with a prompt to training rows; none is shown its own answer.

        It is asked nothing twice.
        """
        key = candidate["instruction"], candidate["examples"]
        new = [number for number in numbers if (number, *key) not in self._known]
        if new:
            way = Way(
                "prompt engineering",
                "a candidate",
                self._examples_for(new, candidate),
                True,
                key[0],
            )
            for number, found in zip(new, self.answer(new, way), strict=True):
                self._known[number, *key] = found
            self.answers += len(new)
        return [self._known[number, *key] for number in numbers]

    def _examples_for(
        self, numbers: Sequence[int], candidate: Mapping[str, str]
    ) -> list[list[Question]]:
        """The examples for each row."""
        nearest, examples = self.examples_of(candidate)
        asked = [self.questions[number] for number in numbers]
        shown = [[self.questions[each] for each in examples]] * len(asked)
        if nearest:
            shown = self._index.of(asked, nearest + 1)
        return [
            [each for each in own if each is not question][-max(nearest, len(examples)) :]
            for question, own in zip(asked, shown, strict=True)
        ]

    def evaluate(
        self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[tuple[int, str, float], str]:
        """As the library asks for it."""
        answers = self.ask(batch, candidate)
        seen = [(number, *answer) for number, answer in zip(batch, answers, strict=True)]
        replies, scores = [reply for reply, _ in answers], [score for _, score in answers]
        return EvaluationBatch(replies, scores, seen if capture_traces else None)

    def make_reflective_dataset(
        self,
        candidate: dict[str, str],
        eval_batch: EvaluationBatch[tuple[int, str, float], str],
        components_to_update: list[str],
    ) -> dict[str, list[dict[str, Any]]]:
        """What was asked and answered, for whatever is changed."""
        del candidate
        seen = eval_batch.trajectories or []
        records = [{"number": n, "reply": reply, "score": score} for n, reply, score in seen]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """Another text for each component, after what went wrong."""
        self.proposals += 1
        changes = {"instruction": self._rewrite, "examples": self._exchange}
        return {
            name: changes[name](candidate, reflective_dataset[name])
            for name in components_to_update
        }

    def _rewrite(self, candidate: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
        worst = sorted(records, key=lambda record: record["score"])[:4]
        cases = "\n\n".join(
            f"Question: {self.questions[each['number']].text[:600]}\nAnswer given: "
            f"{each['reply'][:300]}\nRight answer: {self.questions[each['number']].answer[:300]}"
            for each in worst
        )
        text = (
            "An assistant answers questions. Its instruction is:\n"
            f"{candidate['instruction'] or '(none)'}\n\nHere are questions with its answers and the "
            f"right answers:\n\n{cases}\n\nWrite a better instruction that makes the assistant give "
            "the right answers, in their form, to questions like these. Write the instruction only."
        )
        reply = self.reflect(text, self.proposals).strip()
        if fenced := re.search(r"```\w*\n(.*?)```", reply, re.DOTALL):
            reply = fenced[1].strip()
        return reply[:MOST_CHARACTERS] or candidate["instruction"]

    def _exchange(self, candidate: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
        nearest, examples = self.examples_of(candidate)
        if self.draw.random() < 0.25:  # from the nearest ones to fixed ones, and back
            return (
                " ".join(map(str, self.draw.sample(self.shown, min(EXAMPLES, len(self.shown)))))
                if nearest
                else f"{NEAREST} {self.draw.choice((2, EXAMPLES, MOST_EXAMPLES))}"
            )
        if nearest:
            counts = [count for count in range(1, MOST_EXAMPLES + 1) if count != nearest]
            return f"{NEAREST} {self.draw.choice(counts)}"
        wrong = [each["number"] for each in records if each["score"] < 1]
        choice = [number for number in wrong or self.shown if number not in examples]
        if len(examples) >= MOST_EXAMPLES or (examples and self.draw.random() < 0.5):
            examples.pop(self.draw.randrange(len(examples)))
        return " ".join(map(str, [*examples, *([self.draw.choice(choice)] if choice else [])]))


def reflection(
    generator: Generator, reflector: ModelSpec | None, note: Callable[[str], None]
) -> Callable[[str, int], str]:
    """How ``reflector``, or the model of ``generator`` itself, answers a text, drawn with a seed."""
    from luthier.chat_models.base import Failure, SamplingSpec, writer_of
    from luthier.chat_models.endpoint import EndpointModel
    from luthier.models.sampling import Sampling
    from luthier.serving.generation import Generator
    from luthier.store.models import find

    if reflector is not None and reflector.url is not None:
        endpoint = EndpointModel(reflector)
        note(endpoint.terms)

        def ask(text: str, seed: int) -> str:
            sampling = SamplingSpec(max_tokens=REFLECTION_TOKENS, temperature=1.0, seed=seed)
            (reply,) = writer_of(endpoint, reflector.role, sampling, note)(
                [[Message("user", text)]]
            )
            if isinstance(reply, Failure):
                raise RecipeError(f"the model that rewrites instructions gave none: {reply.reason}")
            return reply

        return ask
    writer = generator if reflector is None else Generator.open(find(reflector.model, note))

    def write(text: str, seed: int) -> str:
        sampling = Sampling(max_tokens=REFLECTION_TOKENS, temperature=1.0, seed=seed)
        # An instruction that this model has no room to read about is left as it is.
        return "" if writer.refusal(text, sampling) else writer.replies([text], sampling)[0]

    return write
