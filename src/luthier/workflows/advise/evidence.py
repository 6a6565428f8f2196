"""Measurements for advice: contenders on held-out rows, before and after a trial training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.rows import load_rows
from luthier.data.splitting import split_rows, strata_of
from luthier.errors import DataError, LuthierError
from luthier.gate.row_keys import group_related
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.inference.prediction import Predictor
from luthier.models.decoding.sampling import Sampling
from luthier.objectives.base import predicts
from luthier.types import Row
from luthier.workflows.contenders import Contender, Contest, first_score, graders_for
from luthier.workflows.estimate.trial import trial_training
from luthier.workflows.latency import measure_latency
from luthier.workflows.prompting import (
    prompt_variants,
    questions_with_labels,
    rows_of_variant,
)
from luthier.workflows.score_predictions import score_predictions

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.loop import Loop
    from luthier.engine.metrics import Reporter
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
SEED = 0
ROOM = 16
"""Tokens of a reply beyond the longest expected reply."""

Measure = Callable[[str], Contender]
"""Measures the trained model, given its name."""


@dataclass(frozen=True)
class Evidence:
    """All measurements on ``held`` rows."""

    held: int
    tried: list[Contender]
    steps: int = 0
    """Optimizer steps of the trial training, of ``all_steps``."""
    all_steps: int = 0
    left_out: tuple[str, ...] = ()
    """Techniques without a measurement, with the reason."""

    def best(self, *techniques: str) -> Contender | None:
        """Return the best result of some techniques."""
        results = [
            each for each in self.tried if each.technique in techniques and not each.constant
        ]
        return max(results, key=lambda each: each.score.value, default=None)

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        names = ("technique", "name", "prompt_tokens", "seconds")
        tried = [
            {"score": each.score.value, **{name: getattr(each, name) for name in names}}
            for each in self.tried
        ]
        values = {"held_rows": self.held, "tried": tried, "trial_steps": self.steps}
        return values | {"all_steps": self.all_steps, "left_out": list(self.left_out)}


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
            job, network, loop = trial
            lines = job.data.held_out.get("validation", {})
            train, held = divide_rows(job.recipe.data, rows, lines, count)
            if min(len(held), len(train)) < MIN_ROWS:
                reporter.note(
                    f"no technique measured: fewer than {MIN_ROWS} rows to train or hold out"
                )
                return None
            reporter.stage(f"Measuring {len(held)} held-out rows without training")
            contest = Contest({}, note=reporter.note)
            if predicts(job.data.objective):
                tried = contest.baselines(job.base, held, train, {job.base.root})
                measure: Measure = partial(_predict, network, job, held)
            else:
                tried, measure = _write(contest, network, job, train, held, documents)
            steps = _train(loop, job.steps, seconds, reporter)
            if steps:
                reporter.stage("Measuring the trained model")
                tried.append(measure(f"the model after step {steps}"))
            measured = len(tried[0].score) if tried else len(held)
            return Evidence(measured, tried, steps, job.steps, tuple(contest.remarks))
    except DataError as error:  # such as fewer rows than a run needs
        reporter.note(f"no technique measured: {error}")
        return None


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


def _write(
    contest: Contest,
    network: Network,
    job: TrainingJob,
    train: Sequence[Row],
    held: Sequence[Row],
    documents: Sequence[str],
) -> tuple[list[Contender], Measure]:
    """Measure replies of the untrained model on the same rows, in all variants that fit."""
    questions, examples = questions_with_labels(held, train)
    variants = prompt_variants(questions, examples, documents)
    contest.graders = graders_for(held, contest.note)
    # Without a limit, an untrained model writes until the context is full.
    longest = max(len(job.chat.tokenizer.encode(each.answer)) for each in questions)
    contest.max_tokens = longest + ROOM
    generator = Generator(network, job.chat)
    order = list(range(len(held)))
    for variant in variants:
        prompts = rows_of_variant(held, questions, variant, job.chat)
        chats = [Chat(tuple(row.prompt_turns()), row.tools) for row in prompts]
        sampling = Sampling(max_tokens=contest.max_tokens)
        fit = [n for n in order if generator.refusal(chats[n], sampling) is None]
        # With fewer common rows, all other results would be less certain.
        if variant is variants[0] or len(fit) >= MIN_FITTING * len(held):
            order = fit
    if not order:
        raise LuthierError("No held-out row fits into the model's context. Shorten the rows.")
    if len(order) < len(held):
        contest.note(f"{len(order)} of {len(held)} questions fit into the context")
    held, questions = [held[n] for n in order], [questions[n] for n in order]
    variants = [replace(each, context=[each.context[n] for n in order]) for each in variants]
    tried = contest.write(generator, "the base model", held, questions, variants)
    generator.backend.close()

    def measure(name: str) -> Contender:
        trained = Generator(network, job.chat)
        (contender,) = contest.write(trained, name, held, questions, variants[:1], is_tuned=True)
        trained.backend.close()
        return contender

    return tried, measure


def _predict(network: Network, job: TrainingJob, held: Sequence[Row], name: str) -> Contender:
    """Measure a trained head."""
    context = job.base.room - job.recipe.adaptation.added_tokens
    predictor = Predictor(network, job.data.objective, job.chat, context)
    found = score_predictions(predictor, held)
    seconds = measure_latency({name: lambda: predictor.answers(held)})[name] / len(held)
    return Contender(name, "fine-tuning", first_score(found), found.scores, seconds)
