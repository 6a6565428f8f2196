"""Measurement of a few real steps of a job on a temporary copy.

The measurement uses the code that trains (:class:`luthier.engine.train.Trainer`) with fewer rows.
Reading, checking, loading, precomputing, steps on representative batches, a validation measurement,
a checkpoint and storing are timed. All files are removed at the end.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

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
from luthier.engine.runs import PRECOMPUTED, Run
from luthier.engine.steps import select_steps
from luthier.engine.timings import Clock, request_key
from luthier.engine.train import Trainer
from luthier.files import TEMPORARY, folder_size, luthier_home
from luthier.library import models as store
from luthier.models.networks.layouts import SIZE_STEP
from luthier.models.networks.network import Network
from luthier.objectives.base import with_longest_completions
from luthier.recipe import Recipe
from luthier.types import Example

SAMPLED_STEPS = 200
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
    validation_tokens = _tokens(job, job.data.validation)
    return Workload(
        job.steps, tokens, learned, validation_tokens, validation_tokens + int(tokens_R.sum())
    )


def spread_steps(job: TrainingJob) -> list[int]:
    """Numbers of steps, spread evenly over the run."""
    count = min(job.steps, SAMPLED_STEPS)
    return sorted({int(position * job.steps / count) for position in range(count)})


def representative(job: TrainingJob, count: int) -> list[list[int]]:
    """Return the rows of ``count`` representative batches of the first pass.

    The batches are at evenly spaced quantiles of the tokens. The largest batch is included, because
    the largest batch decides the peak of memory. The middle batch is first, because the first step
    is slower. Only batches that the run reaches are included.
    """
    order, size = order_of(job), job.recipe.training.batch_size or 1
    batches = [order.batch(step) for step in range(min(job.steps, order.steps_per_epoch))]
    # The last batch of a pass is smaller, and says little about the others.
    whole = [batch for batch in batches if len(batch) == size] or batches[:1]
    tokens_R = np.array([_tokens(job, [row]) for row in job.data.train])
    whole.sort(key=lambda batch: int(tokens_R[batch].sum()))
    count = min(count, len(whole))
    positions = [round((position + 0.5) / count * len(whole) - 0.5) for position in range(count)]
    positions[-1] = len(whole) - 1
    selected = [whole[position] for position in dict.fromkeys(positions)]
    middle = len(selected) // 2
    return [selected[middle], *selected[:middle], *selected[middle + 1 :]]


def step_of(job: TrainingJob, rows: Sequence[Example], shares: bool) -> StepSize:
    """Return the size of a step on ``rows``; ``shares`` means that prefixes are computed once."""
    budget = job.recipe.training.micro_batch_tokens or 1
    examples = _largest(job, rows)
    sizes = [
        len(build_tree(part, shares)) if shares else sum(row.tokens for row in part)
        for part in (split_to_budget(examples, budget, shares) if examples else [])
    ]
    rounded = frozenset(-(-size // SIZE_STEP) for size in sizes)
    return StepSize(sum(sizes), max(sizes, default=0), rounded)


def _largest(job: TrainingJob, rows: Sequence[Example]) -> list[Example]:
    """Return all examples that the rows may become in a step."""
    objective = job.data.objective
    return with_longest_completions(objective, objective.views(rows, "fixed") or rows)


def _tokens(job: TrainingJob, rows: Sequence[Example]) -> int:
    return sum(row.tokens for row in _largest(job, rows)) if rows else 0


def _learned_tokens(job: TrainingJob, row: Example) -> int:
    return sum(int(np.count_nonzero(view.weight_T)) for view in job.data.objective.views([row]))


TRIAL_BATCHES = 5
"""Number of tried batches. Each batch runs twice, because the first run creates matrix kernels."""
MIN_STEPS = 3
TRIAL_SECONDS = 60.0
"""Seconds after which no step starts, beyond the minimum number of steps."""
VALIDATION_ROWS = 3 * PARITY_ROWS
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
class MeasuredTrial:
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


@contextmanager
def temporary_run(root: str, kind: str) -> Iterator[Run]:
    """Yield a run of a base model below ``kind`` in the home folder, removed at the end."""
    home = luthier_home() / kind
    home.mkdir(parents=True, exist_ok=True)
    # In the home folder, because a checkpoint may not fit into the temporary file system, and its
    # speed is that of the run.
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=home))
    try:
        yield Run(root, kind, rehearsal=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def trial_training(
    recipe: Recipe, kind: str, reporter: Reporter
) -> Iterator[tuple[TrainingJob, Network, Loop]]:
    """Yield the job of ``recipe``, the network and the loop before the first step.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train`.
    """
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    recipe = with_base(recipe, reporter)
    job = prepare_job(recipe, store.find(recipe.base, reporter.stage), machine, reporter)
    with temporary_run(job.base.root, kind) as run:
        trainer = Trainer(job, run, reporter, select_steps(job, trial=True))
        loop = trainer.start(resume=False)
        yield job, trainer.network, loop


def measure(recipe: Recipe, reporter: Reporter) -> MeasuredTrial:
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
    work, batches = workload_of(job), representative(job, TRIAL_BATCHES)
    rows = [row for batch in batches for row in batch]
    with temporary_run(base.root, "estimates") as run:
        available = len(job.data.validation)
        count = min(available, VALIDATION_ROWS)
        validation = [int(number * available / count) for number in range(count)]
        sampled = job.with_sample(rows, validation)
        trainer = Trainer(sampled, run, reporter, select_steps(sampled, trial=True), clock)
        loop = trainer.start(resume=False)
        shares = trainer.network.shares
        trial = _try(trainer, loop, len(batches))
    calibration_rows = trainer.calibration_rows
    prepared = replace(job, data=replace(job.data, train=trainer.prepared_rows))
    order = order_of(prepared)
    spread = [
        [prepared.data.train[row] for row in order.batch(step)] for step in spread_steps(prepared)
    ]
    return MeasuredTrial(
        job=job,
        key=request_key(recipe.plain(), job.data.hashes, machine),
        machine=machine_name(machine.device),
        work=work,
        steps=[step_of(prepared, batch, shares) for batch in spread],
        trial=trial,
        seconds=clock.parts,
        calibration=min(calibration_rows, len(job.data.train))
        / max(1, min(calibration_rows, len(rows))),
    )


def _try(trainer: Trainer, loop: Loop, count: int) -> TrialRun:
    """Run ``count`` batches and the further parts of a run, in the order of a run."""
    job, folder, network = trainer.job, trainer.run_folder, trainer.network
    batches = [[job.data.train[row] for row in loop.order.batch(step)] for step in range(count)]
    steps = [step_of(job, batch, network.shares) for batch in batches]
    frozen_bytes = network.frozen_cache.bytes if network.frozen_cache is not None else 0
    loop.evaluate()
    loop.reporter = Reporter()  # silent: progress lines describe the whole run
    tries = _tries(loop, count, trainer.reporter)
    # The second measurement is timed: the first creates kernels for its sizes.
    before = loop.clock.parts["validation"]
    loop.evaluate()
    held_seconds = loop.clock.parts["validation"] - before
    loop.checkpoint()
    sizes = folder_size(loop.checkpoints.folder), folder_size(folder.folder / PRECOMPUTED)
    trainer.progress, trainer.lines = loop.progress, loop.metrics.read()
    sample_work = workload_of(replace(job, steps=len(tries)))
    trainer.release()
    # Silent, because the stored copy is temporary.
    trainer.reporter = Reporter()
    trainer.store()
    model = folder_size(folder.model_folder)  # in the folder of the run, for a trial
    return TrialRun(
        batches=steps,
        tries=tries,
        row_tokens=sample_work.row_tokens,
        held_tokens=sample_work.validation_tokens,
        held_seconds=held_seconds,
        token_share=loop.progress.tokens / max(1, sample_work.tokens),
        peak_memory=peak_memory(),
        kept_memory=frozen_bytes,
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
        late = time.monotonic() - started > TRIAL_SECONDS and len(tries) >= MIN_STEPS
        reporter.progress(total if late else step + 1, total, "steps tried")
        if late:
            break
    return tries
