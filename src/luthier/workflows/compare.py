"""Comparison of tuned models with techniques without training, on the same held-out rows.

A generative base model answers with several techniques (:mod:`luthier.workflows.prompting`). For
encoders, simple baselines are fitted (:mod:`luthier.evaluation.baselines`). Copying the answer of
the nearest training row is always a rival. All contenders answer the same rows, so differences are
paired, with Holm's correction. The cost of an answer is measured in the same run.

Left out: a search for the best prompt (DSPy and GEPA do that), several samples per answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from luthier import __version__
from luthier.chat_models.base import ChatModel, Failure, SamplingSpec, writer_of
from luthier.data.shapes import of_shape
from luthier.data.shapes.texts import LabelledText
from luthier.data.tree import READING_BUDGET
from luthier.engine.machine import begin_peak_memory, peak_memory
from luthier.errors import DataError, LuthierError, Problem, RecipeError
from luthier.evaluation.baselines import (
    ComparedRows,
    FittedBaselines,
    fit_and_score,
)
from luthier.evaluation.evaluate import default_graders, grade
from luthier.evaluation.significance import Difference, RowScores, as_gain, differences
from luthier.files import folder_size
from luthier.gate.checks.leakage import TOO_MANY
from luthier.gate.row_keys import match_questions, repeated_rows
from luthier.graders import Exact
from luthier.graders.base import Answer
from luthier.graders.ruler import judge_pairs
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.inference.prediction import Predictor
from luthier.models.decoding.sampling import Sampling
from luthier.models.networks.heads import EMBEDDING_HEAD
from luthier.objectives import OBJECTIVES
from luthier.objectives.by_shape import task_of
from luthier.pages import PAGE, Table, Tabular, interval_text, render_page
from luthier.types import Example, Row
from luthier.workflows.estimate.budget import BreakEven
from luthier.workflows.evaluate import grade_replies, open_graders
from luthier.workflows.latency import measure_latency
from luthier.workflows.prompting import (
    PromptVariant,
    Question,
    Records,
    Technique,
    nearest_examples,
    own_prompts,
    prompt_variants,
    questions_of,
    rows_of_variant,
)
from luthier.workflows.score_predictions import score_predictions

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.graders import Grader, Ruler
    from luthier.library.models import StoredModel
    from luthier.workflows.estimate.budget import Prices

BASELINE_SECONDS = 120.0
"""Time limit of all simple baselines."""
SEED = 0
EQUAL_TIME_RATIO = 1.5
"""Ratio of times up to which times count as equal, because replies are timed once."""
FREQUENT = 0.05
"""Share of training rows with the same reply from which the reply is a rival."""
TIMED_ROWS = 256
"""Maximum number of rows for the time of an answer of a model that predicts."""
SHOWN = ("zero-shot", "fine-tuning")
"""Techniques whose replies are shown and sampled: models with the prompts as they are."""
LOW_SCORE = 0.1
"""Best score up to which the grader or the model may be unsuitable."""


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
    """Peak of resident memory with weights, beyond the memory before loading."""
    preparation_seconds: float = 0.0
    """Duration of the tuning."""
    preparation_tokens: float = 0.0
    """Training tokens of the tuning, over all epochs."""
    replies: Sequence[str] = ()
    """Replies to the rows, of a generative model."""
    consistency: RowScores | None = None
    """Share of pairs of sampled replies to a row that are equal."""

    @property
    def is_tuned(self) -> bool:
        """True if weights were trained."""
        return self.technique.startswith("fine-tuning")


@dataclass(frozen=True)
class ShownRow:
    """Replies to a row, side by side."""

    prompt: str
    expected: str
    replies: Mapping[str, str]
    """Replies of the base model and of tuned models, by name."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadToHead(Tabular):
    """A comparison on the same rows."""

    measure: str
    """``accuracy``, or the name of a grader or measure."""
    rows: int
    contenders: list[Contender]
    """Contenders, the best first."""
    remarks: list[str] = field(default_factory=list)
    prices: Prices | None = None
    shown: Sequence[ShownRow] = ()
    per_month: int = 0
    """Number of answers in a month, for monthly costs."""

    def summary(self) -> list[str]:
        """Return the first contenders and the verdict."""
        name = self.measure.replace("_", " ")
        lines = [f"Comparison: {name} on {self.rows:,} rows"]
        lines += [f"{self._text(each.score.value)} {each.name}" for each in self.contenders[:3]]
        return [*lines, self.verdict()]

    def html(self, layout: str = PAGE) -> str:
        """Return the comparison as a page or fragment."""
        return comparison_page(self, f"{self.rows:,} rows", layout)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return name, score and cost of each contender."""
        found: list[dict[str, Any]] = self.plain()["contenders"]
        return found

    @property
    def best(self) -> Contender:
        """The contender with the best score."""
        return self.contenders[0]

    def behind(self) -> dict[str, Difference]:
        """Return the difference of each contender to the best contender."""
        return differences(self.best.score, {each.name: each.score for each in self.contenders[1:]})

    def cost_per_thousand(self, contender: Contender) -> float | None:
        """Return the price of 1,000 answers, if prices are known."""
        if self.prices is None:
            return None
        if not contender.endpoint:
            return self.prices.cost(1000 * contender.seconds, 0)
        tokens, prompt = self.prices.endpoints.get(contender.endpoint), contender.prompt_tokens
        return (
            tokens.cost(1000 * (prompt or 0.0), 1000 * contender.reply_tokens) if tokens else None
        )

    def cost_per_month(self, contender: Contender) -> float | None:
        """Return the price of a month with :attr:`per_month` answers, if prices are known."""
        if self.prices is None or not self.per_month:
            return None
        if not contender.endpoint:
            return self.prices.month(self.per_month * contender.seconds)
        cost = self.cost_per_thousand(contender)
        return None if cost is None else cost * self.per_month / 1000

    def break_even(self) -> dict[str, BreakEven]:
        """Return the costs of the best tuned contender against each untuned contender, by name."""
        tuned = next((each for each in self.contenders if each.is_tuned), None)
        own = None if tuned is None else self.cost_per_month(tuned)
        if tuned is None or own is None or self.prices is None:
            return {}
        training = self.prices.cost(tuned.preparation_seconds, tuned.preparation_tokens)
        return {
            each.name: BreakEven(
                tuned.name, each.name, self.per_month, self.prices.currency, own, cost, training
            )
            for each in self.contenders
            if not each.is_tuned and (cost := self.cost_per_month(each)) is not None
        }

    @property
    def rivals(self) -> tuple[Contender, Contender] | None:
        """Best tuned contender and best untuned contender, if both exist."""
        tuned = next((each for each in self.contenders if each.is_tuned), None)
        rival = next((each for each in self.contenders if not each.is_tuned), None)
        return None if tuned is None or rival is None else (tuned, rival)

    @property
    def worth_it(self) -> bool | None:
        """True if the tuned model is better beyond chance, False if worse, None if undecided."""
        if self.rivals is None:
            return None
        gain = self._gain(*self.rivals)
        return gain.value > 0 if gain.significant else None

    def _gain(self, tuned: Contender, rival: Contender) -> Difference:
        """Return the advantage of ``tuned``; either ``tuned`` or ``rival`` is the best contender."""
        leads = tuned is self.best
        difference = self.behind()[rival.name if leads else tuned.name]
        value = 0.0 - difference.value if leads else difference.value  # not -0.0
        return replace(difference, value=as_gain(self.measure, value))

    def verdict(self) -> str:
        """Return a sentence or two on the benefit of tuning."""
        if self.rivals is None:
            return f"The best contender is {self.best.name}."
        tuned, rival = self.rivals
        gain = self._gain(tuned, rival)
        difference = (
            f"{self._text(gain.value, signed=True)} \N{PLUS-MINUS SIGN} {self._text(gain.error)}"
        )
        scores = (
            f"{tuned.name} has {self._text(tuned.score.value)} against "
            f"{self._text(rival.score.value)} of {rival.name} ({difference})"
        )
        if self.worth_it:
            text = f"Tuning was worth it: {scores}."
        elif self.worth_it is False:
            text = f"Do not use the tuned model: {scores}, without tuning."
        else:
            least = NormalDist().inv_cdf(1 - 0.025 / (len(self.contenders) - 1)) * gain.error
            text = (
                f"Tuning is not significantly better: {scores}. {self.rows:,} rows show differences of "
                f"{self._text(least)} and more."
            )
        text = f"{text} {self._speed_text(tuned, rival)}".strip()
        # The best untuned contender with a price.
        month = next(iter(self.break_even().values()), None)
        return text if month is None else f"{text} {month.verdict()}"

    def _speed_text(self, tuned: Contender, rival: Contender) -> str:
        """Compare the times of an answer, if the difference exceeds the error of measurement."""
        fastest, slowest = sorted((tuned.seconds, rival.seconds))
        if not fastest or slowest / fastest < EQUAL_TIME_RATIO:  # a constant answer takes no time
            return ""
        faster = rival if tuned.seconds > rival.seconds else tuned
        ratio = slowest / fastest
        text = f"Speed: {faster.name} is {ratio:,.{1 if ratio < 10 else 0}f} times as fast"
        spent = tuned.preparation_seconds - rival.preparation_seconds
        if faster is tuned and spent > 0:
            answers = spent / (rival.seconds - tuned.seconds)
            text += f" and repays the time of tuning after {answers:,.0f} answers"
        return f"{text}."

    def monthly_cells(self, contender: Contender, months: Mapping[str, BreakEven]) -> list[str]:
        """Return the monthly cost and the month of break-even as text; empty without a load."""
        if self.prices is None or not self.per_month:
            return []
        cost, found = self.cost_per_month(contender), months.get(contender.name)
        repaid = "" if found is None else f"month {found.month:,}" if found.month else "never"
        return ["" if cost is None else f"{cost:,.2f}", repaid]

    def _text(self, score: float, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{score:{sign}.1%}" if self.best.score.is_share else f"{score:{sign}.3g}"

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        behind, months = self.behind(), self.break_even()
        contenders = []
        for each in self.contenders:
            line: dict[str, Any] = {
                "name": each.name, "technique": each.technique, "score": each.score.value,
                "error": each.score.error, "interval": list(each.score.interval), "scores": each.scores,
                "seconds": each.seconds, "model_bytes": each.model_bytes,
                "memory_bytes": each.memory_bytes,
            }  # fmt: skip
            if each.prompt_tokens is not None:
                line["prompt_tokens"] = each.prompt_tokens
            if each.consistency is not None:
                low, high = each.consistency.interval
                line["consistency"] = {"value": each.consistency.value, "interval": [low, high]}
            if each.preparation_seconds:
                line["preparation_seconds"] = each.preparation_seconds
            if (cost := self.cost_per_thousand(each)) is not None:
                line["cost_per_1000"] = cost
            if (cost := self.cost_per_month(each)) is not None:
                line["cost_per_month"] = cost
            if each.name in months:
                line["break_even_month"] = months[each.name].month
            if each.name in behind:
                line["behind_best"] = behind[each.name].plain()
            contenders.append(line)
        return {
            "measure": self.measure, "rows": self.rows, "contenders": contenders,
            "worth_it": self.worth_it, "verdict": self.verdict(), "remarks": self.remarks,
            **({"shown": [asdict(each) for each in self.shown]} if self.shown else {}),
            **({} if self.prices is None else {"currency": self.prices.currency}),
        }  # fmt: skip


def compare(
    rows: Sequence[Row],
    base: StoredModel | None,
    tuned: Sequence[StoredModel],
    train: Sequence[Row] = (),
    documents: Sequence[str] = (),
    graders: Mapping[str, Grader] | None = None,
    max_tokens: int = 64,
    prices: Prices | None = None,
    encoder: StoredModel | None = None,
    judge: Ruler | None = None,
    prompts: Mapping[str, str] | None = None,
    records: Records | None = None,
    rivals: Sequence[ChatModel] = (),
    show: int = 0,
    seeds: int = 0,
    per_month: int = 0,
    note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadToHead:
    """Compare models and techniques on ``rows``.

    Args:
        rows: held-out rows.
        base: the model without training; None to compare tuned models only.
        tuned: tuned models.
        train: rows for examples and baselines.
        documents: texts for retrieval.
        graders: graders of replies; the first grader decides.
        max_tokens: maximum length of a reply.
        prices: prices of the machine.
        encoder: embedding model for the search of examples and passages.
        judge: compares the replies with the base model's replies.
        prompts: own instructions or templates by name (:func:`own_prompts`).
        records: columns of the rows, for placeholders.
        rivals: models at endpoints.
        show: number of rows whose replies of base and tuned models are returned.
        seeds: number of sampled replies to each row, for the consistency of base and tuned models.
        per_month: number of answers in a month, for monthly costs.
        note: called with progress messages.
        on_progress: called with the number of answers and the total.

    Raises:
        DataError: if a tenth of ``rows`` are training rows.
        RecipeError: if there is nothing to compare.
    """

    if not rows:
        raise RecipeError("the comparison needs rows")
    check_models(base, tuned, bool(train), len(rivals))
    repeats = {*repeated_rows(rows)}
    rows = [row for number, row in enumerate(rows) if number not in repeats]
    remarks = check_leakage(rows, train)
    if repeats:
        remarks.append(f"{len(repeats):,} duplicate rows omitted")
    labelled = len(of_shape(LabelledText, rows) or ()) == len(rows)
    generative = [base] if base and base.writes else []
    if judge is not None and (labelled or not generative):
        raise RecipeError(
            "`judge` needs rows of prompt and reply, and a generative base", setting="judge"
        )
    writers = [each for each in tuned if each.writes]
    readers = [each for each in tuned if not each.writes]
    generators = [*writers, *generative]
    writes = bool(generators or rivals)
    row_questions, train_questions = _questions(rows, train) if writes else ([], [])
    embed = None if encoder is None or not generators else Predictor.open(encoder).embed
    own: list[PromptVariant] = []
    variants: list[PromptVariant] = []
    if writes:
        own = own_prompts(prompts or {}, rows, row_questions, records or {})
        variants = [*prompt_variants(row_questions, train_questions, documents, embed), *own]
    for option, value in (("documents", documents), ("graders", graders), ("prompts", prompts)):
        if value and not writes:
            remarks.append(f"{option} ignored: no model generates text")
    if graders is None and labelled:
        # A base model without tuning writes labels with capitals and full stops.
        graders = {"exact": Exact(ignore_case=True, ignore_punctuation=True)}
    elif graders is None:
        # From the training rows if known, so that more held-out rows do not change the measure.
        graders = default_graders(train or rows, note if writes else lambda text: None)
    generated = len(generators) * len(variants) + len(rivals) * (1 + len(own))
    replies = len(rows) * (generated + 2 * bool(train_questions))
    opened = open_graders(graders, replies, note) if writes else {}
    if judge is not None:  # each pair in both orders
        judge = open_graders({"judge": judge}, 2 * replies, note)["judge"]
    contest = _Contenders(
        opened,
        seeds,
        max_tokens,
        note,
        on_progress,
        len(rows) * (len(readers) + generated),
        remarks,
    )
    contenders: list[Contender] = []
    names = [*(each.id for each in generators), *(each.name for each in rivals)]
    measures = {name: "accuracy" if labelled else next(iter(opened)) for name in names}
    for contender in contest.predict(readers, rows, show):
        measures[contender.name] = next(iter(contender.scores))
        contenders.append(contender)
    if base and train and (labelled or not generative):
        baselines = contest.baselines(base, rows, train)
        measures |= {each.name: next(iter(each.scores)) for each in baselines}
        contenders += baselines
    check_measures(measures)
    for stored in writers:
        contenders += contest.generate(stored, rows, row_questions, variants, is_tuned=True)
    for stored in generative:
        contenders += contest.generate(stored, rows, row_questions, variants)
    for rival in rivals:
        count = partial(_count_tokens, (base or tuned[0]).chat)
        contenders += contest.ask(rival, rows, row_questions, [variants[0], *own], count)
    if train_questions and not labelled:
        contenders += contest.copies(rows, row_questions, train_questions)
    measure = next(iter(measures.values()))
    if judge is not None:
        measure, contenders = "win_rate", _judge(judge, rows, contenders, remarks)
    if len(contenders) < 2:
        raise RecipeError("; ".join(["fewer than two contenders remain", *remarks]))
    contenders.sort(key=lambda each: -as_gain(measure, each.score.value))
    best = contenders[0].score
    if generators and best.is_share and best.value <= LOW_SCORE:
        remarks.append(
            f"nearly all replies score 0 by {measure}. If replies are right, use a different grader"
        )
    shown = _shown(rows[:show], contenders)
    return HeadToHead(measure, len(rows), contenders, remarks, prices, shown, per_month)


def _shown(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[ShownRow]:
    chosen = [each for each in contenders if each.technique in SHOWN]
    shown = []
    for number, row in enumerate(rows):
        asked = row.prompt_turns()
        prompt = asked[-1].content if asked else row.plain_text()
        expected = row.target() if (reply := row.expected_reply()) is None else reply
        replies = {each.name: each.replies[number] for each in chosen if each.replies}
        shown.append(ShownRow(prompt, str(expected), replies))
    return shown


def check_models(
    base: StoredModel | None, tuned: Sequence[StoredModel], has_train: bool, rivals: int = 0
) -> None:
    """Raise :class:`RecipeError` for a model that is listed twice, or for a single contender."""
    names = [each.id for each in (base, *tuned) if each]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"{duplicate} is listed twice. Name each model once.")
    if len(tuned) + bool(base and base.writes) + rivals < 2 and not has_train:
        raise RecipeError(
            "a comparison needs two contenders. Give a generative base model, training rows for "
            "baselines, or several tuned models."
        )


def check_measures(measures: Mapping[str, str]) -> None:
    """Raise :class:`RecipeError` for contenders with different measures."""
    first, *rest = measures.items()
    for name, other in rest:
        if other != first[1]:
            raise RecipeError(
                f"{first[0]} is measured by {first[1]}, and {name} by {other}. Compare models with the "
                "same measure."
            )


def check_leakage(rows: Sequence[Row], train: Sequence[Row]) -> list[str]:
    """Return a remark on rows that have the question of a training row.

    Raises:
        DataError: with each such row, if a tenth of the rows are affected.
    """
    leaked = [rows[number] for number in match_questions(rows, train)]
    if leaked and len(leaked) >= TOO_MANY * len(rows):
        message = "the row has the question of a training row, so its score measures memory."
        fix = "Compare on held-out rows; `luthier split` creates them."
        raise DataError([Problem("leakage.input", message, fix, row.location) for row in leaked])
    if not leaked:
        return []
    return [f"{len(leaked):,} of {len(rows):,} rows have the question of a training row"]


def _judge(
    judge: Ruler, rows: Sequence[Row], contenders: Sequence[Contender], remarks: list[str]
) -> list[Contender]:
    reference = next(each for each in contenders if each.technique == "zero-shot")

    def answers(contender: Contender) -> list[Answer]:
        pairs = zip(rows, contender.replies, strict=True)
        return [Answer.of(row, reply) for row, reply in pairs]

    judged, consistent = [], list[bool]()
    for each in contenders:
        verdicts = judge_pairs(judge, [*zip(answers(each), answers(reference), strict=True)])
        score = RowScores.of([verdict.win for verdict in verdicts])
        judged.append(replace(each, score=score, scores={"win_rate": score.value, **each.scores}))
        consistent += [v.is_consistent for v in verdicts if v.is_consistent is not None]
    remark = f"the win rate is against {reference.name}, with each pair in both orders"
    if consistent:
        changed = 1 - sum(consistent) / len(consistent)
        remark += f"; the order changed {changed:.0%} of the verdicts, which count one half"
    remarks.append(remark)
    return judged


def _questions(rows: Sequence[Row], train: Sequence[Row]) -> tuple[list[Question], list[Question]]:
    both = [*(of_shape(LabelledText, rows) or ()), *(of_shape(LabelledText, train) or ())]
    labels = sorted({row.label for row in both if isinstance(row.label, str)})
    return questions_of(rows, labels), questions_of(train, labels)


@dataclass
class _Contenders:
    """State of a comparison while the contenders answer in turn."""

    graders: Mapping[str, Grader]
    seeds: int
    max_tokens: int
    note: Callable[[str], None]
    on_progress: Callable[[int, int], None]
    total: int
    """Expected number of answers."""
    remarks: list[str]
    finished: int = 0

    def predict(
        self, models: Sequence[StoredModel], rows: Sequence[Row], show: int
    ) -> list[Contender]:
        """Measure models that predict, with the predictions for the first ``show`` rows."""
        contenders, passes = list[Contender](), dict[str, Callable[[], object]]()
        for stored in models:
            base_memory = begin_peak_memory()
            predictor = Predictor.open(stored)
            evaluation = score_predictions(predictor, rows, self._done)
            self.finished += len(rows)
            score = next(iter(evaluation.row_scores.values()))
            if not isinstance(score, RowScores) or not len(score) == len(evaluation.rows) == len(
                rows
            ):
                raise RecipeError(f"{stored.id} has no scores per row for this kind of rows")
            task, answers = predictor.objective.task, predictor.answers(rows[:show])
            contender = Contender(
                stored.id, "fine-tuning", score, evaluation.scores, 0.0,
                model_bytes=_weight_bytes(stored), memory_bytes=peak_memory() - base_memory,
                preparation_seconds=_training(stored, "seconds"),
                preparation_tokens=_training(stored, "tokens"),
                replies=[task.show(each, predictor.threshold, 1).strip() for each in answers],
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
        """Measure a generative model in several variants."""
        base_memory = begin_peak_memory()
        generator = Generator.open(stored)
        sampling = Sampling(max_tokens=self.max_tokens)
        contenders = list[Contender]()
        for variant in variants:
            technique: Technique = variant.technique
            name = stored.id if technique == "zero-shot" else f"{stored.id} with {variant.name}"
            if is_tuned:
                technique = variant.tuned_technique
            prompt_rows = rows_of_variant(rows, questions, variant, generator.chat)
            prompts = [Chat(tuple(row.prompt_turns()), row.tools) for row in prompt_rows]
            too_long = sum(generator.refusal(prompt, sampling) is not None for prompt in prompts)
            if too_long:
                self.remarks.append(f"{name} omitted: {too_long:,} prompts exceed the context")
                self.finished += len(rows)
                continue
            tokens = sum(map(generator.prompt_tokens, prompts)) / len(prompts)
            if not contenders:  # the first batch also loads kernels
                generator.replies(prompts[:1], replace(sampling, max_tokens=1))
            begin_peak_memory()
            graded = grade_replies(
                generator, prompt_rows, self.graders, self.max_tokens, self._done
            )
            self.finished += len(rows)
            contenders.append(
                Contender(
                    name, technique, _first_score(graded), graded.scores,
                    graded.reply_seconds / len(rows), tokens, model_bytes=_weight_bytes(stored),
                    memory_bytes=peak_memory() - base_memory,
                    preparation_seconds=_training(stored, "seconds") if is_tuned else 0.0,
                    preparation_tokens=_training(stored, "tokens") if is_tuned else 0.0,
                    replies=[each["reply"] for each in graded.records],
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
        counts = [Counter(reply.strip() for reply in row) for row in replies]
        pairs = self.seeds * (self.seeds - 1)
        return RowScores.of([sum(n * (n - 1) for n in c.values()) / pairs for c in counts])

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
                    name, variant.technique, _first_score(graded), graded.scores, seconds,
                    count([_prompt_text(row) for row in prompt_rows]), count(replies),
                    str(model.identity["model"]), replies=replies,
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

    def _copy(
        self, name: str, rows: Sequence[Row], replies: Sequence[str], seconds: float
    ) -> Contender:
        graded = grade(rows, replies, self.graders)
        return Contender(
            name, "simple baselines", _first_score(graded), graded.scores, seconds, replies=replies
        )

    def baselines(
        self, base: StoredModel, rows: Sequence[Row], train: Sequence[Row]
    ) -> list[Contender]:
        """Fit and measure simple baselines on the training rows."""
        self.note("Fitting simple baselines")
        fitted = self._fit_baselines(base, rows, train)
        if fitted is None:
            return []
        compared = fitted.comparison
        self.remarks += [f"{name} omitted: not enough time or memory" for name in compared.left_out]
        answers = compared.rows + compared.train_rows
        return [
            Contender(each.name, "simple baselines", score, each.scores, each.seconds / answers)
            for each, score in zip(compared.baselines, fitted.row_scores, strict=True)
        ]

    def _fit_baselines(
        self, base: StoredModel, rows: Sequence[Row], train: Sequence[Row]
    ) -> FittedBaselines | None:
        from luthier.engine.comparison import encode_cut, fit_baselines
        from luthier.engine.machine import open_network

        task = task_of(rows[0])
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
            return fit_and_score(task, learned.rows, rows, None, until)
        network = open_network(base, EMBEDDING_HEAD)
        return fit_baselines(
            network, encoder, task, learned, held, READING_BUDGET, BASELINE_SECONDS
        )

    def _done(self, count: int) -> None:
        self.on_progress(self.finished + count, self.total)


def _weight_bytes(stored: StoredModel) -> int:
    folders = {stored.network_folder, stored.folder}
    return sum(folder_size(folder, ".safetensors") for folder in folders)


def _training(stored: StoredModel, name: str) -> float:
    """Return ``seconds`` or ``tokens`` of the training."""
    return float((stored.manifest.metrics or {}).get(name, 0.0))


def _prompt_text(row: Row) -> str:
    return "\n".join(turn.content for turn in row.prompt_turns())


def _count_tokens(chat: ChatFormat, texts: Sequence[str]) -> float:
    return sum(len(chat.tokenizer.encode(text)) for text in texts) / len(texts)


def _first_score(graded: Evaluation) -> RowScores:
    score = next(iter(graded.row_scores.values()))
    assert isinstance(score, RowScores)
    return score


def comparison_page(comparison: HeadToHead, data: str, layout: str = PAGE) -> str:
    """Return the HTML page of a comparison on the rows of ``data``."""
    return render_page(
        "luthier.workflows",
        "compare.html",
        layout,
        version=__version__,
        data=data,
        rows=comparison.rows,
        measure=comparison.measure.replace("_", " "),
        verdict=comparison.verdict(),
        remarks=comparison.remarks,
        scores=_score_table(comparison),
        costs=_cost_table(comparison),
    )


def _score_table(comparison: HeadToHead) -> Table:
    behind = comparison.behind()
    columns = {
        "technique": "text", "": "name", "score": "number", "95 %": "number", "to the best": "number",
        "significant": "text",
    }  # fmt: skip
    rows = []
    for each in comparison.contenders:
        difference = behind.get(each.name)
        rows.append(
            [
                each.technique, each.name, f"{each.score.value:.3f}",
                interval_text(each.score.interval),
                "" if difference is None else f"{difference.value:+.3f} ± {difference.error:.3f}",
                "" if difference is None else "yes" if difference.significant else "no",
            ]
        )  # fmt: skip
    return Table.of("Scores", columns, rows)


def _cost_table(comparison: HeadToHead) -> Table:
    columns = {
        "": "name", "input tokens": "number", "ms per answer": "number", "memory, MB": "number",
        "preparation, s": "number",
    }  # fmt: skip
    prices = comparison.prices
    columns |= {} if prices is None else {f"{prices.currency} per 1,000": "number"}
    months = comparison.break_even()
    if prices is not None and comparison.per_month:
        columns |= {f"{prices.currency} a month": "number", "repaid": "text"}
    rows = []
    for each in comparison.contenders:
        cost = comparison.cost_per_thousand(each)
        rows.append(
            [
                each.name, "" if each.prompt_tokens is None else f"{each.prompt_tokens:,.0f}",
                f"{1000 * each.seconds:,.1f}",
                f"{each.memory_bytes / 1e6:,.0f}" if each.memory_bytes else "",
                f"{each.preparation_seconds:,.0f}" if each.preparation_seconds else "",
                *([] if prices is None else ["" if cost is None else f"{cost:.3g}"]),
                *comparison.monthly_cells(each, months),
            ]
        )  # fmt: skip
    return Table.of("Cost of an answer", columns, rows)
