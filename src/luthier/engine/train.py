"""Training from a recipe to a stored custom model, in the order of execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from luthier.data.tree import READING_BUDGET
from luthier.engine.checkpoints import Checkpoints, TrainingProgress
from luthier.engine.dataset import OpenedData
from luthier.engine.job import TrainingJob, prepare_job, with_base
from luthier.engine.loop import Loop
from luthier.engine.machine import (
    SHARDED_MALLOC_THRESHOLD,
    TRAINING_KERNELS,
    Machine,
    choose_machine,
    keep_freed_memory,
    limit_kernels,
    return_freed_memory,
)
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.engine.model_writer import ModelWriter
from luthier.engine.processes import ORPHAN_SECONDS, has_agent, launch_id, started_again
from luthier.engine.runs import (
    ACTIVATIONS,
    CHECKPOINTS,
    METRICS,
    REFIT,
    SAMPLES,
    Result,
    Run,
    automatic_name,
)
from luthier.engine.steps import TrainingStep, select_steps
from luthier.engine.timings import Clock, record_actual
from luthier.engine.tracking import track
from luthier.engine.trained_network import load_trained_network
from luthier.engine.verdict import Refit, RunVerdict
from luthier.errors import (
    CorruptFile,
    DiskFull,
    Diverged,
    RecipeError,
    RefusedInput,
    RowRefused,
    RunConflict,
    memory_errors,
)
from luthier.evaluation.baselines import Comparison, FittedBaselines
from luthier.files import folder_size
from luthier.library import models as store
from luthier.models.formats.save import adapter_tensors
from luthier.models.networks.layouts import MediaLayout
from luthier.models.networks.network import Network
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.models.sharding import gather_to_first, local_shard
from luthier.recipe import Recipe


def train(
    recipe: Recipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    lineage: Mapping[str, Any] | None = None,
    data: OpenedData | None = None,
) -> Result:
    """Train the model of ``recipe``, verify and store the model, and return the result.

    Every process that a launcher such as torchrun starts calls this function. All processes share
    the work of each step and return the same result. Only the first process reports and writes.

    Args:
        recipe: the recipe.
        resume: whether to continue an unfinished run.
        reporter: receiver of messages and metrics.
        lineage: additional fields of the manifest about the origin of the model.
        data: the opened row sources, if the caller has opened the sources already.

    Raises:
        RefusedInput: before any training, for data, recipe, model, memory, disk or name.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    group = ProcessGroup.of_environment()
    resume = resume or started_again()
    if recipe.training.fully_shard and group.size > 1:
        keep_freed_memory(SHARDED_MALLOC_THRESHOLD)
    else:
        keep_freed_memory()
    # Before the first matrix product: oneDNN reads the limit with the first kernel.
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    with group.shared_errors(), memory_errors():
        if group.rank:
            return _train_other_process(recipe, machine, group)
        data = data or OpenedData(recipe.data, recipe.objective)
        return _train_first_process(
            recipe, data, resume, reporter or Reporter(), lineage, machine, group
        )


def _train_first_process(
    recipe: Recipe,
    data: OpenedData,
    resume: bool,
    reporter: Reporter,
    lineage: Mapping[str, Any] | None,
    machine: Machine,
    group: ProcessGroup,
) -> Result:
    """Run :func:`train` in the reporting and writing process (rank 0)."""
    recipe = with_base(recipe, reporter, data)
    base = store.find(recipe.base, reporter.stage)
    clock = Clock()
    launch, name = launch_id(), recipe.name
    # Nodes that join or leave restart all processes without counting as a restart. Only the
    # launch's id shows which run continues.
    if launch:
        last = automatic_name(base.root, recipe.data.train, resume=True, launch=launch)
        before = Run(base.root, name or last)
        if before.read_launch() == launch:
            resume, name = True, before.name
    # Runs are named after `root`, the base model at the bottom of the lineage.
    run = Run(base.root, name or automatic_name(base.root, recipe.data.train, resume))
    with run.lock(ORPHAN_SECONDS if has_agent() else 0.0):
        try:
            if not resume:
                # Before the rows are read, which can take minutes.
                _check_free(run, recipe, base, data)
            elif run.request_value("luthier") is None:
                reporter.nothing_to_resume(run.model_id)
            # The micro-batch size decides the order of sums: a resumed run keeps the value.
            fixed_values = run.read_request() if resume else {}
            with clock.part("data"):
                job = prepare_job(
                    recipe,
                    base,
                    machine,
                    reporter,
                    fixed_values,
                    processes=group.size,
                    stored_bytes=run.checkpoint_bytes(),
                    opened=data,
                )
            job = replace(job, origin={**job.origin, **(lineage or {})})
            done = run.begin(job.request(), resume, launch)
            if done is None:
                run.record_held_out(job.data.held_out)
        except BaseException:
            run.drop_if_empty()
            raise
        return train_first_process(None if done else job, run, done, resume, reporter, clock, group)


def _check_free(run: Run, recipe: Recipe, base: store.StoredModel, data: OpenedData) -> None:
    """Reject a name that exists already. Invalid rows are reported first, because a new name does
    not fix rows."""
    try:
        run.check_free()
    except RunConflict:
        data.check(recipe.objective, recipe.data.format(base.chat))
        raise


def train_first_process(
    job: TrainingJob | None,
    run: Run,
    done: Result | None,
    resume: bool,
    reporter: Reporter,
    clock: Clock,
    group: ProcessGroup,
) -> Result:
    """Train a prepared job in the first process of ``group``, after acquiring the lock of ``run``.

    ``job`` is ``None`` if the run was finished before; ``done`` is then the result.
    """
    # The other processes wait here too. An earlier error of this process reaches the others through
    # `shared_errors`.
    group.agree()
    fixed_values = job.fixed_values() if job is not None else {}
    done_fields = asdict(done) if done is not None else None
    # The first process alone knows the run's folder, micro-batch size and template date.
    group.first([str(run.folder), fixed_values, resume, done_fields])
    if job is None:
        assert done is not None
        reporter.note(f"{done.model_id} is finished already")
        return done
    if group.size > 1:
        reporter.note(f"{group.size} processes share the rows of each step")
        rows = job.recipe.training.batch_size or 1
        if rows < group.size:
            reporter.note(
                f"warning: a step has {rows} row{'s' * (rows != 1)} for {group.size} processes, "
                f"so some are idle. Use fewer processes, or `training.batch_size={group.size}`"
            )
    recipe = job.recipe
    names, settings = recipe.training.track, recipe.plain()
    try:
        with (
            _explain_changed_rows(),
            track(reporter, names, run.model_id, run.folder, settings) as tracking,
        ):
            result = Trainer(job, run, tracking, select_steps(job), clock, group).run(resume)
        group.first(asdict(result))
        return result
    except DiskFull as error:
        run.drop_if_untrained()
        if not run.has_metrics():
            raise
        text = f"{error}, then repeat the command with `--resume`"
        raise DiskFull(text, rule=error.problem.rule) from error
    except RefusedInput:
        # The request file claims the name: a run rejected before any work must free the name.
        run.drop_if_untrained()
        raise
    except Diverged as error:
        # A resume would repeat the same arithmetic and diverge again.
        run.record_failure(str(error))
        raise


def _train_other_process(recipe: Recipe, machine: Machine, group: ProcessGroup) -> Result:
    """Run :func:`train` in a process without files: compute a share of each step."""
    recipe = with_base(recipe, Reporter())
    base = store.find(recipe.base)
    job = prepare_job(recipe, base, machine, Reporter(), processes=group.size)

    def prepare(fixed_values: Mapping[str, Any]) -> TrainingJob:
        if fixed_values["template_date"] == job.chat.template.date:
            return job
        # The run began on another day, and its rows contain the date of that day.
        return prepare_job(recipe, base, machine, Reporter(), fixed_values, processes=group.size)

    return train_other_process(prepare, group)


def train_other_process(
    prepare: Callable[[Mapping[str, Any]], TrainingJob], group: ProcessGroup
) -> Result:
    """Take part in the training of :func:`train_first_process`, in another process of ``group``.

    ``prepare`` makes the job from the values of :meth:`TrainingJob.fixed_values`, after the first
    process is ready.
    """
    group.agree()
    folder, fixed_values, resume, done = group.first(None)
    if done is None:
        job = prepare(fixed_values)
        budget = fixed_values["micro_batch_tokens"]
        training = job.recipe.training.model_copy(update={"micro_batch_tokens": budget})
        job = replace(job, recipe=job.recipe.model_copy(update={"training": training}))
        # The run folder has one writer; metrics of this process go into a temporary folder.
        with TemporaryDirectory(prefix="luthier-process-") as own:
            run = Run(job.base.root, job.base.root, rehearsal=Path(own))
            steps = select_steps(job, stores=False)
            trainer = Trainer(job, run, Reporter(), steps, group=group, first_folder=Path(folder))
            with _explain_changed_rows():
                trainer.run_without_storing(resume)
        done = group.first(None)
    return Result.parse(done)


@contextmanager
def _explain_changed_rows() -> Iterator[None]:
    """Report a row rejected during training as a file changed after the data check."""
    try:
        yield
    except RowRefused as bad:
        raise CorruptFile(
            f"the file changed after the data check: {bad.problem.message}",
            location=bad.problem.location,
            advice="Restore the file and resume the run, or remove the row and start a new run.",
        ) from bad


def store_trial(recipe: Recipe, folder: Path, reporter: Reporter) -> Result:
    """Train and measure in ``folder``, and store the model in ``folder/model``.

    The caller must have acquired the lock of ``folder``. An interrupted trial resumes from the last
    checkpoint with bit-identical results. A recipe without validation rows is rejected.

    Raises:
        RefusedInput, Interrupted: as :func:`train` does.
        Exception: any exception of ``reporter``, which stops the trial.
    """
    keep_freed_memory()
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    base = store.find(recipe.base, reporter.stage)
    run = Run(base.root, folder.name, rehearsal=folder)
    training = recipe.training.model_copy(update={"refit": False})  # no held-out rows left
    recipe = recipe.model_copy(update={"training": training})
    stored_bytes = run.checkpoint_bytes()
    job = prepare_job(
        recipe, base, machine, reporter, run.read_request(), stored_bytes=stored_bytes
    )
    if not job.data.validation:
        raise RecipeError(
            "trials are compared on validation rows, and none exist. Give --validation FILE, or "
            "at least 20 rows"
        )
    done = run.begin(job.request(), resume=True)
    return done or Trainer(job, run, reporter, select_steps(job, trial=True)).run(resume=True)


class Trainer:
    """One training of a job: the loop, the checkpoints and the stored model.

    Everything else is a :class:`~luthier.engine.steps.TrainingStep`. Steps read and change the
    attributes of the trainer.
    """

    network: Network
    """The network in training. After the loop, the network has the best weights."""
    progress: TrainingProgress
    """Progress at the end of the loop, including the refit."""
    lines: list[dict[str, Any]]
    """Lines of the metrics file, without the refit."""
    refit_lines: Sequence[Mapping[str, Any]] = ()
    """Lines of the refit."""

    def __init__(
        self,
        job: TrainingJob,
        run: Run,
        reporter: Reporter,
        steps: Sequence[TrainingStep],
        clock: Clock | None = None,
        group: ProcessGroup = ALONE,
        first_folder: Path | None = None,
    ) -> None:
        """Create the trainer. ``first_folder`` is the run folder of the first process."""
        self.job, self.run_folder, self.reporter = job, run, reporter
        self.stored_job = job
        """Job of the stored weights, completed by steps before storing."""
        self.steps, self.clock, self.group = steps, clock or Clock(), group
        self.first_folder = first_folder or run.folder
        self.checkpoint: tuple[TrainingProgress, Mapping[str, torch.Tensor]] | None = None
        """Checkpoint to resume from."""
        self.prepared_rows = job.data.train
        """All training rows after :meth:`Objective.prepare`; a trial may train on a sample of the
        rows."""
        self.first_lines: dict[str, dict[str, Any]] = {}
        """Events to write into the metrics before the first step, with values."""
        self.fitted_head = False
        """True if a new head started from logistic regression."""
        self.separable_rows = False
        """True if logistic regression is right on training rows left out of its fit."""
        self.is_final = False
        """True if the fitted head needs no steps."""
        self.calibration_rows = 0
        """Number of calibration rows of the adaptation."""
        self.baselines: FittedBaselines | None = None
        self.comparison: Comparison | None = None
        self.refit: Refit | None = None
        self.verdict: RunVerdict | None = None

    @property
    def reading_budget(self) -> int:
        """Tokens of a micro-batch without a gradient."""
        return max(self.job.recipe.training.micro_batch_tokens or 1, READING_BUDGET)

    def run(self, resume: bool) -> Result:
        """Train, store and verify the model."""
        # Before `learn`, which creates the metrics file.
        resumed = self.run_folder.has_metrics()
        self.learn(resume)
        for step in self.steps:
            step.after_training(self)
        result = self.store()
        # Before `finish`, which deletes the checkpoints.
        disk = folder_size(self.run_folder.folder) + folder_size(self.run_folder.model_folder)
        self.run_folder.finish(result)
        if self.group.size == 1:  # estimates are for one process
            record_actual(self.run_folder, self.job.machine, self.clock, result, disk, resumed)
        return result

    def run_without_storing(self, resume: bool) -> None:
        """Train in a process without a stored model."""
        self.learn(resume)
        for step in self.steps:
            step.after_training(self)
        self.network.close()

    def learn(self, resume: bool) -> None:
        """Train to the end. Afterwards :attr:`network` has the best weights.

        The optimizer's memory is free again on return, because the parity check loads a second
        network.
        """
        loop = self.start(resume)
        self.progress = loop.run()
        self.lines = loop.metrics.read(rows=True)
        self.release()
        if self.network.is_sharded:
            trained = adapter_tensors(self.network.model).items()
            tensors = gather_to_first((name, local_shard(each), each) for name, each in trained)
            # The gathered tensors are the only copy: free shards before the whole network loads.
            self.network.close()
            del loop, trained
            return_freed_memory()
            if self.group.rank == 0:
                self.network = self._collect_shards(tensors)

    def start(self, resume: bool) -> Loop:
        """Load the network, run the steps before training, and return the loop at the next step."""
        with self.clock.part("load"):
            self._loaded = load_trained_network(self.job, self.group, self.reporter)
        self.network = self._loaded.network
        checkpoints = Checkpoints(self.first_folder / CHECKPOINTS)
        # Before the steps: calibration is skipped if a checkpoint exists.
        self.checkpoint = checkpoints.latest() if resume else None
        for step in self.steps:
            step.before_training(self)
        # After the steps: the optimizer copies its masters from the calibrated weights.
        loop = self._loop(checkpoints)
        if self.is_final:
            loop.until = 0
        if self.checkpoint is not None:
            loop.resume(*self.checkpoint)
        else:
            loop.truncate_files()
        if resume:
            done = loop.progress.step
            self.reporter.note(
                f"resuming from step {done}" if self.checkpoint else "starting at step 1"
            )
        if loop.progress.step == 0:
            # The metrics file of a resumed run contains these lines already.
            for event, values in self.first_lines.items():
                loop.record(event, **values)
        self.checkpoint = None  # free the tensors: the loop has copies
        return loop

    def release(self) -> None:
        """Free everything needed for training only."""
        network = self.network
        for other in network.others.values():
            other.close()
        network.frozen_cache, network.others, network.cache = None, {}, None
        network.uses_llama_forward = None  # its cached result includes the modules deleted below
        if isinstance(network.layout, MediaLayout):
            network.layout.forget()
        for name in self._loaded.extra_modules:
            delattr(network.model, name)
        (self.run_folder.folder / ACTIVATIONS).unlink(missing_ok=True)

    def store(self) -> Result:
        """Write the trained model and compare the model with a copy loaded from disk."""
        self.reporter.stage("Storing and verifying the model")
        for step in self.steps:
            step.before_storing(self)
        assert self.verdict is not None
        # A network gathered from shards is on the CPU, because a device may lack the room.
        machine = replace(self.job.machine, device=self.network.device)
        issues = self.baselines.label_issues if self.baselines is not None else None
        writer = ModelWriter(
            replace(self.stored_job, machine=machine),
            self.run_folder,
            self.progress,
            [*self.lines, *self.refit_lines],
            self._loaded.trained,
            self._loaded.weights,
            self.verdict,
            self.comparison,
            issues.counts if issues is not None else None,
            self.refit,
        )
        with self.clock.part("store"):
            return writer.write(self.network)

    def refit_trainer(self, job: TrainingJob, run: Run) -> Trainer:
        """Return the trainer of the refit, which stores no model."""
        return Trainer(
            job,
            run,
            self.reporter,
            select_steps(job, stores=False),
            self.clock,
            self.group,
            self.first_folder / REFIT,
        )

    def _collect_shards(self, tensors: dict[str, torch.Tensor]) -> Network:
        """Return a whole network with the gathered weights of all shards."""
        network = load_trained_network(self.job, self.group, self.reporter, whole=True).network
        with torch.no_grad():
            for name, tensor in adapter_tensors(network.model).items():
                # `pop` frees each gathered tensor after the copy, which limits the peak of memory.
                tensor.copy_(tensors.pop(name))
        return network

    def _loop(self, checkpoints: Checkpoints) -> Loop:
        job, folder = self.job, self.run_folder.folder
        augmentation = job.recipe.data.augmentation

        def on_measured(step: int) -> None:
            for each in self.steps:
                each.after_evaluation(self, step)

        return Loop(
            network=self.network,
            objective=job.data.objective,
            training=job.recipe.training,
            examples=job.data.train,
            validation=job.data.validation,
            steps=job.steps,
            checkpoints=checkpoints,
            metrics=MetricsFile(folder / METRICS),
            reporter=self.reporter,
            mixed=job.data.mixed,
            augmentation=augmentation.for_inputs(job.chat) if augmentation else None,
            samples=MetricsFile(folder / SAMPLES),
            on_measured=on_measured,
            clock=self.clock,
            until=job.until,
            steps_before=job.steps_before,
            all_steps=job.all_steps,
            processes=self.group,
            usual_rate=job.usual_rate,
            untrained_head=job.new_head and not self.fitted_head,
            fitted_head=self.fitted_head,
            separable_rows=self.separable_rows,
            unfreeze_every=job.recipe.adaptation.unfreeze_steps,
        )
