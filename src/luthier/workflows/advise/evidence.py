"""Small real tries of what competes with fine-tuning, and of fine-tuning itself, on held-out rows.

All are asked the same questions. Models that write are asked as they are, with examples, with the
nearest examples, and with passages of documents where there are some; models that read are held
against the simple baselines that every run is compared with. Then the job itself is trained for
a few steps on a copy that is thrown away, and asked again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.shapes.base import Labelled
from luthier.data.tree import READING_BUDGET
from luthier.errors import LuthierError
from luthier.evaluation.significance import RowScores
from luthier.files import TEMPORARY
from luthier.objectives.base import predicts
from luthier.types import Row
from luthier.workflows.prompting import (
    Prompted,
    Prompting,
    Question,
    Technique,
    questions_of,
    ways_to_ask,
)

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.loop import Loop
    from luthier.engine.metrics import Reporter
    from luthier.models.network import Network
    from luthier.recipe import Recipe

HELD = 40
"""Rows that are asked; the standard error of a share of 50 % among them is 8 points."""
HELD_LABELS = 400
"""The same for models that read labels, which takes far less; 2.5 points."""
LEAST_FITTING = 0.5
"""Share of the questions that must fit into the context for a technique to be tried."""
BASELINE_SECONDS = 60.0
"""For all simple baselines of models that read."""
SEED = 0


@dataclass(frozen=True)
class TechniqueResult:
    """One way, measured."""

    technique: Technique
    name: str
    loss: float | None
    """Nats for each token of the right answers, for models that write."""
    score: float | None
    """Share of right answers, where they are short enough to compare, or labels."""
    prompt_tokens: float
    """Tokens read for one answer."""
    seconds: float
    """For one answer, in a batch, on this machine."""
    constant: bool = False
    """Whether it answers every row alike: something to compare with, and no way to answer."""
    row_scores: RowScores | None = None
    """What :attr:`score` is the share of, row by row."""

    @property
    def result(self) -> str:
        """Score and loss, as people read them."""
        parts = [] if self.score is None else [f"{self.score:.0%} right"]
        parts += [] if self.loss is None else [f"a loss of {self.loss:.2f}"]
        return ", ".join(parts)

    def describe(self) -> str:
        """The same with its name and what it reads."""
        read = f"{self.prompt_tokens:,.0f} tokens read for an answer"
        return f"{self.name}: {self.result}; {read}"

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON, without the rows."""
        found = asdict(self)
        del found["row_scores"]
        return found


@dataclass(frozen=True)
class Evidence:
    """All that was tried, on ``held`` rows."""

    held: int
    tried: list[TechniqueResult]
    steps: int = 0
    """Optimizer steps of the trial of fine-tuning, of ``all_steps``."""
    all_steps: int = 0
    left_out: tuple[str, ...] = ()
    """What could not be tried, with the reason."""

    def of(self, *techniques: Technique) -> list[TechniqueResult]:
        """What was tried of some techniques."""
        return [each for each in self.tried if each.technique in techniques]

    def best(self, *techniques: Technique) -> TechniqueResult | None:
        """The best of some techniques: by right answers where all have them, else by loss."""
        found = [each for each in self.of(*techniques) if not each.constant]
        scored = [each for each in found if each.score is not None]
        if scored:
            return max(scored, key=lambda each: (each.score or 0.0, -(each.loss or 0.0)))
        return min(found, key=lambda each: each.loss or 0.0, default=None)

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "held_rows": self.held,
            "tried": [each.plain() for each in self.tried],
            "trial_steps": self.steps,
            "all_steps": self.all_steps,
            "left_out": list(self.left_out),
        }


def gather(
    recipe: Recipe,
    train: Sequence[Row],
    held: Sequence[Row],
    documents: Sequence[str],
    seconds: float,
    reporter: Reporter,
) -> Evidence:
    """Try everything on ``held``; the trial of fine-tuning ``recipe`` takes about ``seconds``.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train` does for the recipe.
    """
    from luthier.engine.job import prepare_job
    from luthier.engine.machine import choose_machine
    from luthier.engine.runs import Run
    from luthier.engine.timings import Clock
    from luthier.engine.train import Trainer
    from luthier.files import luthier_home
    from luthier.library import models as store

    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    base = store.find(recipe.base, reporter.stage)
    job = prepare_job(recipe, base, machine, reporter)
    home = luthier_home() / "advice"
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=home))
    try:
        run = Run(base.root, "advice", rehearsal=folder)
        network, loop = Trainer(job, run, reporter, Clock()).start(resume=False)
        reads = predicts(job.data.objective)
        ways: _Labels | _Answers = (
            _Labels(network, job, train, held)
            if reads
            else _Answers(network, job, train, held, documents)
        )
        reporter.stage(f"Asking {len(held)} held-out rows without training")
        tried = ways.measure_untrained(reporter.note)
        steps = _steps(loop, job.steps, seconds, reporter)
        if steps:
            reporter.stage("Asking them again")
            tried.append(ways.measure_trained(f"after {steps} steps"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Evidence(len(ways.held), tried, steps, job.steps, tuple(ways.left_out))


def _steps(loop: Loop, most: int, seconds: float, reporter: Reporter) -> int:
    """Train for about ``seconds``; how many steps that were."""
    if seconds <= 0:
        return 0
    began, done = time.monotonic(), 0
    reporter.stage(f"Training for about {seconds:.0f} s")
    while done < most:
        loop.step()
        done += 1
        spent = time.monotonic() - began
        if spent + spent / done > seconds:
            break
        reporter.progress(done, min(most, max(done, round(seconds / (spent / done)))), "steps")
    return done


class _Answers:
    """A model that writes."""

    def __init__(
        self,
        network: Network,
        job: TrainingJob,
        train: Sequence[Row],
        held: Sequence[Row],
        documents: Sequence[str],
    ) -> None:
        labels = sorted(
            {row.label for row in train if isinstance(row, Labelled) and isinstance(row.label, str)}
        )
        self.train = questions_of(train, labels)
        self.held = questions_of(held, labels)
        self.documents = documents
        self.asking = Prompting(network, job.chat, _context(job))
        self.left_out: list[str] = []

    def measure_untrained(self, note: Callable[[str], None]) -> list[TechniqueResult]:
        """As it is, with examples, with the nearest ones, with documents."""
        ways = ways_to_ask(self.held, self.train, self.documents)
        # All are asked the same rows: a technique that leaves out the long ones would look best.
        rows = able = self.asking.fitting(self.held, ways[0].context)
        tried = []
        for way in ways:
            places = set(self.asking.fitting(self.held, way.context))
            common = [place for place in rows if place in places]
            if not common or len(common) < LEAST_FITTING * len(able):
                self.left_out.append(
                    f"{way.name}: only {len(places)} of {len(self.held)} questions fit into the "
                    "context with them"
                )
            else:
                rows = common
                tried.append(way)
        if len(rows) < len(self.held):
            note(
                f"{len(rows)} of the {len(self.held)} questions are asked, which fit into the context "
                "with all that is tried"
            )
        self.held = [self.held[place] for place in rows]
        found = []
        for way in tried:
            context = [way.context[place] for place in rows]
            prompted = self.asking.measure(way.name, self.held, context)
            found.append(_attempt_of(way.technique, prompted))
            note(found[-1].describe())
        return found

    def measure_trained(self, name: str) -> TechniqueResult:
        """Asked as it is, once trained."""
        if not self.held:
            raise LuthierError("no held-out row fits into the model's context")
        nothing: list[list[Question]] = [[] for _ in self.held]
        return _attempt_of("fine-tuning", self.asking.measure(name, self.held, nothing))


class _Labels:
    """A model that reads labels; before it is trained its head says nothing."""

    def __init__(
        self, network: Network, job: TrainingJob, train: Sequence[Row], held: Sequence[Row]
    ) -> None:
        self.network, self.job, self.train, self.held = network, job, train, held
        self.left_out: list[str] = []

    def measure_untrained(self, note: Callable[[str], None]) -> list[TechniqueResult]:
        """The baselines that go with such rows; their seconds are for each row that was read."""
        from luthier.engine.comparison import encode_cut, fit_baselines
        from luthier.evaluation.baselines import ComparedRows

        objective, context = self.job.data.objective, _context(self.job)
        # A label that no training row has is a wrong answer here, not a refusal.
        asked = [row.bare() for row in self.held]
        held = ComparedRows(self.held, encode_cut(objective, asked, self.job.chat, context))
        train = self.job.data.compared[0]
        fitted = fit_baselines(
            self.network, objective, train, held, READING_BUDGET, BASELINE_SECONDS
        )
        if fitted is None:
            self.left_out.append("simple baselines: there are none for such rows")
            return []
        compared = fitted.comparison
        self.left_out += [f"{name}: there was no time for it" for name in compared.left_out]
        found = []
        for each, rows in zip(compared.baselines, fitted.row_scores, strict=True):
            technique: Technique = "as it is" if each.constant else "simple baselines"
            seconds = each.seconds / (compared.train_rows + compared.rows)
            result = TechniqueResult(
                technique, each.name, None, each.score, self._tokens, seconds, each.constant, rows
            )
            found.append(result)
            note(result.describe())
        return found

    @property
    def _tokens(self) -> float:
        """Tokens of a row, roughly."""
        return sum(len(row.plain_text()) for row in self.held) / 4 / len(self.held)

    def measure_trained(self, name: str) -> TechniqueResult:
        """The head's own labels."""
        from luthier.inference.prediction import Predictor
        from luthier.workflows.score_predictions import score_predictions

        objective = self.job.data.objective
        predictor = Predictor(self.network, objective, self.job.chat, _context(self.job))
        began = time.perf_counter()
        scored = score_predictions(predictor, self.held)
        rows = next(iter(scored.row_scores.values()))
        assert isinstance(rows, RowScores)
        seconds = (time.perf_counter() - began) / len(self.held)
        return TechniqueResult(
            "fine-tuning", name, None, rows.value, self._tokens, seconds, row_scores=rows
        )


def _context(job: TrainingJob) -> int:
    """Tokens that a question may have with its answer."""
    from luthier.library.models import room_of

    return room_of(job.base, job.recipe.adaptation)


def _attempt_of(technique: Technique, found: Prompted) -> TechniqueResult:
    score = None if found.exact is None else found.exact.value
    return TechniqueResult(
        technique, found.name, found.loss, score, found.prompt_tokens, found.seconds,
        row_scores=found.exact,
    )  # fmt: skip
