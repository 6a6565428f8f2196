"""Contenders of a comparison: models, prompts and baselines that answer the same rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from luthier.chat_models.base import ChatModel, Failure, SamplingSpec, writer_of
from luthier.data.conversations.citations import DECLINED
from luthier.data.shapes import of_shape
from luthier.data.shapes.texts import History, LabelledText
from luthier.data.tree import READING_BUDGET
from luthier.engine.machine import begin_peak_memory, open_network, peak_memory
from luthier.errors import LuthierError, RecipeError
from luthier.evaluation.baselines import (
    ComparedRows,
    FittedBaselines,
    fit_and_score,
)
from luthier.evaluation.evaluate import default_graders, grade, median_words
from luthier.evaluation.significance import RowScores, as_gain
from luthier.files import folder_size
from luthier.graders import Exact, Similarity
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.inference.prediction import Predictor
from luthier.models.decoding.sampling import Sampling
from luthier.models.networks.heads import EMBEDDING_HEAD
from luthier.objectives import OBJECTIVES
from luthier.objectives.by_shape import task_of
from luthier.tasks import CATALOGUE
from luthier.types import Example, Row
from luthier.workflows.evaluate import grade_replies
from luthier.workflows.latency import measure_latency
from luthier.workflows.prompting import (
    PromptVariant,
    Question,
    Technique,
    nearest_examples,
    rows_of_variant,
)
from luthier.workflows.score_predictions import score_predictions

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.graders import Grader
    from luthier.library.models import StoredModel

BASELINE_SECONDS = 120.0
"""Time limit of all simple baselines."""
SEED = 0
FREQUENT = 0.05
"""Share of training rows with the same reply from which the reply is a rival."""
TIMED_ROWS = 256
"""Maximum number of rows for the time of an answer of a model that predicts."""
LEADS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of words that the lead baseline tries."""
LEAD_ROWS = 200
"""Number of training rows, about, that choose the number of words."""
SUMMARY = 2.0
"""Length of the prompts of summaries, at least, in lengths of the replies."""
SHOWN = ("zero-shot", "fine-tuning")
"""Techniques whose replies are shown and sampled: models with the prompts as they are."""


@dataclass(frozen=True, eq=False)
class Contender:
    """Measurement of a model or technique on the rows."""

    name: str
    technique: Technique
    score: RowScores
    """The compared score."""
    scores: dict[str, float]
    """All scores for the kind of rows."""
    seconds: float
    """Seconds per answer, in batches, on this machine."""
    prompt_tokens: float | None = None
    """Mean input tokens per answer of a generative model."""
    reply_tokens: float = 0.0
    """Mean output tokens per answer of a model at an endpoint."""
    endpoint: str = ""
    """Name of the model at an endpoint."""
    model_bytes: int = 0
    """Size of the weights, including the base model's."""
    memory_bytes: int = 0
    """Size of the weights, and growth of the resident memory while the model answers."""
    preparation_seconds: float = 0.0
    """Duration of the tuning."""
    preparation_tokens: float = 0.0
    """Training tokens of the tuning, over all epochs."""
    constant: bool = False
    """True for a baseline with the same answer to all rows."""
    replies: Sequence[str] = ()
    """Replies to the rows, of a generative model."""
    consistency: RowScores | None = None
    """Share of pairs of sampled replies to a row that are equal."""
    paraphrase_consistency: RowScores | None = None
    """Share of pairs of replies to paraphrases of a question that are equal."""

    @property
    def is_tuned(self) -> bool:
        """True if weights were trained."""
        return self.technique.startswith("fine-tuning")


@dataclass
class Contest:
    """State of a comparison while the contenders answer in turn."""

    graders: Mapping[str, Grader]
    seeds: int = 0
    max_tokens: int = 64
    note: Callable[[str], None] = lambda text: None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    total: int = 0
    """Expected number of answers."""
    remarks: list[str] = field(default_factory=list)
    groups: Sequence[Sequence[int]] = ()
    """Numbers of the rows with paraphrases of a question, by question."""
    finished: int = 0
    shown: Sequence[int] = ()
    """Numbers of the rows whose predictions are shown."""

    def predict(
        self,
        models: Sequence[StoredModel],
        rows: Sequence[Row],
        show: int,
        base: StoredModel | None = None,
    ) -> list[Contender]:
        """Measure models that predict, with the predictions for ``show`` rows, those first on which
        the first model is worst.

        ``base`` is the model without tuning.
        """
        contenders, passes = list[Contender](), dict[str, Callable[[], object]]()
        for stored in models:
            predictor = Predictor.open(stored)
            predictor.answers(rows[:1])  # libraries would count as memory of the first model
            resident = begin_peak_memory()
            evaluation = score_predictions(predictor, rows, self._done)
            growth = peak_memory() - resident
            self.finished += len(rows)
            measure, score = next(iter(evaluation.row_scores.items()))
            if not isinstance(score, RowScores) or not len(score) == len(evaluation.rows) == len(
                rows
            ):
                raise RecipeError(f"{stored.id} has no scores per row for this kind of rows")
            self.shown = self.shown or hardest_rows(measure, score, show)
            task, replies = predictor.objective.task, [""] * len(rows)
            answers = predictor.answers([rows[number] for number in self.shown])
            for number, each in zip(self.shown, answers, strict=True):
                replies[number] = task.show(each, predictor.threshold, 1).strip()
            contender = Contender(
                stored.id, "zero-shot" if stored is base else "fine-tuning", score,
                evaluation.scores, 0.0,
                model_bytes=_weight_bytes(stored), memory_bytes=_weight_bytes(stored) + growth,
                preparation_seconds=_training(stored, "seconds"),
                preparation_tokens=_training(stored, "tokens"),
                replies=replies,
            )  # fmt: skip
            contenders.append(contender)
            passes[stored.id] = partial(predictor.answers, rows[:TIMED_ROWS])
        timed = min(len(rows), TIMED_ROWS)
        seconds = measure_latency(passes)
        return [replace(each, seconds=seconds[each.name] / timed) for each in contenders]

    def generate(
        self,
        stored: StoredModel,
        rows: Sequence[Row],
        questions: Sequence[Question],
        variants: Sequence[PromptVariant],
        is_tuned: bool = False,
    ) -> list[Contender]:
        """Open a generative model and measure it in several variants."""
        generator = Generator.open(stored)
        parts, size = ("seconds", "tokens"), _weight_bytes(stored)
        seconds, tokens = (_training(stored, name) if is_tuned else 0.0 for name in parts)
        return [
            replace(
                each, model_bytes=size, memory_bytes=size + each.memory_bytes,
                preparation_seconds=seconds, preparation_tokens=tokens,
            )
            for each in self.write(generator, stored.id, rows, questions, variants, is_tuned)
        ]  # fmt: skip

    def write(
        self,
        generator: Generator,
        model: str,
        rows: Sequence[Row],
        questions: Sequence[Question],
        variants: Sequence[PromptVariant],
        is_tuned: bool = False,
    ) -> list[Contender]:
        """Measure a loaded generative model, named ``model``, in several variants."""
        sampling = Sampling(max_tokens=self.max_tokens)
        contenders = list[Contender]()
        for variant in variants:
            technique: Technique = variant.technique
            name = model if technique == "zero-shot" else f"{model} with {variant.name}"
            if is_tuned:
                technique = variant.tuned_technique
            prompt_rows = rows_of_variant(rows, questions, variant, generator.chat)
            prompts = [Chat(tuple(row.prompt_turns()), row.tools) for row in prompt_rows]
            too_long = sum(generator.refusal(prompt, sampling) is not None for prompt in prompts)
            if too_long:
                self.remarks.append(
                    f"{name} omitted: {too_long:,} prompts exceed the context. Shorten or remove rows"
                )
                self.finished += len(rows)
                continue
            tokens = sum(map(generator.prompt_tokens, prompts)) / len(prompts)
            if not contenders:  # the first batch also loads kernels
                generator.replies(prompts[:1], replace(sampling, max_tokens=1))
            resident = begin_peak_memory()
            graded = grade_replies(
                generator, prompt_rows, self.graders, self.max_tokens, self._done,
                known=dict.fromkeys(variant.declined, DECLINED),
            )  # fmt: skip
            growth = peak_memory() - resident
            self.finished += len(rows)
            replies = [each["reply"] for each in graded.records]
            contenders.append(
                Contender(
                    name, technique, first_score(graded), graded.scores,
                    graded.reply_seconds / len(rows), tokens, memory_bytes=growth,
                    replies=replies, paraphrase_consistency=self._paraphrase_consistency(replies),
                    consistency=self._consistency(generator, prompts) if technique in SHOWN else None,
                )
            )  # fmt: skip
        return contenders

    def _consistency(self, generator: Generator, prompts: Sequence[Chat]) -> RowScores | None:
        """Return the share of equal pairs among replies sampled at temperature 1."""
        if self.seeds < 2:
            return None
        draws = [
            Sampling(max_tokens=self.max_tokens, temperature=1.0, seed=seed)
            for seed in range(self.seeds)
        ]
        replies = zip(*(generator.replies(prompts, each) for each in draws), strict=True)
        return equal_pairs([*replies])

    def _paraphrase_consistency(self, outcomes: Sequence[str | Failure]) -> RowScores | None:
        """Return the share of equal pairs of replies in :attr:`groups`, without lost replies."""
        replies = [
            [reply for n in group if isinstance(reply := outcomes[n], str)] for group in self.groups
        ]
        pairs = [each for each in replies if len(each) > 1]
        return equal_pairs(pairs) if pairs else None

    def ask(
        self,
        model: ChatModel,
        rows: Sequence[Row],
        questions: Sequence[Question],
        variants: Sequence[PromptVariant],
        count: Callable[[Sequence[str]], float],
    ) -> list[Contender]:
        """Measure a model at an endpoint in several variants. ``count`` returns the mean tokens.

        Raises:
            LuthierError: if the endpoint answers no row.
        """
        self.note(f"rival: {model.terms}")
        write = writer_of(model, "rival", SamplingSpec(max_tokens=self.max_tokens), self.note)
        contenders = []
        for variant in variants:
            zero = variant.technique == "zero-shot"
            name = model.name if zero else f"{model.name} with {variant.name}"
            prompt_rows = rows_of_variant(rows, questions, variant, None)
            began = time.perf_counter()
            outcomes = write([row.prompt_turns() for row in prompt_rows])
            seconds = (time.perf_counter() - began) / len(rows)
            self.finished += len(rows)
            lost = [each for each in outcomes if isinstance(each, Failure)]
            if len(lost) == len(rows):
                raise LuthierError(f"{name}: {lost[0].reason}")
            if lost:
                self.remarks.append(
                    f"{name}: {len(lost):,} missing replies count as empty: {lost[0].reason}"
                )
            replies = [each if isinstance(each, str) else "" for each in outcomes]
            graded = grade(prompt_rows, replies, self.graders)
            contenders.append(
                Contender(
                    name, variant.technique, first_score(graded), graded.scores, seconds,
                    count([_prompt_text(row) for row in prompt_rows]), count(replies),
                    str(model.identity["model"]), replies=replies,
                    paraphrase_consistency=self._paraphrase_consistency(outcomes),
                )
            )  # fmt: skip
        return contenders

    def copies(
        self,
        rows: Sequence[Row],
        questions: Sequence[Question],
        train_questions: Sequence[Question],
    ) -> list[Contender]:
        """Measure copies of training replies: the nearest row's, and a frequent reply."""
        began = time.perf_counter()
        replies = [nearest.answer for (nearest,) in nearest_examples(questions, train_questions, 1)]
        seconds = (time.perf_counter() - began) / len(rows)
        contenders = [self._copy("the nearest row by words", rows, replies, seconds)]
        reply, count = Counter(each.answer for each in train_questions).most_common(1)[0]
        if count > max(1, FREQUENT * len(train_questions)):
            name = "always the most frequent reply"
            contenders.append(self._copy(name, rows, [reply] * len(rows), 0.0))
        return contenders

    def lead(
        self,
        rows: Sequence[Row],
        train: Sequence[Row],
        questions: Sequence[Question],
        train_questions: Sequence[Question],
    ) -> list[Contender]:
        """Measure the first words of the prompt as a reply, the usual rival of summaries.

        Training rows choose the number of words. Empty unless prompts are much longer than replies.
        """
        name, grader = next(iter(self.graders.items()))
        words = median_words(_last_turn(each) for each in train_questions)
        if not isinstance(grader, Similarity) or words < SUMMARY * median_words(
            each.answer for each in train_questions
        ):
            return []
        step = max(1, len(train) // LEAD_ROWS)
        chosen = [*zip(train, train_questions, strict=True)][::step]

        def score_of(size: int) -> float:
            replies = [_first_words(each, size) for _, each in chosen]
            return first_score(grade([row for row, _ in chosen], replies, {name: grader})).value

        best = max(LEADS, key=score_of)
        replies = [_first_words(each, best) for each in questions]
        return [self._copy(f"the first {best} words of the prompt", rows, replies, 0.0)]

    def _copy(
        self, name: str, rows: Sequence[Row], replies: Sequence[str], seconds: float
    ) -> Contender:
        graded = grade(rows, replies, self.graders)
        return Contender(
            name, "simple baselines", first_score(graded), graded.scores, seconds, replies=replies
        )

    def baselines(
        self,
        base: StoredModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        roots: Collection[str] = (),
    ) -> list[Contender]:
        """Fit and measure simple baselines on the training rows, without the bases ``roots``."""
        self.note("Fitting simple baselines")
        fitted = self._fit_baselines(base, rows, train, roots)
        if fitted is None:
            return []
        compared = fitted.comparison
        self.remarks += [f"{name} omitted: not enough time or memory" for name in compared.left_out]
        answers = compared.rows + compared.train_rows
        return [
            Contender(
                each.name, "simple baselines", score, each.scores, each.seconds / answers,
                constant=each.constant,
            )
            for each, score in zip(compared.baselines, fitted.row_scores, strict=True)
        ]  # fmt: skip

    def _fit_baselines(
        self, base: StoredModel, rows: Sequence[Row], train: Sequence[Row], roots: Collection[str]
    ) -> FittedBaselines | None:
        from luthier.engine.comparison import encode_cut, fit_baselines

        task = CATALOGUE if of_shape(History, rows) else task_of(rows[0])
        if not task.reads_states:
            until = time.monotonic() + BASELINE_SECONDS
            return fit_and_score(task, train, rows, None, until, roots=roots)
        encoder = OBJECTIVES[task.encoder].model_validate({})
        chat, room = base.chat, base.room

        def encode(some: Sequence[Row]) -> list[Example]:
            # A bare row of a pair has one side only.
            inputs = some if task.embeds else [row.bare() for row in some]
            return encode_cut(encoder, inputs, chat, room)

        held = ComparedRows(rows, encode(rows))
        learned = ComparedRows.of(train, encode(train), task.is_comparable, SEED)
        if not learned:  # the task has no baselines
            return None
        cut = sum(not task.is_comparable(*each) for each in zip(rows, held.examples, strict=True))
        if cut:  # words behind the cut have no state
            self.remarks.append(
                f"baselines on states omitted: {cut:,} rows exceed the context of {base.id}"
            )
            until = time.monotonic() + BASELINE_SECONDS
            return fit_and_score(task, learned.rows, rows, None, until, roots=roots)
        network = open_network(base, EMBEDDING_HEAD)
        return fit_baselines(
            network, encoder, task, learned, held, READING_BUDGET, BASELINE_SECONDS, roots=roots
        )

    def _done(self, count: int) -> None:
        self.on_progress(self.finished + count, self.total)


def hardest_rows(measure: str, score: RowScores, count: int) -> list[int]:
    """Return the numbers of ``count`` rows, the worst first."""
    gain_R = as_gain(measure, 1.0) * (score.parts_R - score.wholes_R)
    return [int(number) for number in np.argsort(gain_R, kind="stable")[:count]]


def _weight_bytes(stored: StoredModel) -> int:
    folders = {stored.network_folder, stored.folder}
    return sum(folder_size(folder, ".safetensors") for folder in folders)


def _training(stored: StoredModel, name: str) -> float:
    """Return ``seconds`` or ``tokens`` of the training."""
    return float((stored.manifest.metrics or {}).get(name, 0.0))


def _last_turn(question: Question) -> str:
    return question.asked[-1].content


def _first_words(question: Question, count: int) -> str:
    return " ".join(_last_turn(question).split()[:count])


def _prompt_text(row: Row) -> str:
    return "\n".join(turn.content for turn in row.prompt_turns())


def graders_for(rows: Sequence[Row], note: Callable[[str], None]) -> dict[str, Grader]:
    """Return the graders for replies to ``rows``; the first grader decides."""
    if len(of_shape(LabelledText, rows) or ()) == len(rows):
        # A base model without tuning writes labels with capitals and full stops.
        return {"exact": Exact(ignore_case=True, ignore_punctuation=True)}
    return default_graders(rows, note)


def count_tokens(chat: ChatFormat, texts: Sequence[str]) -> float:
    """Return the mean tokens of ``texts``."""
    return sum(len(chat.tokenizer.encode(text)) for text in texts) / len(texts)


def first_score(graded: Evaluation) -> RowScores:
    """Return the score that decides, row by row."""
    score = next(iter(graded.row_scores.values()))
    assert isinstance(score, RowScores)
    return score


def equal_pairs(groups: Sequence[Sequence[str]]) -> RowScores:
    """Return the share of equal pairs in each group of at least two replies."""
    counts = [Counter(reply.strip() for reply in group) for group in groups]
    shares = [
        sum(n * (n - 1) for n in count.values()) / (len(group) * (len(group) - 1))
        for count, group in zip(counts, groups, strict=True)
    ]
    return RowScores.of(shares)
