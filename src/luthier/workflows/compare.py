"""Comparison of tuned models with techniques without training, on the same held-out rows.

A generative base model answers with several techniques (:mod:`luthier.workflows.prompting`). For
encoders, simple baselines are fitted (:mod:`luthier.evaluation.baselines`). Copying the answer of
the nearest training row is always a rival. All contenders answer the same rows, so differences are
paired, with Holm's correction. The cost of an answer is measured in the same run.

Left out: a search for the best prompt (DSPy and GEPA do that), several samples per answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from luthier.chat_models.base import ChatModel
from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.texts import LabelledText, QueryDocument
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.significance import Difference, RowScores, as_gain, differences
from luthier.gate.checks.leakage import TOO_MANY
from luthier.gate.row_keys import match_questions, repeated_rows
from luthier.graders.base import Answer
from luthier.graders.ruler import judge_pairs
from luthier.inference.prediction import Predictor
from luthier.models.base_kinds import sole_objective
from luthier.models.catalog import begins_random
from luthier.pages import PAGE, Table, Tabular, summary_page
from luthier.types import Row
from luthier.workflows.contenders import (
    SHOWN,
    Contender,
    Contest,
    count_tokens,
    graders_for,
    hardest_rows,
)
from luthier.workflows.estimate.budget import BreakEven
from luthier.workflows.evaluate import open_graders
from luthier.workflows.prompting import (
    PassageSearch,
    PromptVariant,
    Records,
    own_prompts,
    prompt_variants,
    questions_with_labels,
)

if TYPE_CHECKING:
    from luthier.graders import Grader, Ruler
    from luthier.library.models import StoredModel
    from luthier.workflows.estimate.budget import Prices

EQUAL_TIME_RATIO = 1.5
"""Ratio of times up to which times count as equal, because replies are timed once."""
LOW_SCORE = 0.1
"""Best score up to which the grader or the model may be unsuitable."""

SAMPLED, PARAPHRASED = "samples equal ±", "paraphrases equal ±"
MEANINGS = {
    "score ±": "± one standard error",
    "vs. best ±": "* not significant, corrected for all comparisons (Holm)",
    "tokens": "tokens per prompt",
    "ms": "milliseconds per answer",
    "MB": "peak memory with weights, without Python and the libraries",
    "/1,000": "cost of 1,000 answers",
    SAMPLED: "equal pairs of sampled replies to a row",
    PARAPHRASED: "equal pairs of replies to paraphrases",
    "preparation, s": "preparation is the time of tuning",
}
"""Meaning of the columns of a comparison; the name of a currency is omitted."""


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

    def tables(self) -> Sequence[Table]:
        """Return scores and costs of the contenders."""
        prices, behind, months = self.prices, self.behind(), self.break_even()
        generates = any(each.prompt_tokens is not None for each in self.contenders)
        further = [name for name in self.best.scores if name != self.measure and generates]
        # Pairs, because a grader may have the name of another column.
        columns = [("", "name"), ("technique", "detail"), ("score ±", "number"), ("95 %", "detail")]
        numbers = ["vs. best ±", *further, *["tokens"] * generates, "ms", "MB"]
        if prices is not None:
            numbers.append(f"{prices.currency}/1,000")
            numbers += [f"{prices.currency}/month", "repaid"] if self.per_month else []
        shares = {
            SAMPLED: [each.consistency for each in self.contenders],
            PARAPHRASED: [each.paraphrase_consistency for each in self.contenders],
        }
        shares = {name: column for name, column in shares.items() if any(column)}
        columns += [(name, "number") for name in (*numbers, *shares)]
        columns += [("preparation, s", "detail")]
        rows = []
        for number, each in enumerate(self.contenders):
            cost, apart = self.cost_per_thousand(each), behind.get(each.name)
            low, high = map(self._text, each.score.interval)
            rows.append(
                [
                    each.name, each.technique,
                    f"{self._text(each.score.value)} {self._text(each.score.error)}",
                    f"{low} to {high}",
                    "" if apart is None else f"{self._text(apart.value, signed=True)} "
                    f"{self._text(apart.error)}{'' if apart.significant else ' *'}",
                    *(f"{each.scores[name]:.3f}" if name in each.scores else "" for name in further),
                    *["" if each.prompt_tokens is None else f"{each.prompt_tokens:,.0f}"] * generates,
                    f"{1000 * each.seconds:,.1f}",
                    f"{each.memory_bytes / 1e6:,.0f}" if each.memory_bytes else "",
                    *([] if prices is None else ["" if cost is None else f"{cost:.3g}"]),
                    *self._monthly_cells(each, months),
                    *(_share_text(column[number]) for column in shares.values()),
                    f"{each.preparation_seconds:,.0f}" if each.preparation_seconds else "",
                ]
            )  # fmt: skip
        strong = [each.name for each in self.contenders if each.is_tuned]
        caption = f"{self.measure.replace('_', ' ')} on {self.rows:,} rows"
        return [Table.of(caption, columns, rows, strong=strong)]

    def notes(self, page: bool) -> str:
        """Return the meaning of the columns of a page, or of a terminal, which has fewer."""
        (table,) = self.tables()
        currency = "" if self.prices is None else self.prices.currency
        shown = [name for name, kind in table.columns if page or kind != "detail"]
        meanings = (MEANINGS.get(name.removeprefix(currency)) for name in shown)
        return "; ".join(dict.fromkeys(filter(None, meanings)))

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
        if faster is tuned and rival.technique == "simple baselines":
            return ""  # the time of a baseline includes the fit
        ratio = slowest / fastest
        text = f"Speed: {faster.name} is {ratio:,.{1 if ratio < 10 else 0}f} times as fast"
        spent = tuned.preparation_seconds - rival.preparation_seconds
        if faster is tuned and spent > 0:
            answers = spent / (rival.seconds - tuned.seconds)
            text += f" and repays the time of tuning after {answers:,.0f} answers"
        return f"{text}."

    def _monthly_cells(self, contender: Contender, months: Mapping[str, BreakEven]) -> list[str]:
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
            for name in ("consistency", "paraphrase_consistency"):
                if (share := getattr(each, name)) is not None:
                    line[name] = {"value": share.value, "interval": list(share.interval)}
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
    paraphrases: str | None = None,
    search_index: PassageSearch | None = None,
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
        show: number of rows whose replies of base and tuned models are returned, the worst first.
        seeds: number of sampled replies to each row, for the consistency of base and tuned models.
        per_month: number of answers in a month, for monthly costs.
        paraphrases: column that is equal for paraphrases of a question, for the consistency of
            generative models.
        search_index: search of the passages of an index, as ``luthier ask`` uses it.
        note: called with progress messages.
        on_progress: called with the number of answers and the total.

    Raises:
        DataError: if a tenth of ``rows`` are training rows.
        RecipeError: if there is nothing to compare, or for rivals and rows with tools or images.
    """

    if not rows:
        raise RecipeError("the comparison needs rows")
    check_models(base, tuned, bool(train), len(rivals))
    if rivals and (row := next((row for row in rows if row.tools or row.images), None)):
        raise RecipeError(
            f"{row.location}: The row has tools or images, which rivals at endpoints do not receive. "
            "Remove rows with tools or images, or compare without `rival`",
            setting="rival",
        )
    if of_shape(QueryDocument, rows) and any(each.objective.task.embeds for each in tuned):
        raise RecipeError(
            "labelled pairs have one score for all rows, the AUC, and a comparison needs a score for "
            "each row. Evaluate each model on these rows"
        )
    repeats = {*repeated_rows(rows)}
    rows = [row for number, row in enumerate(rows) if number not in repeats]
    remarks = check_leakage(rows, train)
    if repeats:
        remarks.append(f"{len(repeats):,} duplicate rows omitted")
    # Before the first contender, because a wrong column must not cost a comparison.
    groups = _groups(rows, records or {}, paraphrases) if paraphrases is not None else []
    labelled = len(of_shape(LabelledText, rows) or ()) == len(rows)
    if train and (unseen := unseen_labels(rows, train)):
        remarks.append(
            f"{unseen:,} of {len(rows):,} rows have a label of no training row, which examples and "
            "baselines cannot give"
        )
    generative = [base] if base and base.writes else []
    if judge is not None and (labelled or not generative):
        raise RecipeError(
            "`judge` needs rows of prompt and reply, and a generative base", setting="judge"
        )
    writers = [each for each in tuned if each.writes]
    readers = [each for each in tuned if not each.writes]
    if base and _predicts_untrained(base, readers):
        readers.append(base)
    generators = [*writers, *generative]
    writes = bool(generators or rivals)
    row_questions, train_questions = questions_with_labels(rows, train) if writes else ([], [])
    embed = None if encoder is None or not generators else Predictor.open(encoder).embed
    own: list[PromptVariant] = []
    variants: list[PromptVariant] = []
    if writes:
        own = own_prompts(prompts or {}, rows, row_questions, records or {})
        variants = [
            *prompt_variants(row_questions, train_questions, documents, embed, search_index),
            *own,
        ]
    unused = {
        "documents": documents, "index": search_index, "graders": graders, "prompts": prompts,
        "seeds": seeds, "paraphrases": paraphrases,
    }  # fmt: skip
    for option, value in unused.items():
        if value and not writes:
            remarks.append(f"{option} ignored: no model generates text")
    if graders is None:
        # From the training rows if known, so that more held-out rows do not change the measure.
        known = rows if labelled else train or rows
        graders = graders_for(known, note if writes else lambda text: None)
    generated = len(generators) * len(variants) + len(rivals) * (1 + len(own))
    replies = len(rows) * (generated + 3 * bool(train_questions))
    opened = open_graders(graders, replies, note) if writes else {}
    if judge is not None:  # each pair in both orders
        judge = open_graders({"judge": judge}, 2 * replies, note)["judge"]
    contest = Contest(
        opened,
        seeds,
        max_tokens,
        note,
        on_progress,
        len(rows) * (len(readers) + generated),
        remarks,
        groups,
    )
    contenders: list[Contender] = []
    names = [*(each.id for each in generators), *(each.name for each in rivals)]
    measures = {name: "accuracy" if labelled else next(iter(opened)) for name in names}
    for contender in contest.predict(readers, rows, show, base):
        measures[contender.name] = next(iter(contender.scores))
        contenders.append(contender)
    if base and train and (labelled or not generative):
        baselines = contest.baselines(base, rows, train, {each.root for each in tuned})
        measures |= {each.name: next(iter(each.scores)) for each in baselines}
        contenders += baselines
    check_measures(measures)
    for stored in writers:
        contenders += contest.generate(stored, rows, row_questions, variants, is_tuned=True)
    for stored in generative:
        contenders += contest.generate(stored, rows, row_questions, variants)
    for rival in rivals:
        count = partial(count_tokens, (base or tuned[0]).chat)
        contenders += contest.ask(rival, rows, row_questions, [variants[0], *own], count)
    if train_questions and not labelled:
        contenders += contest.copies(rows, row_questions, train_questions)
        contenders += contest.lead(rows, train, row_questions, train_questions)
    measure = next(iter(measures.values()))
    if judge is not None:
        measure, contenders = "win_rate", _judge(judge, generative[0].id, rows, contenders, remarks)
    if len(contenders) < 2:
        raise RecipeError("; ".join(["fewer than two contenders remain", *remarks]))
    contenders.sort(key=lambda each: -as_gain(measure, each.score.value))
    best = contenders[0].score
    if generators and best.is_share and best.value <= LOW_SCORE:
        remarks.append(
            f"nearly all replies score 0 by {measure}. If replies are right, use a different grader"
        )
    first = next((each for each in contenders if each.is_tuned), contenders[0])
    numbers = contest.shown or hardest_rows(measure, first.score, show)
    shown = _rows_to_show(rows, numbers, contenders)
    return HeadToHead(measure, len(rows), contenders, remarks, prices, shown, per_month)


def _groups(rows: Sequence[Row], records: Records, column: str) -> list[list[int]]:
    """Return the numbers of the rows with the same value of ``column``, at least two.

    Raises:
        RecipeError: if no two rows have the same value.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        value = records.get((row.file, row.line), {}).get(column)
        groups.setdefault(str(value), []).extend([number] * (value is not None))
    found = [each for each in groups.values() if len(each) > 1]
    if not found:
        raise RecipeError(
            f'No two rows have the same value of "{column}". Name the column that paraphrases of a '
            "question share.",
            setting="paraphrases",
        )
    return found


def _rows_to_show(
    rows: Sequence[Row], numbers: Sequence[int], contenders: Sequence[Contender]
) -> list[ShownRow]:
    chosen = [each for each in contenders if each.technique in SHOWN]
    shown = []
    for number in numbers:
        row = rows[number]
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
    answers = base is not None and (base.writes or _predicts_untrained(base, tuned))
    if len(tuned) + answers + rivals < 2 and not has_train:
        raise RecipeError(
            "a comparison needs two contenders. Give a generative base model, training rows for "
            "baselines, or several tuned models."
        )


def _predicts_untrained(base: StoredModel, tuned: Sequence[StoredModel]) -> bool:
    """Return whether ``base`` predicts what the first predictor of ``tuned`` does.

    A CTC text recognizer does, and a text encoder needs a new head.
    """
    first = next((each for each in tuned if not each.writes), None)
    if first is None or base.writes or begins_random(base.id):
        return False
    return sole_objective(base.kind) == first.objective.method


def unseen_labels(rows: Sequence[Row], train: Sequence[Row]) -> int:
    """Return the number of rows with a label that no training row has."""
    known = {name for row in train if isinstance(row, Labelled) for name in row.labels}
    return sum(isinstance(row, Labelled) and not known.issuperset(row.labels) for row in rows)


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
    """Return a remark on rows that have the input of a training row.

    Raises:
        DataError: with each such row, if a tenth of the rows are affected.
    """
    leaked = [rows[number] for number in match_questions(rows, train)]
    if leaked and len(leaked) >= TOO_MANY * len(rows):
        message = "the row has the input of a training row, so its score measures memory."
        fix = "Compare on held-out rows; `luthier split` creates them."
        raise DataError([Problem("leakage.input", message, fix, row.location) for row in leaked])
    if not leaked:
        return []
    return [f"{len(leaked):,} of {len(rows):,} rows have the input of a training row"]


def _judge(
    judge: Ruler,
    base: str,
    rows: Sequence[Row],
    contenders: Sequence[Contender],
    remarks: list[str],
) -> list[Contender]:
    """Score each contender by the wins against the replies of ``base``.

    Raises:
        RecipeError: if ``base`` replied to no row.
    """
    reference = next((each for each in contenders if each.name == base), None)
    if reference is None:
        raise RecipeError("; ".join([f"the judge needs replies of {base}", *remarks]))

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


def _share_text(share: RowScores | None) -> str:
    return "" if share is None else f"{share.value:.1%} {share.error:.1%}"


def comparison_page(comparison: HeadToHead, data: str, layout: str = PAGE) -> str:
    """Return the HTML page of a comparison on the rows of ``data``, whole or as a fragment."""
    return summary_page(
        f"Comparison on {data}", [comparison.verdict(), *comparison.remarks], layout,
        tables=comparison.tables(), notes=[comparison.notes(page=True)],
    )  # fmt: skip
