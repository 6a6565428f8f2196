"""A few real steps of a real job, on a copy that is thrown away, and which steps stand for all.

Everything goes through the code that trains (:class:`luthier.engine.train.Trainer`): the rows are
read and checked, the model is loaded, what is computed ahead is computed for the rows that are
tried, steps run on batches that stand for the run, a measurement, a checkpoint and the storing are
done and timed. Only the rows are fewer. What is left in the store is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from luthier.data.loader import RowOrder
from luthier.data.tree import build_tree, split_to_budget
from luthier.engine.job import TrainingJob, prepare_job, with_base
from luthier.engine.loop import Loop
from luthier.engine.machine import (
    TRAINING_KERNELS,
    choose_machine,
    forget_peak_memory,
    keep_freed_memory,
    limit_kernels,
    machine_name,
    peak_memory,
)
from luthier.engine.metrics import Reporter
from luthier.engine.model_writer import PARITY_ROWS
from luthier.engine.runs import PRECOMPUTED
from luthier.engine.steps import select_steps
from luthier.engine.timings import Clock, request_key
from luthier.engine.train import Trainer
from luthier.files import folder_size
from luthier.library import models as store
from luthier.models.layouts import SIZE_STEP
from luthier.objectives.base import with_completions
from luthier.recipe import Recipe
from luthier.types import Example
from luthier.workflows.trial_training import temporary_run

LOOKED_AT = 200
"""Steps whose token trees are built to know the whole run; a longer run is sampled evenly."""


@dataclass(frozen=True)
class StepSize:
    """What one step computes: distinct tokens, those of its largest micro-batch, and their
    sizes."""

    tokens: int
    largest: int
    sizes: frozenset[int]
    """Sizes of the micro-batches as they are computed. Matrix kernels are made for one size
    each."""


@dataclass(frozen=True)
class Workload:
    """Tokens of a whole run."""

    steps: int
    tokens: int
    """Of the rows of all steps at most, shared prefixes counted in each."""
    learned: int
    """Those among them that carry loss."""
    validation_tokens: int
    """Of one measurement."""
    row_tokens: int
    """Of all training and validation rows, each once."""


def order_of(job: TrainingJob) -> RowOrder:
    """The order in which a run takes its rows."""
    training, data = job.recipe.training, job.data
    return RowOrder(
        data.main, training.batch_size or 1, training.seed, training.shuffle, data.mixed
    )


def workload_of(job: TrainingJob) -> Workload:
    """Count the tokens of ``job``, none of whose rows have been touched yet."""
    order, rows = order_of(job), job.data.train
    tokens_R = np.array([_tokens(job, [row]) for row in rows])
    learned_R = np.array([_learned_tokens(job, row) for row in rows])
    tokens = learned = 0
    for step in range(job.steps):
        batch = order.batch(step)
        tokens += int(tokens_R[batch].sum())
        learned += int(learned_R[batch].sum())
    held = _tokens(job, job.data.validation)
    return Workload(job.steps, tokens, learned, held, held + int(tokens_R.sum()))


def spread_steps(job: TrainingJob) -> list[int]:
    """Numbers of steps, spread evenly over the run."""
    count = min(job.steps, LOOKED_AT)
    return sorted({int(place * job.steps / count) for place in range(count)})


def representative(job: TrainingJob, count: int) -> list[list[int]]:
    """Rows of ``count`` whole batches of the run's first pass that stand for all.

    They lie at quantiles of the tokens, evenly apart, the largest of all among them: it decides the
    peak of memory. The middle one comes first, as the first step of all is slower. Batches that a
    short run does not come to are none of its own.
    """
    order, size = order_of(job), job.recipe.training.batch_size or 1
    batches = [order.batch(step) for step in range(min(job.steps, order.steps_per_epoch))]
    whole = [batch for batch in batches if len(batch) == size] or batches[:1]
    tokens_R = np.array([_tokens(job, [row]) for row in job.data.train])
    whole.sort(key=lambda batch: int(tokens_R[batch].sum()))
    count = min(count, len(whole))
    places = [round((place + 0.5) / count * len(whole) - 0.5) for place in range(count)]
    places[-1] = len(whole) - 1
    chosen = [whole[place] for place in dict.fromkeys(places)]
    middle = len(chosen) // 2
    return [chosen[middle], *chosen[:middle], *chosen[middle + 1 :]]


def step_of(job: TrainingJob, rows: Sequence[Example], shares: bool) -> StepSize:
    """What a step on ``rows`` computes; ``shares`` tells whether prefixes are computed once."""
    budget = job.recipe.training.micro_batch_tokens or 1
    seen = _largest(job, rows)
    sizes = [
        len(build_tree(part, shares)) if shares else sum(row.tokens for row in part)
        for part in (split_to_budget(seen, budget, shares) if seen else [])
    ]
    rounded = frozenset(-(-size // SIZE_STEP) for size in sizes)
    return StepSize(sum(sizes), max(sizes, default=0), rounded)


def _largest(job: TrainingJob, rows: Sequence[Example]) -> list[Example]:
    """All that the rows may become in a step."""
    objective = job.data.objective
    return with_completions(objective, objective.views(rows, "fixed") or rows)


def _tokens(job: TrainingJob, rows: Sequence[Example]) -> int:
    return sum(row.tokens for row in _largest(job, rows)) if rows else 0


def _learned_tokens(job: TrainingJob, row: Example) -> int:
    return sum(int(np.count_nonzero(view.weight_T)) for view in job.data.objective.views([row]))


BATCHES = 5
"""Batches that are tried, each twice: the first time the machine makes kernels for its sizes."""
LEAST_STEPS = 3
PATIENCE = 60.0
"""Seconds after which no further step is begun, once the least are done."""
HELD_ROWS = 3 * PARITY_ROWS
"""Validation rows that are measured on."""


@dataclass(frozen=True)
class TimedStep:
    """One step that was run."""

    batch: int
    seconds: float
    first: bool
    """Whether it was the first on this batch."""


@dataclass(frozen=True)
class TrialRun:
    """What the steps that were tried told. Seconds and bytes are those of the trial."""

    batches: list[StepSize]
    """What was run."""
    tries: list[TimedStep]
    row_tokens: int
    """Of the rows that were tried, validation rows among them, each once."""
    held_tokens: int
    """Of the validation rows among them."""
    held_seconds: float
    """One measurement on these."""
    token_share: float
    """Tokens that the steps really had, as a share of what they might have had."""
    peak_memory: int
    kept_memory: int
    """What was computed ahead for the tried rows and is held in memory."""
    kept_disk: int
    checkpoint_bytes: int
    model_bytes: int
    run_bytes: int
    """Of what else is left of the run: curves, metrics, the request."""


@dataclass(frozen=True)
class Measurement:
    """A job, what it is to compute, and what a trial of it told."""

    job: TrainingJob
    key: str
    """Of the request; see :func:`luthier.engine.timings.request_key`."""
    machine: str
    work: Workload
    steps: list[StepSize]
    """Of the whole run, evenly spread."""
    trial: TrialRun
    seconds: dict[str, float]
    """Of the parts of the trial, by their names in ``luthier.engine.timings.PARTS``."""
    calibration: float
    """How many times as long calibrating takes with all rows."""


def measure(recipe: Recipe, reporter: Reporter) -> Measurement:
    """Try the job of ``recipe``.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train` does, for the same reasons.
    """
    forget_peak_memory()
    keep_freed_memory()
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    recipe = with_base(recipe, reporter)
    base = store.find(recipe.base, reporter.stage)
    clock = Clock()
    with clock.part("data"):
        job = prepare_job(recipe, base, machine, reporter)
    work, batches = workload_of(job), representative(job, BATCHES)
    rows = [row for batch in batches for row in batch]
    with temporary_run(base.root, "estimates") as run:
        sampled = job.with_sample(rows, _validation_sample(job))
        trainer = Trainer(sampled, run, reporter, select_steps(sampled, trial=True), clock)
        loop = trainer.start(resume=False)
        shares = trainer.network.shares
        trial = _try(trainer, loop, len(batches))
    asked = trainer.calibration_rows
    begun = replace(job, data=replace(job.data, train=trainer.prepared_rows))
    order = order_of(begun)
    spread = [[begun.data.train[row] for row in order.batch(step)] for step in spread_steps(begun)]
    return Measurement(
        job=job,
        key=request_key(recipe.plain(), job.data.hashes, machine),
        machine=machine_name(machine.device),
        work=work,
        steps=[step_of(begun, batch, shares) for batch in spread],
        trial=trial,
        seconds=clock.parts,
        calibration=min(asked, len(job.data.train)) / max(1, min(asked, len(rows))),
    )


def _validation_sample(job: TrainingJob) -> list[int]:
    """Validation rows to measure on, evenly spread."""
    there = len(job.data.validation)
    count = min(there, HELD_ROWS)
    return [int(place * there / count) for place in range(count)]


def _try(trainer: Trainer, loop: Loop, count: int) -> TrialRun:
    """Run ``count`` batches and what belongs to a run, in the order a run does it."""
    job, folder, network = trainer.job, trainer.run_folder, trainer.network
    batches = [[job.data.train[row] for row in loop.order.batch(step)] for step in range(count)]
    steps = [step_of(job, batch, network.shares) for batch in batches]
    kept = network.bottom.bytes if network.bottom is not None else 0
    loop.evaluate()
    loop.reporter = Reporter()  # its lines and their time left are those of the whole run
    tries = _tries(loop, count, trainer.reporter)
    before = loop.clock.parts["validation"]
    loop.evaluate()
    held = loop.clock.parts["validation"] - before
    loop.checkpoint()
    sizes = folder_size(loop.checkpoints.folder), folder_size(folder.folder / PRECOMPUTED)
    trainer.progress, trainer.lines = loop.progress, loop.metrics.read()
    asked = workload_of(replace(job, steps=len(tries)))
    trainer.release()
    # The copy is thrown away: that it is stored and verified is nothing to tell.
    trainer.reporter = Reporter()
    trainer.store()
    model = folder_size(folder.model_folder)  # in the folder of the run, for a trial
    return TrialRun(
        batches=steps,
        tries=tries,
        row_tokens=asked.row_tokens,
        held_tokens=asked.validation_tokens,
        held_seconds=held,
        token_share=loop.progress.tokens / max(1, asked.tokens),
        peak_memory=peak_memory(),
        kept_memory=kept,
        kept_disk=sizes[1],
        checkpoint_bytes=sizes[0],
        model_bytes=model,
        run_bytes=folder_size(folder.folder) - model - sum(sizes),
    )


def _tries(loop: Loop, batches: int, reporter: Reporter) -> list[TimedStep]:
    """Each batch twice, one after the other, as long as there is time."""
    reporter.stage(f"Trying {batches} batches, each twice")
    started, tries, total = time.monotonic(), list[TimedStep](), 2 * batches
    for step in range(total):
        tries.append(TimedStep(step % batches, loop.step(), step < batches))
        late = time.monotonic() - started > PATIENCE and len(tries) >= LEAST_STEPS
        reporter.progress(total if late else step + 1, total, "steps tried")
        if late:
            break
    return tries
