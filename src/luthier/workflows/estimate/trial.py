"""Measurement of a few real steps of a job on a temporary copy.

The measurement uses the code that trains (:class:`luthier.engine.train.Trainer`) with fewer rows.
Reading, checking, loading, precomputing, steps on representative batches, a validation measurement,
a checkpoint and storing are timed. All files are removed at the end.
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
"""Maximum steps with built token trees; steps of a longer run are sampled evenly."""


@dataclass(frozen=True)
class StepSize:
    """Computed size of a step: distinct tokens, tokens of the largest micro-batch, and rounded
    sizes."""

    tokens: int
    largest: int
    sizes: frozenset[int]
    """Padded sizes of the micro-batches. Matrix kernels are created for each size."""


@dataclass(frozen=True)
class Workload:
    """Tokens of a whole run."""

    steps: int
    tokens: int
    """Maximum tokens of the rows of all steps; shared prefixes count in each row."""
    learned: int
    """Tokens with loss."""
    validation_tokens: int
    """Tokens of a validation measurement."""
    row_tokens: int
    """Tokens of all training and validation rows, each row once."""


def order_of(job: TrainingJob) -> RowOrder:
    """Return the order of rows in a run."""
    training, data = job.recipe.training, job.data
    return RowOrder(
        data.main, training.batch_size or 1, training.seed, training.shuffle, data.mixed
    )


def workload_of(job: TrainingJob) -> Workload:
    """Count the tokens of ``job`` before any rows are precomputed."""
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
    """Return the rows of ``count`` representative batches of the first pass.

    The batches are at evenly spaced quantiles of the tokens. The largest batch is included, because
    the largest batch decides the peak of memory. The middle batch is first, because the first step
    is slower. Only batches that the run reaches are included.
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
    """Return the size of a step on ``rows``; ``shares`` means that prefixes are computed once."""
    budget = job.recipe.training.micro_batch_tokens or 1
    seen = _largest(job, rows)
    sizes = [
        len(build_tree(part, shares)) if shares else sum(row.tokens for row in part)
        for part in (split_to_budget(seen, budget, shares) if seen else [])
    ]
    rounded = frozenset(-(-size // SIZE_STEP) for size in sizes)
    return StepSize(sum(sizes), max(sizes, default=0), rounded)


def _largest(job: TrainingJob, rows: Sequence[Example]) -> list[Example]:
    """Return all examples that the rows may become in a step."""
    objective = job.data.objective
    return with_completions(objective, objective.views(rows, "fixed") or rows)


def _tokens(job: TrainingJob, rows: Sequence[Example]) -> int:
    return sum(row.tokens for row in _largest(job, rows)) if rows else 0


def _learned_tokens(job: TrainingJob, row: Example) -> int:
    return sum(int(np.count_nonzero(view.weight_T)) for view in job.data.objective.views([row]))


BATCHES = 5
"""Number of tried batches. Each batch runs twice, because the first run creates matrix kernels."""
LEAST_STEPS = 3
PATIENCE = 60.0
"""Seconds after which no step starts, beyond the minimum number of steps."""
HELD_ROWS = 3 * PARITY_ROWS
"""Validation rows of a measurement."""


@dataclass(frozen=True)
class TimedStep:
    """A measured step."""

    batch: int
    seconds: float
    first: bool
    """True for the first step on the batch."""


@dataclass(frozen=True)
class TrialRun:
    """Measurements of the trial, in seconds and bytes."""

    batches: list[StepSize]
    """Sizes of the tried batches."""
    tries: list[TimedStep]
    row_tokens: int
    """Tokens of the tried training and validation rows, each row once."""
    held_tokens: int
    """Tokens of the tried validation rows."""
    held_seconds: float
    """Seconds of a validation measurement."""
    token_share: float
    """Actual tokens of the steps as a share of the maximum tokens."""
    peak_memory: int
    kept_memory: int
    """Bytes of precomputed states in memory, for the tried rows."""
    kept_disk: int
    checkpoint_bytes: int
    model_bytes: int
    run_bytes: int
    """Bytes of further files of the run: curves, metrics, the request."""


@dataclass(frozen=True)
class Measurement:
    """A job, its workload, and the measurements of a trial."""

    job: TrainingJob
    key: str
    """Key of the request; see :func:`luthier.engine.timings.request_key`."""
    machine: str
    work: Workload
    steps: list[StepSize]
    """Sizes of evenly spaced steps of the whole run."""
    trial: TrialRun
    seconds: dict[str, float]
    """Seconds of the parts of the trial, by name in ``luthier.engine.timings.PARTS``."""
    calibration: float
    """Time of calibration with all rows, relative to the trial."""


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
    """Run ``count`` batches and the further parts of a run, in the order of a run."""
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
    """Run all batches twice, one pass after the other, until the time limit."""
    reporter.stage(f"Trying {batches} batches, each twice")
    started, tries, total = time.monotonic(), list[TimedStep](), 2 * batches
    for step in range(total):
        tries.append(TimedStep(step % batches, loop.step(), step < batches))
        late = time.monotonic() - started > PATIENCE and len(tries) >= LEAST_STEPS
        reporter.progress(total if late else step + 1, total, "steps tried")
        if late:
            break
    return tries
