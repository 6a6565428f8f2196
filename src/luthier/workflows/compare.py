"""Was it worth it: tuned models beside what needs no training, on the same held-out rows.

A base model that writes is asked as it is, with examples in the prompt, with the nearest examples,
and with passages of documents (:mod:`luthier.workflows.prompting`); beside one that reads, the
simple baselines are fitted (:mod:`luthier.evaluation.baselines`), and for both the answer of the
nearest training row is taken over. Tuned models are asked as they are, and with the passages. All
answer the same rows, so differences are known row by row: which are more than chance is said with
Holm's correction for all that are compared. What an answer costs is measured in the same run.

Left out: a search for the best prompt (DSPy and GEPA do that), several samples of an answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from luthier.data.shapes import of_shape
from luthier.data.shapes.texts import LabelledText, TaggedWords
from luthier.data.tree import READING_BUDGET
from luthier.engine.machine import begin_peak_memory, peak_memory
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.baselines import (
    ComparedRows,
    FittedBaselines,
    fit_and_score,
    is_comparable,
)
from luthier.evaluation.evaluate import default_graders, grade
from luthier.evaluation.significance import (
    Difference,
    RowScores,
    as_gain,
    differences,
)
from luthier.files import folder_size
from luthier.gate.checks.leakage import TOO_MANY
from luthier.gate.row_keys import match_questions, repeated_rows
from luthier.graders import Exact
from luthier.graders.base import Answer
from luthier.graders.ruler import judge_pairs
from luthier.inference.prediction import Predictor
from luthier.models.sampling import Sampling
from luthier.types import Example, Row
from luthier.workflows.evaluate import grade_replies, open_graders
from luthier.workflows.prompting import (
    Question,
    Technique,
    Way,
    nearest_examples,
    questions_of,
    rows_of_way,
    ways_to_ask,
)
from luthier.workflows.score_predictions import score_predictions

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.graders import Grader, Ruler
    from luthier.inference.inference import Chat
    from luthier.library.models import StoredModel
    from luthier.workflows.estimate.budget import Prices

BASELINE_SECONDS = 120.0
"""For all simple baselines together."""
SEED = 0
TIMES_ALIKE = 1.5
"""Times of answers that are closer to each other are called the same: each is measured once."""
FREQUENT = 0.05
"""Share of the training rows with one reply from which that reply alone is a rival."""
NEARLY_NONE = 0.1
"""The best score, where all are shares, up to which the grader or the model may be the wrong
one."""


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to answer the rows, measured."""

    name: str
    technique: Technique
    score: RowScores
    """What all are compared by."""
    scores: dict[str, float]
    """All measures that go with such rows."""
    seconds: float
    """For one answer, in batches, on this machine."""
    prompt_tokens: float | None = None
    """Read for one answer, on average; ``None`` where no text is written."""
    model_bytes: int = 0
    """Size of the weights that answer, all of the base included."""
    memory_bytes: int = 0
    """Resident at the peak of its answering, weights included, beyond what was before it was
    opened."""
    preparation_seconds: float = 0.0
    """Time that tuning took, in seconds."""
    replies: Sequence[str] = ()
    """To the rows, of what writes."""

    @property
    def is_tuned(self) -> bool:
        """Whether weights were trained for it."""
        return self.technique.startswith("fine-tuning")


@dataclass(frozen=True, eq=False)
class HeadToHead:
    """Several ways to answer the same rows."""

    measure: str
    """What is compared: ``accuracy``, or the name of a grader or a measure."""
    rows: int
    contenders: list[Contender]
    """The best first."""
    remarks: list[str] = field(default_factory=list)
    """What was left out, and what the rows do not say."""
    prices: Prices | None = None

    @property
    def best(self) -> Contender:
        """The highest score, or the lowest error."""
        return self.contenders[0]

    def behind(self) -> dict[str, Difference]:
        """How all others differ from the best."""
        others = {each.name: each.score for each in self.contenders[1:]}
        return differences(self.best.score, others)

    def cost_per_thousand(self, contender: Contender) -> float | None:
        """Of 1,000 answers, at the prices that were given."""
        return None if self.prices is None else self.prices.cost(1000 * contender.seconds, 0)

    def break_even(self, tuned: Contender, other: Contender) -> float | None:
        """Answers after which the time that tuning took is saved; ``None`` where it never is.

        Machine time stands for money here: both run on the same machine.
        """
        saved = other.seconds - tuned.seconds
        spent = tuned.preparation_seconds - other.preparation_seconds
        return spent / saved if saved > 0 and spent > 0 else None

    @property
    def rivals(self) -> tuple[Contender, Contender] | None:
        """The best that was tuned, and the best that was not; ``None`` where one is missing."""
        tuned = next((each for each in self.contenders if each.is_tuned), None)
        rival = next((each for each in self.contenders if not each.is_tuned), None)
        return None if tuned is None or rival is None else (tuned, rival)

    @property
    def worth_it(self) -> bool | None:
        """Whether tuning was: no where it is worse, ``None`` where the rows do not decide it."""
        if self.rivals is None:
            return None
        gain = self._gain(*self.rivals)
        return gain.value > 0 if gain.significant else None

    def _gain(self, tuned: Contender, rival: Contender) -> Difference:
        """How much better ``tuned`` is, as :meth:`behind` has it: one of the two is the best."""
        leads = tuned is self.best
        found = self.behind()[rival.name if leads else tuned.name]
        # Subtracted, as of no difference minus 0 would be left.
        value = 0.0 - found.value if leads else found.value
        return replace(found, value=as_gain(self.measure, value))

    def verdict(self) -> str:
        """Whether tuning was worth it, in a sentence or two."""
        if self.rivals is None:
            return f"{self.best.name} is the best of them"
        tuned, rival = self.rivals
        gain = self._gain(tuned, rival)
        apart = (
            f"{self._text(gain.value, signed=True)} \N{PLUS-MINUS SIGN} {self._text(gain.error)}"
        )
        own, theirs = self._text(tuned.score.value), self._text(rival.score.value)
        scores = f"{tuned.name} has {own} against {theirs} of {rival.name} ({apart})"
        if self.worth_it:
            said = f"Tuning was worth it: {scores}."
        elif self.worth_it is False:
            said = f"Do not use the tuned model: {scores}, which needs no tuning."
        else:
            apart_by = NormalDist().inv_cdf(1 - 0.025 / (len(self.contenders) - 1))
            least = self._text(apart_by * gain.error)
            said = (
                f"Tuning is not shown to be better: {scores}, which may be chance; {self.rows:,} rows "
                f"tell differences of {least} and more."
            )
        return f"{said} {self._cost_text(tuned, rival)}".strip()

    def _cost_text(self, tuned: Contender, rival: Contender) -> str:
        """What an answer of both takes, where that is no matter of chance."""
        quick, slow = sorted((tuned.seconds, rival.seconds))
        if not quick:  # what answers without looking
            return ""
        ratio = slow / quick
        if ratio < TIMES_ALIKE:
            return ""
        times = f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"
        if tuned.seconds > rival.seconds:
            return f"Answers of {rival.name} come {times} as fast."
        paid = self.break_even(tuned, rival)
        text = f"Answers of {tuned.name} come {times} as fast"
        if paid is None:
            return f"{text}."
        return f"{text}: tuning has paid its time after {paid:,.0f} answers."

    def _text(self, score: float, signed: bool = False) -> str:
        is_share = self.best.score.is_share
        sign = "+" if signed else ""
        return f"{score:{sign}.1%}" if is_share else f"{score:{sign}.3g}"

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        behind = self.behind()
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
            if each.preparation_seconds:
                line["preparation_seconds"] = each.preparation_seconds
            if (cost := self.cost_per_thousand(each)) is not None:
                line["cost_per_1000"] = cost
            if each.name in behind:
                line["behind_best"] = behind[each.name].plain()
            contenders.append(line)
        return {
            "measure": self.measure, "rows": self.rows, "contenders": contenders,
            "worth_it": self.worth_it, "verdict": self.verdict(), "remarks": self.remarks,
            **({} if self.prices is None else {"currency": self.prices.currency}),
        }  # fmt: skip


def compare(
    rows: Sequence[Row],
    base: StoredModel,
    tuned: Sequence[StoredModel],
    train: Sequence[Row] = (),
    documents: Sequence[str] = (),
    graders: Mapping[str, Grader] | None = None,
    max_tokens: int = 64,
    prices: Prices | None = None,
    encoder: StoredModel | None = None,
    judge: Ruler | None = None,
    note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadToHead:
    """Let all answer ``rows``.

    Args:
        rows: that nothing was learned from. base: what is asked without training. tuned: models to
        compare with it. train: where examples are taken from, and what baselines learn. documents:
        texts that answers should be true to. graders: of replies, the first of which decides; of
        rows with labels replies are compared with
            them.
        max_tokens: of a reply at most.
        prices: of the machine, for what 1,000 answers cost.
        encoder: a model with embeddings, by which examples and passages are found, too.
        judge: by its preferences replies are compared with those of the base as it is then.
        note: hears what is done.
        on_progress: hears how many answers there are, and of how many.

    Raises:
        DataError: where a tenth of ``rows`` stand in ``train``.
        RecipeError: where there is nothing to compare.
    """
    from luthier.library.models import writes

    if not rows:
        raise RecipeError("there are no rows to compare on")
    names = [base.id, *(each.id for each in tuned)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"{twice} would be compared with itself; name each model once")
    if repeats := {*repeated_rows(rows)}:
        rows = [row for number, row in enumerate(rows) if number not in repeats]
    remarks = check_leakage(rows, train)
    if repeats:
        remarks.append(
            f"{len(repeats):,} rows repeat others word for word and were left out, as they would make "
            "chance look smaller"
        )
    labelled = len(of_shape(LabelledText, rows) or ()) == len(rows)
    base_writes = writes(base)
    if judge is not None and (labelled or not base_writes):
        raise RecipeError("a judge compares replies with those of the base: it is for rows of prompt "
                          "and reply, and a base that writes")  # fmt: skip
    writers = [each for each in tuned if writes(each)]
    readers = [each for each in tuned if not writes(each)]
    asked = [*writers, base] if base_writes else writers
    held, known = _questions(rows, train) if asked else ([], [])
    embed = None if encoder is None or not asked else Predictor.open(encoder).embed
    ways = ways_to_ask(held, known, documents, embed) if asked else []
    without_examples = [way for way in ways if not way.shows_training_rows]
    for what, named in (("the documents", documents), ("the graders", graders)):
        if named and not asked:
            remarks.append(f"{what} were not used: none of these models writes")
    if graders is None and labelled:
        # A base model that was not tuned writes labels with capitals and stops.
        graders = {"exact": Exact(ignore_case=True, ignore_punctuation=True)}
    elif graders is None:
        graders = default_graders(rows, note if asked else lambda text: None)
    written = len(writers) * len(without_examples) + base_writes * len(ways)
    replies = len(rows) * (written + 2 * bool(known))
    opened = open_graders(graders, replies, note) if asked else {}
    if judge is not None:  # in both orders
        judge = open_graders({"judge": judge}, 2 * replies, note)["judge"]
    total = len(rows) * (len(readers) + written)
    run = _Contest(opened, max_tokens, note, on_progress, total)
    if len(readers) + len(writers) + base_writes < 2 and not train:
        raise RecipeError(
            "there is nothing to compare: give a base model that writes, training rows for "
            "baselines, or several tuned models"
        )
    contenders: list[Contender] = []
    measures: dict[str, str] = {}
    for stored in readers:
        found, seconds, memory = run.read(stored, rows)
        measures[stored.id], score = next(iter(found.row_scores.items()))
        if not isinstance(score, RowScores) or not len(score) == len(found.rows) == len(rows):
            raise RecipeError(f"{stored.id} is not scored row by row on such rows")
        contenders.append(_contender(stored, "fine-tuning", score, found.scores, seconds, memory))
    if train and (labelled or not base_writes):
        fitted = run.baselines(base, rows, train, remarks)
        measures |= {each.name: next(iter(each.scores)) for each in fitted}
        contenders += fitted
    for each in [*writers, *([base] if base_writes else [])]:
        measures[each.id] = "accuracy" if labelled else next(iter(run.graders))
    _check_measures(measures)
    for stored in writers:
        contenders += run.write(stored, rows, held, without_examples, remarks, is_tuned=True)
    if base_writes:
        contenders += run.write(base, rows, held, ways, remarks)
    if known and not labelled:
        contenders.append(run.copy_nearest(rows, held, known))
        reply, count = Counter(each.answer for each in known).most_common(1)[0]
        if count > max(1, FREQUENT * len(known)):
            contenders.append(run.always(rows, reply))
    measure_name = next(iter(measures.values()))
    if judge is not None:
        measure_name, contenders = "win_rate", _judge(judge, rows, contenders, remarks)
    if len(contenders) < 2:
        raise RecipeError("; ".join(["nothing is left to compare", *remarks]))
    contenders.sort(key=lambda each: -as_gain(measure_name, each.score.value))
    best = contenders[0].score
    if asked and best.is_share and best.value <= NEARLY_NONE:
        remarks.append(
            f"nearly all replies score 0 by {measure_name}: read some of them, and choose another "
            "grader where they are right in other words"
        )
    return HeadToHead(measure_name, len(rows), contenders, remarks, prices)


def _check_measures(measures: Mapping[str, str]) -> None:
    """Refuse what is told by different ``measures``, such as labels beside embeddings of labels."""
    first, *others = measures.items()
    for name, other in others:
        if other != first[1]:
            raise RecipeError(
                f"{first[0]} is measured by {first[1].replace('_', ' ')} on such rows, and {name} by "
                f"{other.replace('_', ' ')}: compare each with models of its own kind"
            )


def _judge(
    judge: Ruler, rows: Sequence[Row], contenders: Sequence[Contender], remarks: list[str]
) -> list[Contender]:
    """How often the replies of each are preferred to those of the base as it is."""
    reference = next(each for each in contenders if each.technique == "as it is")

    def answers(contender: Contender) -> list[Answer]:
        pairs = zip(rows, contender.replies, strict=True)
        return [Answer.of(row, reply) for row, reply in pairs]

    found, same = [], list[bool]()
    for each in contenders:
        pairs = [*zip(answers(each), answers(reference), strict=True)]
        verdicts = judge_pairs(judge, pairs)
        score = RowScores.of([verdict.win for verdict in verdicts])
        found.append(replace(each, score=score, scores={"win_rate": score.value, **each.scores}))
        same += [each.is_consistent for each in verdicts if each.is_consistent is not None]
    remark = f"the win rate is against {reference.name}, each pair judged in both orders"
    if same:
        changed = 1 - sum(same) / len(same)
        remark += f"; the order changed {changed:.0%} of the verdicts, which count one half"
    remarks.append(remark)
    return found


def check_leakage(rows: Sequence[Row], train: Sequence[Row]) -> list[str]:
    """Remarks on rows that stand among the training rows.

    Raises:
        DataError: with each of them, where they are a tenth.
    """
    leaked = [rows[number] for number in match_questions(rows, train)]
    if leaked and len(leaked) >= TOO_MANY * len(rows):
        fix = "Compare on rows that are not among the training rows; `luthier split` keeps some apart."
        message = "the row asks what a training row asks, so what is measured on it is memory."
        raise DataError([Problem("leakage.input", message, fix, row.location) for row in leaked])
    if not leaked:
        return []
    return [f"{len(leaked):,} of {len(rows):,} rows ask what training rows ask, which flatters"]


def _questions(rows: Sequence[Row], train: Sequence[Row]) -> tuple[list[Question], list[Question]]:
    """Both as questions; classes are asked for by the names of all."""
    both = [*(of_shape(LabelledText, rows) or ()), *(of_shape(LabelledText, train) or ())]
    labels = sorted({row.label for row in both if isinstance(row.label, str)})
    return questions_of(rows, labels), questions_of(train, labels)


def _training_seconds(stored: StoredModel) -> float:
    return float((stored.manifest.metrics or {}).get("seconds", 0.0))


def _contender(
    stored: StoredModel, technique: Technique, score: RowScores, scores: Mapping[str, float],
    seconds: float, memory: int, name: str = "", prompt_tokens: float | None = None,
) -> Contender:  # fmt: skip
    folders = {stored.network_folder, stored.folder}
    size = sum(folder_size(folder, ".safetensors") for folder in folders)
    trained = _training_seconds(stored) if technique.startswith("fine-tuning") else 0.0
    return Contender(
        f"{stored.id} {name}".strip(), technique, score, dict(scores), seconds, prompt_tokens, size,
        memory, trained,
    )  # fmt: skip


class _Contest:
    """What stays the same while one contender after the other answers."""

    def __init__(
        self,
        graders: Mapping[str, Grader],
        max_tokens: int,
        note: Callable[[str], None],
        on_progress: Callable[[int, int], None],
        total: int,
    ) -> None:
        """``total`` answers are expected of all."""
        self.graders, self.max_tokens, self.note = graders, max_tokens, note
        self.on_progress, self.total = on_progress, total
        self.finished = 0

    def _done(self, count: int) -> None:
        self.on_progress(self.finished + count, self.total)

    def read(self, stored: StoredModel, rows: Sequence[Row]) -> tuple[Evaluation, float, int]:
        """The labels, ratings or tags of a model that reads, the seconds of each, and the
        memory."""
        resting = begin_peak_memory()
        predictor = Predictor.open(stored)
        began = time.perf_counter()
        found = score_predictions(predictor, rows, self._done)
        self.finished += len(rows)
        return found, (time.perf_counter() - began) / len(rows), peak_memory() - resting

    def write(
        self,
        stored: StoredModel,
        rows: Sequence[Row],
        questions: Sequence[Question],
        ways: Sequence[Way],
        remarks: list[str],
        *,
        is_tuned: bool = False,
    ) -> list[Contender]:
        """Measure a model that writes, asked in several ways."""
        from luthier.inference.generation import Generator

        resting = begin_peak_memory()
        generator = Generator.open(stored)
        found = []
        for way in ways:
            name = "" if way.technique == "as it is" else f"with {way.name}"
            asked = rows_of_way(rows, questions, way, generator.chat)
            prompts = _prompts(asked)
            sampling = Sampling(max_tokens=self.max_tokens)
            long = sum(generator.refusal(prompt, sampling) is not None for prompt in prompts)
            if long:
                name = f"{stored.id} {name}".strip()
                remarks.append(
                    f"{name} was left out: {long:,} questions do not fit into its context"
                )
                self.finished += len(rows)
                continue
            tokens = sum(generator.prompt_tokens(prompt) for prompt in prompts) / len(prompts)
            begin_peak_memory()
            graded = grade_replies(generator, asked, self.graders, self.max_tokens, self._done)
            seconds = graded.reply_seconds / len(rows)
            self.finished += len(rows)
            technique: Technique = way.technique
            if is_tuned:
                technique = "fine-tuning" if way.technique == "as it is" else "fine-tuning and RAG"
            score = _deciding(graded)
            memory = peak_memory() - resting
            contender = _contender(
                stored, technique, score, graded.scores, seconds, memory, name, tokens
            )
            contender = replace(contender, replies=[each["reply"] for each in graded.records])
            found.append(contender)
        return found

    def copy_nearest(
        self, rows: Sequence[Row], questions: Sequence[Question], known: Sequence[Question]
    ) -> Contender:
        """What the nearest training question has for an answer, word for word."""
        began = time.perf_counter()
        replies = [nearest.answer for (nearest,) in nearest_examples(questions, known, 1)]
        seconds = (time.perf_counter() - began) / len(rows)
        return self._simple("the nearest row by words", rows, replies, seconds)

    def always(self, rows: Sequence[Row], reply: str) -> Contender:
        """The same reply to all: what a model that learned nothing else is worth."""
        return self._simple("always the most frequent reply", rows, [reply] * len(rows), 0.0)

    def _simple(
        self, name: str, rows: Sequence[Row], replies: Sequence[str], seconds: float
    ) -> Contender:
        """Replies that no model wrote; ``seconds`` for one."""
        graded = grade(rows, replies, self.graders)
        return Contender(
            name, "simple baselines", _deciding(graded), graded.scores, seconds, replies=replies
        )

    def baselines(
        self,
        base: StoredModel,
        rows: Sequence[Row],
        train: Sequence[Row],
        remarks: list[str],
    ) -> list[Contender]:
        """What simple methods make of the training rows, some of them by the base model's
        states."""
        self.note("Fitting simple baselines")
        fitted = self._fit_baselines(base, rows, train, remarks)
        if fitted is None:
            return []
        compared = fitted.comparison
        remarks += [
            f"{name} was left out: there was no time for it, or no room for what the base makes of so "
            "many rows"
            for name in compared.left_out
        ]
        answers = compared.rows + compared.train_rows
        return [
            Contender(each.name, "simple baselines", score, each.scores, each.seconds / answers)
            for each, score in zip(compared.baselines, fitted.row_scores, strict=True)
        ]

    def _fit_baselines(
        self, base: StoredModel, rows: Sequence[Row], train: Sequence[Row], remarks: list[str]
    ) -> FittedBaselines | None:
        from luthier.engine.comparison import encode_cut, fit_baselines
        from luthier.engine.machine import open_network
        from luthier.library.models import chat_format, room_of
        from luthier.objectives import Contrastive, TokenClassification

        tagged = of_shape(TaggedWords, rows)  # of which each word has a state of its own
        encoder = TokenClassification() if tagged else Contrastive()
        network = open_network(base, Contrastive().head())
        chat, room = chat_format(base), room_of(base)

        def encode(some: Sequence[Row]) -> list[Example]:
            return encode_cut(encoder, [row.bare() for row in some], chat, room)

        known = ComparedRows.of(train, encode(train), SEED)
        asked = ComparedRows(rows, encode(rows))
        cut = sum(not is_comparable(*each) for each in zip(rows, asked.examples, strict=True))
        if tagged and cut:  # words without a state
            remarks.append(
                f"{cut:,} rows are longer than the context of {base.id}: no baseline reads them with it"
            )
            return fit_and_score(known.rows, rows, None, time.monotonic() + BASELINE_SECONDS)
        return fit_baselines(network, encoder, known, asked, READING_BUDGET, BASELINE_SECONDS)


def _deciding(graded: Evaluation) -> RowScores:
    """The scores by the first grader."""
    score = next(iter(graded.row_scores.values()))
    assert isinstance(score, RowScores)
    return score


def _prompts(rows: Sequence[Row]) -> list[Chat]:
    from luthier.inference.inference import Chat

    return [Chat(tuple(row.prompt_turns()), row.tools) for row in rows]
