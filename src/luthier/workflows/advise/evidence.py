"""Measurements for advice: fine-tuning and its rivals on held-out rows.

Generative models answer unchanged, with examples, and with passages
(:mod:`luthier.workflows.prompting`). Models that predict are compared with the simple baselines of
every run. The job then trains for a few steps on a temporary copy, and is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.rows import load_rows
from luthier.data.shapes.base import Labelled
from luthier.data.splitting import split_rows, strata_of
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, LuthierError
from luthier.evaluation.evaluate import default_graders
from luthier.evaluation.significance import RowScores
from luthier.gate.row_keys import group_related
from luthier.graders import Exact
from luthier.inference.inference import Chat
from luthier.models.decoding.sampling import Sampling
from luthier.objectives.base import predicts
from luthier.types import Row
from luthier.workflows.estimate.trial import trial_training
from luthier.workflows.evaluate import grade_replies
from luthier.workflows.latency import measure_latency
from luthier.workflows.prompting import (
    PromptVariant,
    Technique,
    prompt_variants,
    questions_of,
    rows_of_variant,
)

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.loop import Loop
    from luthier.engine.metrics import Reporter
    from luthier.inference.generation import Generator
    from luthier.models.networks.network import Network
    from luthier.recipe import DataSpec, Recipe

MAX_HELD_OUT_SHARE = 0.3
"""Maximum share of held-out rows."""
MIN_ROWS = 5
"""Minimum training rows and minimum held-out rows."""
HELD_OUT_ROWS = 40
"""Held-out rows for generative models: the standard error of 50 % is 8 points."""
HELD_OUT_LABELS = 400
"""Held-out rows for labels, which are fast: the standard error is 2.5 points."""
MIN_FITTING = 0.5
"""Minimum share of questions that fit into the context, or a technique is left out."""
BASELINE_SECONDS = 60.0
"""Time limit of all simple baselines."""
TIMED_REPLIES = 4
"""Prompts for the time of a reply, in one batch."""
SEED = 0
ROOM = 16
"""Tokens of a reply beyond the longest expected reply."""


@dataclass(frozen=True)
class TechniqueResult:
    """Measurement of a technique."""

    technique: Technique
    name: str
    score: float
    """Share of right answers, or ROUGE-L of long answers."""
    prompt_tokens: float
    """Mean input tokens per answer."""
    seconds: float
    """Seconds per answer on this machine, in a batch."""
    constant: bool = False
    """True for a baseline with the same answer for all rows, which is not a technique."""
    row_scores: RowScores | None = None
    """The score row by row."""

    @property
    def result(self) -> str:
        """The score as text."""
        return f"{self.score:.0%} right"

    def describe(self) -> str:
        """Return name, score and input size."""
        return f"{self.name}: {self.result}; {self.prompt_tokens:,.0f} tokens of input per answer"


@dataclass(frozen=True)
class Evidence:
    """All measurements on ``held`` rows."""

    held: int
    tried: list[TechniqueResult]
    steps: int = 0
    """Optimizer steps of the trial training, of ``all_steps``."""
    all_steps: int = 0
    left_out: tuple[str, ...] = ()
    """Techniques without a measurement, with the reason."""

    def best(self, *techniques: str) -> TechniqueResult | None:
        """Return the best result of some techniques."""
        results = [
            each for each in self.tried if each.technique in techniques and not each.constant
        ]
        return max(results, key=lambda each: each.score, default=None)

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "held_rows": self.held,
            "tried": [
                {name: value for name, value in vars(each).items() if name != "row_scores"}
                for each in self.tried
            ],
            "trial_steps": self.steps,
            "all_steps": self.all_steps,
            "left_out": list(self.left_out),
        }


def gather(
    recipe: Recipe,
    rows: Sequence[Row],
    documents: Sequence[str],
    seconds: float,
    reporter: Reporter,
) -> Evidence | None:
    """Measure all techniques on held-out rows; the trial training takes about ``seconds``.

    Held out are rows of the validation file, or else a part of ``rows``. ``None`` without enough
    rows.
    """
    count = HELD_OUT_LABELS if predicts(recipe.objective) else HELD_OUT_ROWS
    # A test part would leave fewer rows to train and to measure, and the trial model is not kept.
    update: dict[str, Any] = {"test_share": None}
    if not recipe.data.validation:
        update["validation_share"] = min(MAX_HELD_OUT_SHARE, count / len(rows))
    data = recipe.data.model_copy(update=update)
    try:
        with trial_training(recipe.model_copy(update={"data": data}), "advice", reporter) as trial:
            return _measure(*trial, rows, count, documents, seconds, reporter)
    except DataError as error:  # such as fewer rows than a run needs
        reporter.note(f"no technique measured: {error}")
        return None


def _measure(
    job: TrainingJob,
    network: Network,
    loop: Loop,
    rows: Sequence[Row],
    count: int,
    documents: Sequence[str],
    seconds: float,
    reporter: Reporter,
) -> Evidence | None:
    train, held = divide_rows(job.recipe.data, rows, job.data.held_out.get("validation", {}), count)
    if min(len(held), len(train)) < MIN_ROWS:
        reporter.note(f"no technique measured: fewer than {MIN_ROWS} training or held-out rows")
        return None
    variants: _Predictions | _Replies
    if predicts(job.data.objective):
        variants = _Predictions(network, job, held)
    else:
        variants = _Replies(network, job, train, held, documents)
    reporter.stage(f"Measuring {len(held)} held-out rows without training")
    tried = variants.measure_untrained(reporter.note)
    steps = _train(loop, job.steps, seconds, reporter)
    if steps:
        reporter.stage("Measuring the trained model")
        tried.append(variants.measure_trained(f"after {steps} steps"))
    return Evidence(len(variants.held), tried, steps, job.steps, tuple(variants.left_out))


def divide_rows(
    data: DataSpec, rows: Sequence[Row], lines: Mapping[str, Sequence[int]], count: int
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return training rows, and about ``count`` held-out rows of all labels.

    ``lines`` are the lines by file that the run holds out without a validation file.
    """
    if not data.validation:
        held_out = {(file, line) for file, numbers in lines.items() for line in numbers}
        mine = [row for row in rows if (row.file, row.line) in held_out]
        train = [row for row in rows if (row.file, row.line) not in held_out]
        # A group of near-duplicates stays together, so a share may hold out more rows.
        return train, mine[: 2 * count]
    held: Sequence[Row] = load_rows(data.validation, data.columns, accepts_own_keys=True)
    if len(held) > count:  # stratified, because files are often sorted by label
        each_N = np.arange(len(held))
        _, held_N = split_rows(strata_of(held), each_N, [count / len(held)], SEED)
        held = [held[i] for i in held_N]
    # Near-duplicates of held-out rows would be examples that contain the answers.
    group_N = group_related([*held, *rows])
    held_groups, groups = {*group_N[: len(held)].tolist()}, group_N[len(held) :].tolist()
    kept = [row for row, group in zip(rows, groups, strict=True) if group not in held_groups]
    return kept, held


def _train(loop: Loop, most: int, seconds: float, reporter: Reporter) -> int:
    """Train for about ``seconds`` and return the number of steps."""
    if seconds <= 0:
        return 0
    began, done, spent = time.monotonic(), 0, 0.0
    reporter.stage(f"Training for about {seconds:.0f} s")
    while done < most and spent + spent / max(1, done) <= seconds:
        loop.step()
        done, spent = done + 1, time.monotonic() - began
        reporter.progress(done, min(most, max(done, round(seconds / (spent / done)))), "steps")
    return done


class _Replies:
    def __init__(
        self,
        network: Network,
        job: TrainingJob,
        train: Sequence[Row],
        held: Sequence[Row],
        documents: Sequence[str],
    ) -> None:
        labels = {
            row.label for row in train if isinstance(row, Labelled) and isinstance(row.label, str)
        }
        self.network, self.chat, self.held = network, job.chat, list(held)
        self.questions = questions_of(held, sorted(labels))
        self.variants = prompt_variants(
            self.questions, questions_of(train, sorted(labels)), documents
        )
        self.left_out: list[str] = []
        # Without a limit, an untrained model writes until the context is full.
        longest = max(len(self.chat.tokenizer.encode(each.answer)) for each in self.questions)
        self.sampling = Sampling(max_tokens=longest + ROOM)

    def measure_untrained(self, note: Callable[[str], None]) -> list[TechniqueResult]:
        """Measure every variant on the same rows; long prompts would make a variant look better."""
        from luthier.inference.generation import Generator

        generator = Generator(self.network, self.chat)
        fits = [
            {
                number
                for number, prompt in enumerate(self._prompts(variant))
                if generator.refusal(prompt, self.sampling) is None
            }
            for variant in self.variants
        ]
        rows, kept = fits[0], list[PromptVariant]()
        for variant, fit in zip(self.variants, fits, strict=True):
            # Fewer common rows would make all other results less certain.
            if len(rows & fit) < max(1, MIN_FITTING * len(fits[0])):
                self.left_out.append(
                    f"{variant.name}: {len(fit)} of {len(self.held)} questions fit"
                )
            else:
                rows, kept = rows & fit, [*kept, variant]
        if len(rows) < len(self.held):
            note(f"{len(rows)} of {len(self.held)} questions fit into the context")
        order = sorted(rows)
        self.held = [self.held[number] for number in order]
        self.questions = [self.questions[number] for number in order]
        results = []
        for variant in kept:
            own = replace(variant, context=[variant.context[number] for number in order])
            results.append(self._measure(generator, own, variant.technique, variant.name))
            note(results[-1].describe())
        generator.backend.close()
        return results

    def measure_trained(self, name: str) -> TechniqueResult:
        """Measure the trained model without examples."""
        from luthier.inference.generation import Generator

        if not self.held:
            raise LuthierError("No held-out row fits into the model's context. Shorten the rows.")
        variant = PromptVariant("zero-shot", name, [()] * len(self.held))
        generator = Generator(self.network, self.chat)
        result = self._measure(generator, variant, "fine-tuning", name)
        generator.backend.close()
        return result

    def _prompts(self, variant: PromptVariant) -> list[Chat]:
        rows = rows_of_variant(self.held, self.questions, variant, self.chat)
        return [Chat(tuple(row.prompt_turns()), row.tools) for row in rows]

    def _measure(
        self, generator: Generator, variant: PromptVariant, technique: Technique, name: str
    ) -> TechniqueResult:
        rows = rows_of_variant(self.held, self.questions, variant, self.chat)
        tokens = sum(map(generator.prompt_tokens, self._prompts(variant))) / len(rows)
        # As `luthier compare` grades, so that advice and comparison agree.
        graders = default_graders(rows, lambda text: None)
        if isinstance(self.held[0], Labelled):  # untrained models write labels with capitals
            graders = {"exact": Exact(ignore_case=True, ignore_punctuation=True)}
        graded = grade_replies(generator, rows, graders, self.sampling.max_tokens or 1)
        score = next(iter(graded.row_scores.values()))
        assert isinstance(score, RowScores)
        # Replies of the measurement include loading of kernels.
        timed = self._prompts(variant)[:TIMED_REPLIES]
        spent = measure_latency({name: lambda: generator.answers(timed, self.sampling)})
        seconds = spent[name] / len(timed)
        return TechniqueResult(technique, name, score.value, tokens, seconds, row_scores=score)


class _Predictions:
    """Measurements of a model that predicts; the head is random before the training."""

    def __init__(self, network: Network, job: TrainingJob, held: Sequence[Row]) -> None:
        self.network, self.job, self.held = network, job, held
        self.left_out: list[str] = []
        self.tokens = sum(len(row.plain_text()) for row in held) / 4 / len(held)
        """Tokens of a row, estimated from the characters."""

    def measure_untrained(self, note: Callable[[str], None]) -> list[TechniqueResult]:
        """Measure the simple baselines, in seconds per row."""
        from luthier.engine.comparison import encode_cut, fit_baselines
        from luthier.evaluation.baselines import ComparedRows

        # Bare rows: a label without training rows counts as a wrong answer, not as an error.
        bare, chat = [row.bare() for row in self.held], self.job.chat
        examples = encode_cut(self.job.data.objective, bare, chat, self._context)
        held, train = ComparedRows(self.held, examples), self.job.data.compared[0]
        objective = self.job.data.objective
        fitted = fit_baselines(
            self.network, objective, objective.task, train, held, READING_BUDGET, BASELINE_SECONDS
        )
        if fitted is None:
            self.left_out.append("simple baselines: none for this kind of rows")
            return []
        compared = fitted.comparison
        self.left_out += [f"{name}: not enough time" for name in compared.left_out]
        results = []
        for each, rows in zip(compared.baselines, fitted.row_scores, strict=True):
            technique: Technique = "zero-shot" if each.constant else "simple baselines"
            seconds = each.seconds / (compared.train_rows + compared.rows)
            results.append(
                TechniqueResult(
                    technique, each.name, each.score, self.tokens, seconds, each.constant, rows
                )
            )
            note(results[-1].describe())
        return results

    def measure_trained(self, name: str) -> TechniqueResult:
        """Measure the trained head."""
        from luthier.inference.prediction import Predictor
        from luthier.workflows.score_predictions import score_predictions

        predictor = Predictor(self.network, self.job.data.objective, self.job.chat, self._context)
        rows = next(iter(score_predictions(predictor, self.held).row_scores.values()))
        assert isinstance(rows, RowScores)
        spent = measure_latency({name: lambda: predictor.answers(self.held)})
        seconds = spent[name] / len(self.held)
        return TechniqueResult(
            "fine-tuning", name, rows.value, self.tokens, seconds, row_scores=rows
        )

    @property
    def _context(self) -> int:

        return self.job.base.room - self.job.recipe.adaptation.added_tokens
