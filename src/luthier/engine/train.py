"""From a recipe to a custom model: everything a run does, in the order it does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from luthier.data.disk_sequence import concatenate
from luthier.data.media import PLURAL
from luthier.data.tree import READING_BUDGET
from luthier.engine import defaults
from luthier.engine.checkpoints import Checkpoints, TrainingProgress
from luthier.engine.comparison import fit_baselines, measure_tuned
from luthier.engine.dataset import check_sources
from luthier.engine.job import (
    TrainingJob,
    add_reference_logps,
    load_frozen,
    prepare_job,
    prepare_refit,
    with_base,
)
from luthier.engine.loop import Loop, row_gradients
from luthier.engine.machine import (
    SHARDED_MALLOC_THRESHOLD,
    TRAINING_KERNELS,
    Machine,
    available_memory,
    choose_machine,
    keep_freed_memory,
    limit_kernels,
    return_freed_memory,
)
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.engine.model_writer import ModelWriter
from luthier.engine.perplexity import find_unfamiliar_text
from luthier.engine.processes import ORPHAN_SECONDS, has_agent, launch_id, started_again
from luthier.engine.runs import (
    ACTIVATIONS,
    CHECKPOINTS,
    METRICS,
    PRECOMPUTED,
    REFIT,
    SAMPLES,
    Result,
    Run,
    automatic_name,
)
from luthier.engine.timings import Clock, record_actual
from luthier.engine.tracking import tracked
from luthier.engine.verdict import Refit, RunVerdict, judge_run
from luthier.errors import (
    CorruptFile,
    Diverged,
    RecipeError,
    RefusedInput,
    RowRefused,
    RunConflict,
)
from luthier.evaluation.baselines import Comparison, FittedBaselines
from luthier.files import folder_size, need_disk
from luthier.gate.checks.base_language import UNTRAINED
from luthier.library import models as store
from luthier.media.objectives.generative import MOST_COMPARED, Generative
from luthier.media.sample_grids import SampleGrids
from luthier.models.dropout import set_dropout
from luthier.models.frozen_layer_cache import Bottom, frozen_layers, is_frozen
from luthier.models.heads import new_weights
from luthier.models.layers import layer_names
from luthier.models.layouts import MediaLayout
from luthier.models.load import as_network, check_decoder_input
from luthier.models.network import Network
from luthier.models.probe import try_shared, try_training
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.models.save import adapter_tensors, stored_bytes, trained_weights
from luthier.models.sentence_head import attach_sentence_head
from luthier.models.sharding import gather_to_first, local_shard, shard_layers
from luthier.objectives.base import add_modules, threshold_of
from luthier.recipe import Recipe


def train(
    recipe: Recipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Result:
    """Carry out ``recipe`` and return what came out; the model is stored and verified.

    ``lineage`` is what the manifest is to say further of where the model comes from. In each process
    that a launcher such as torchrun has started it takes a part of the work, and returns the same; the
    first alone reports and writes.

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
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    with group.shared_errors():
        if group.rank:
            return _train_beside(recipe, machine, group)
        return _train_first(recipe, resume, reporter or Reporter(), lineage, machine, group)


def _train_first(
    recipe: Recipe,
    resume: bool,
    reporter: Reporter,
    lineage: Mapping[str, Any] | None,
    machine: Machine,
    group: ProcessGroup,
) -> Result:
    """:func:`train` in the process that reports and writes, which mostly is the only one."""
    recipe = with_base(recipe, reporter)
    base = store.find(recipe.base, reporter.stage)
    clock = Clock()
    # A model tuned further keeps the name of the base model at the bottom of its lineage.
    launch, name = launch_id(), recipe.name
    if launch:  # nodes that join and leave start all processes again, too
        last = automatic_name(base.root, recipe.data.train, resume=True, launch=launch)
        before = Run(base.root, name or last)
        if before.read_launch() == launch:
            resume, name = True, before.name
    run = Run(base.root, name or automatic_name(base.root, recipe.data.train, resume))
    with run.lock(ORPHAN_SECONDS if has_agent() else 0.0):
        try:
            if not resume:
                _check_free(run, recipe, base)  # before the rows are read, which can take minutes
            elif run.request_value("luthier") is None:
                reporter.nothing_to_resume(run.model_id)
            # Micro-batches are part of the arithmetic: a resumed run keeps those it began with.
            settled = run.read_request() if resume else {}
            with clock.part("data"):
                job = prepare_job(
                    recipe,
                    base,
                    machine,
                    reporter,
                    settled,
                    processes=group.size,
                    stored_bytes=run.checkpoint_bytes(),
                )
            job = replace(job, origin={**job.origin, **(lineage or {})})
            done = run.begin(job.request(), resume, launch)
            if done is None:
                run.hold_out(job.data.held_out)
        except BaseException:
            run.drop_if_empty()
            raise
        return train_first(None if done else job, run, done, resume, reporter, clock, group)


def _check_free(run: Run, recipe: Recipe, base: store.StoredModel) -> None:
    """Refuse a name that is taken; but first rows that no name would help."""
    try:
        run.check_free()
    except RunConflict:
        check_sources(recipe.data, recipe.objective, store.chat_format(base))
        raise


def train_first(
    job: TrainingJob | None,
    run: Run,
    done: Result | None,
    resume: bool,
    reporter: Reporter,
    clock: Clock,
    group: ProcessGroup,
) -> Result:
    """Train a job that is prepared, in the first process of ``group``, which holds ``run``'s lock.

    ``job`` is ``None`` where the run was ``done`` before.
    """
    group.agree()
    settled = job.settled() if job is not None else {}
    known = asdict(done) if done is not None else None
    group.first([str(run.folder), settled, resume, known])
    if job is None:
        assert done is not None
        reporter.note(f"{done.model_id} was already finished")
        return done
    if group.size > 1:
        reporter.note(f"{group.size} processes share the rows of each step")
        rows = job.recipe.training.batch_size or 1
        if rows < group.size:
            reporter.note(
                f"warning: a step has {rows} row{'s' * (rows != 1)} for {group.size} processes, so "
                f"some may have nothing to do; take fewer processes, or "
                f"`training.batch_size={group.size}`"
            )
    recipe = job.recipe
    names, settings = recipe.training.track, recipe.plain()
    try:
        with (
            _explain_changed_rows(),
            tracked(reporter, names, run.model_id, run.folder, settings) as tracking,
        ):
            result = Trainer(job, run, tracking, clock, group).run(resume)
        group.first(asdict(result))
        return result
    except RefusedInput:
        run.drop_if_untrained()
        raise
    except Diverged as error:
        run.record_failure(str(error))
        raise


def _train_beside(recipe: Recipe, machine: Machine, group: ProcessGroup) -> Result:
    """:func:`train` in a process that takes a part of the work and keeps nothing."""
    recipe = with_base(recipe, Reporter())
    base = store.find(recipe.base)
    job = prepare_job(recipe, base, machine, Reporter(), processes=group.size)

    def prepare(settled: Mapping[str, Any]) -> TrainingJob:
        if settled["template_date"] == job.chat.date:
            return job
        # The run began on another day, and its rows have the date of that day.
        return prepare_job(recipe, base, machine, Reporter(), settled, processes=group.size)

    return train_beside(prepare, group)


def train_beside(
    prepare: Callable[[Mapping[str, Any]], TrainingJob], group: ProcessGroup
) -> Result:
    """Take part in the training of :func:`train_first`, in another process of ``group``.

    ``prepare`` makes the job from the values of :meth:`TrainingJob.settled`, after the first process is
    ready.
    """
    group.agree()
    folder, settled, resume, done = group.first(None)
    if done is None:
        job = prepare(settled)
        budget = settled["micro_batch_tokens"]
        training = job.recipe.training.model_copy(update={"micro_batch_tokens": budget})
        job = replace(job, recipe=job.recipe.model_copy(update={"training": training}))
        with TemporaryDirectory(prefix="luthier-process-") as own:
            run = Run(job.base.root, job.base.root, rehearsal=Path(own))
            trainer = Trainer(job, run, Reporter(), group=group, first_folder=Path(folder))
            with _explain_changed_rows():
                trainer.take_part(resume)
        done = group.first(None)
    return Result.parse(done)


@contextmanager
def _explain_changed_rows() -> Iterator[None]:
    """Say of a row that is refused in training that the gate has read it before."""
    try:
        yield
    except RowRefused as bad:
        raise CorruptFile(
            f"the file changed after the data check: {bad.problem.message}",
            location=bad.problem.location,
            advice="Restore the file and resume the run, or remove the row and start a new run.",
        ) from bad


def rehearse(recipe: Recipe, folder: Path, reporter: Reporter | None = None) -> TrainingProgress:
    """Train and measure as :func:`train` does, in ``folder``, and store no model.

    Whoever calls holds the only hand on ``folder``. A rehearsal that was cut short in it goes on from
    its last checkpoint, to the same bits. A recipe without validation rows is rejected.

    Raises:
        RefusedInput, Interrupted: as :func:`train` does; and what ``reporter`` raises to stop it.
    """
    reporter = reporter or Reporter()
    keep_freed_memory()
    limit_kernels(TRAINING_KERNELS)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    base = store.find(recipe.base, reporter.stage)
    run = Run(base.root, folder.name, rehearsal=folder)
    training = recipe.training.model_copy(update={"refit": False})  # nothing would measure it
    recipe = recipe.model_copy(update={"training": training})
    stored_bytes = run.checkpoint_bytes()
    job = prepare_job(
        recipe, base, machine, reporter, run.read_request(), stored_bytes=stored_bytes
    )
    if not job.data.validation:
        raise RecipeError(
            "trials are compared on validation rows, and there are none; give --validation FILE, or "
            "at least 20 rows, of which some are held out"
        )
    run.begin(job.request(), resume=True)
    return Trainer(job, run, reporter).learn(resume=True)[1]


class Trainer:
    """Loads, trains, stores and verifies one job."""

    def __init__(
        self,
        job: TrainingJob,
        run: Run,
        reporter: Reporter,
        clock: Clock | None = None,
        group: ProcessGroup = ALONE,
        first_folder: Path | None = None,
    ) -> None:
        """``first_folder`` is the run's folder of the first process of ``group``, in another one."""
        self.job, self.run_folder, self.reporter = job, run, reporter
        self.group, self.first_folder = group, first_folder or run.folder
        self.recipe, self.machine = job.recipe, job.machine
        self.clock = clock or Clock()
        self.calibration_rows = 0
        """Rows whose gradients the adaptation asked for."""
        self.extra_modules: Sequence[str] = ()
        """Names of the objective's modules that only training needs."""
        self.fitted_head = False
        """Whether the head started from logistic regression."""
        self.baselines: FittedBaselines | None = None
        """What simple baselines are worth, where they are compared with."""
        self.comparison: Comparison | None = None
        """The trained model beside them."""
        self.prepared_rows = job.data.train
        """All training rows, with what the objective made of them before the first step."""

    def run(self, resume: bool) -> Result:
        """Everything after the last check."""
        resumed = self.run_folder.has_metrics()
        network, progress, lines = self.learn(resume, compare=True)
        if self.baselines is not None:
            held, budget = self.job.data.compared[1], self._reading_budget
            objective = self.job.data.objective
            with self.clock.part("baselines"):
                self.comparison = measure_tuned(network, objective, held, self.baselines, budget)
        learned = None
        if self.group.first(bool(self.job.refit_steps and self._judge(lines).learned)):
            network.close()
            network, learned, progress = self._refit(progress)
        elif self.job.refit_steps and progress.best_step:
            self.reporter.note("nothing is trained once more: all rows would add nothing")
        elif self.job.refit_steps:
            self.reporter.note("nothing is trained once more: the weights are those from before")
        result = self.store(network, progress, lines, learned)
        disk = folder_size(self.run_folder.folder) + folder_size(self.run_folder.model_folder)
        self.run_folder.finish(result)
        if self.group.size == 1:  # estimates are of one process
            record_actual(self.run_folder, self.machine, self.clock, result, disk, resumed)
        return result

    def take_part(self, resume: bool) -> None:
        """What :meth:`run` does in the processes that neither report nor write."""
        network, progress, _ = self.learn(resume)
        network.close()
        if self.group.first(None):
            self._refit(progress)[0].close()

    def store(
        self,
        network: Network,
        progress: TrainingProgress,
        lines: list[dict[str, Any]],
        learned: TrainingJob | None = None,
    ) -> Result:
        """Write what was trained, and compare what comes back from disk.

        ``learned`` is the job of the refit, where there was one; ``lines`` are those before it.
        """
        self.reporter.stage("Storing and verifying the model")
        final = self._with_threshold(learned or self.job, network)
        machine = replace(final.machine, device=network.device)
        final = replace(final, machine=machine)  # what was sharded is checked where it is whole
        counts = self.job.data.counts
        refit = None
        if learned is not None:
            held_out = counts["validation_rows"]
            refit = Refit(learned.data.counts["rows"], held_out, learned.until)
        verdict = self._judge(lines, refit)
        if copied := self._describe_copies(network):
            verdict = replace(verdict, text=f"{verdict.text}. {copied}")
        if usual := self._advised_steps(progress.step):
            text = f"{progress.step:,} steps from random weights are few to make images"
            advice = f"Train for {usual:,} steps or more: `training.max_steps={usual}`"
            verdict = replace(verdict, text=f"{verdict.text}. {text}", advice=advice)
        issues = self.baselines.label_issues if self.baselines is not None else None
        writer = ModelWriter(
            final,
            self.run_folder,
            progress,
            lines,
            self.trained,
            self.weights,
            verdict,
            self.comparison,
            issues.counts if issues is not None else None,
            refit,
        )
        with self.clock.part("store"):
            return writer.write(network)

    def _judge(self, lines: Sequence[Mapping[str, Any]], refit: Refit | None = None) -> RunVerdict:
        """What the measured training came to; ``refit`` is the one after it, if it was done."""
        report = self.job.data.report
        language = report.findings.examples.get(UNTRAINED.id) if report is not None else None
        informed = self.baselines.best_informative if self.baselines is not None else None
        return judge_run(
            lines,
            self.job.data.objective.measure,
            self.recipe.training,
            self.job.steps,
            len(self.job.data.validation),
            self.job.rows / (self.recipe.training.batch_size or 1),
            self.fitted_head,
            uninformative=self.comparison is not None and self.comparison.uninformative,
            informed=informed.name if informed is not None else "",
            other_base=language[0].closest_fix if language else "",
            refit=refit,
        )

    def _advised_steps(self, steps: int) -> int:
        """Return the advised number of steps if training from random weights was short; else 0."""
        objective = self.job.data.objective
        usual = max(defaults.least_steps(objective), objective.defaults.scratch_steps)
        makes = isinstance(objective, Generative)
        few = makes and self.job.base.manifest.is_random and 2 * steps <= usual
        return usual if few else 0

    @torch.no_grad()
    def _describe_copies(self, network: Network) -> str:
        """Return the compression and the error of copies of an autoencoder; else an empty text."""
        objective = self.job.data.objective
        if not isinstance(objective, Generative):
            return ""
        network.model.eval()
        examples = self.job.data.validation[:MOST_COMPARED]
        return objective.describe_copies(network, examples, self._reading_budget)

    @torch.no_grad()
    def _with_threshold(self, job: TrainingJob, network: Network) -> TrainingJob:
        """``job`` with the border that the objective draws by what the trained network says."""
        objective = job.data.objective
        examples, wanted = self.job.data.validation, objective.rows_to_finish
        if not wanted:
            return job
        count, again = len(examples), job is not self.job
        if count < wanted:
            examples = concatenate([examples, job.data.train])
        network.model.eval()
        done = objective.finish(network, examples, self._reading_budget)
        if done is objective:
            return job
        reason = f"set by what the model says of {len(examples):,} rows"
        self.reporter.settings([("objective.threshold", threshold_of(done), reason)])
        if count < wanted or again:
            why = f"{count:,} are held out, and {wanted:,} would do (`data.validation_share`)"
            if again:
                why = "the training on all rows learned from the held-out ones, too"
            self.reporter.note(
                "warning: the threshold is set by rows that were learned from, so more of other rows "
                f"will be above it; {why}"
            )
        recipe = job.recipe.model_copy(update={"objective": done})
        origin = {**job.origin, "recipe": recipe.plain()}
        return replace(job, recipe=recipe, data=replace(job.data, objective=done), origin=origin)

    def _refit(self, measured: TrainingProgress) -> tuple[Network, TrainingJob, TrainingProgress]:
        """Train from the base once more, on all rows, for as many passes as the kept weights had.

        Its folder has checkpoints of its own, so that a run that is killed in it goes on there. What
        it notes joins the metrics of the run.
        """
        refit_folder = self.run_folder.folder / REFIT
        run = Run(self.job.base.root, self.run_folder.name, rehearsal=refit_folder)
        with self.clock.part("data"):
            job = prepare_refit(
                self.job,
                measured.best_step or 0,
                measured.step,
                self.group.size,
                run.checkpoint_bytes(),
            )
        self.reporter.stage(
            f"Training once more, on all {job.data.counts['rows']:,} rows, for {job.until:,} steps"
        )
        resume = bool(self.group.first(run.has_metrics()))
        run.begin(job.request(), resume=True)
        first_folder = self.first_folder / REFIT
        trainer = Trainer(job, run, self.reporter, self.clock, self.group, first_folder)
        network, progress, lines = trainer.learn(resume)
        metrics = MetricsFile(self.run_folder.folder / METRICS)
        for line in lines:
            metrics.append(line)
        self.run_folder.hold_out(job.data.held_out)
        both = replace(
            progress,
            step=measured.step + progress.step,
            tokens=measured.tokens + progress.tokens,
            rows=measured.rows + progress.rows,
            seconds=measured.seconds + progress.seconds,
            best_loss=measured.best_loss,
        )
        return network, job, both

    def learn(
        self, resume: bool, compare: bool = False
    ) -> tuple[Network, TrainingProgress, list[dict[str, Any]]]:
        """Train; the network with its best weights, how far it came, and the lines of the metrics.

        ``compare`` fits baselines to compare with before.
        The memory of the optimizer is free again after, which a second copy of the network needs.
        """
        network, loop = self.start(resume, compare)
        progress = loop.run()
        self.release(network)
        lines = loop.metrics.read(rows=True)
        if network.is_sharded:
            trained = adapter_tensors(network.model).items()
            tensors = gather_to_first((name, local_shard(each), each) for name, each in trained)
            network.close()
            del loop, trained
            return_freed_memory()
            if self.group.rank == 0:
                network = self._whole_network(tensors)
        return network, progress, lines

    def start(self, resume: bool, compare: bool = False) -> tuple[Network, Loop]:
        """The network and the loop, right before the first step, or the next."""
        with self.clock.part("load"):
            network = self._network()
            self._warn_of_unfamiliar_text(network, resume)
        self._prepare_rows(network)
        if compare and network.is_sharded:
            self.reporter.note(
                "simple baselines are not fitted: one process cannot run shards alone"
            )
        elif compare:
            self._compare(network)
        checkpoints = Checkpoints(self.first_folder / CHECKPOINTS)
        found = checkpoints.latest() if resume else None
        # What is calibrated comes with a checkpoint, but the starting weights do not.
        if found is None or self.job.data.objective.uses_reference:
            with self.clock.part("calibrate"):
                self._calibrate(network)
        started = time.monotonic()
        with self.clock.part("ahead"):
            ahead = self._cache_frozen_layers(network)
            self.job = add_reference_logps(self.job, network, self.reporter)
        loop = self._loop(network, checkpoints)
        if found is not None:
            loop.resume(*found)
        else:
            loop.cut_lines()
        if resume:
            step = loop.progress.step
            self.reporter.note(f"going on after step {step}" if found else "starting at step 1")
        if ahead and loop.progress.step == 0:
            loop.record("frozen_layers", layers=ahead, seconds=time.monotonic() - started)
        return network, loop

    def release(self, network: Network) -> None:
        """Let go of what only training needed."""
        for other in network.others.values():
            other.close()
        network.bottom, network.others, network.cache, network.backend = None, {}, None, None
        if isinstance(network.layout, MediaLayout):
            network.layout.forget()
        for name in self.extra_modules:
            delattr(network.model, name)
        self._activations.unlink(missing_ok=True)

    def _calibrate(self, network: Network) -> None:
        data = self.job.data
        of_rows = row_gradients(
            network, data.objective, data.train, self.recipe.training, self.reporter
        )

        def gradients(rows: int) -> Iterator[None]:
            self.calibration_rows += rows
            return of_rows(rows)

        self.recipe.adaptation.calibrate(network, gradients)
        return_freed_memory()

    def _whole_network(self, tensors: dict[str, torch.Tensor]) -> Network:
        """A network with what was trained in shards, on the processor, as no device may hold it."""
        network = self._network(again=True)
        with torch.no_grad():
            for name, tensor in adapter_tensors(network.model).items():
                tensor.copy_(tensors.pop(name))
        return network

    def _network(self, again: bool = False) -> Network:
        """The base with the adaptation, sharded where processes share the layers.

        ``again`` gives a whole one on the processor, and says nothing that was said before.
        """
        is_sharded = self.recipe.training.fully_shard and self.group.size > 1 and not again
        silent = again or bool(self.job.steps_before)
        note = Reporter().note if silent else self.reporter.note
        torch.manual_seed(self.recipe.training.seed)
        whole = ", to hold the weights of all shards" if again else ""
        self.reporter.stage(f"Loading {self.job.base.id}{whole}")
        machine = self.machine
        # A device may not hold what is to be cut, or was.
        device = torch.device("cpu") if is_sharded or again else machine.device
        head = self.job.data.objective.head()
        model = store.load(self.job.base, machine.dtype, device, head)
        if new_weights(model):
            classes = f" of {len(head.labels)} classes" if len(head.labels) > 1 else ""
            why = f": {self.job.base.id} has none that fits"
            if own := store.objective_of(self.job.base).head().labels:
                some = ", ".join(own[:5]) + (", …" if len(own) > 5 else "")
                why = f"; the old one, of {some}, is left out"
            note(f"a new head{classes} is made{why}")
        if getattr(model.config, "attention_dropout", 0):
            model.config.attention_dropout = 0.0  # type: ignore[union-attr]
        network = as_network(model, device, machine.dtype)
        network.chat = self.job.chat
        check_decoder_input(network)
        if head.task == "embedding":
            attach_sentence_head(model, self.job.chat.sentence, self.job.base.network_folder)
        if (dropout := self.recipe.training.dropout) is not None:
            places = ", ".join(set_dropout(network, dropout))
            note(f"dropout {dropout:g} in {places}; attention weights are not dropped")
        adaptation = self.recipe.adaptation
        if adaptation.shares_base:
            try_shared(network, adaptation.method, adaptation.attach)
        torch.manual_seed(self.recipe.training.seed)
        before = sum(p.numel() for p in model.parameters())
        adaptation.attach(model)
        try_training(network, adaptation.method)
        size = stored_bytes(model, self.recipe.adaptation)
        self.extra_modules = add_modules(model, self.job.data.objective.attach(model))
        return_freed_memory()  # of what loading and attaching made on the way
        self.trained = sum(p.numel() for p in trained_weights(model).values())
        # Weights that were quantized are parameters no longer.
        self.weights = max(before, sum(p.numel() for p in model.parameters()))
        note(
            f"{self.trained:,} of {self.weights:,} weights train ({self.trained / self.weights:.2%}); "
            f"the model will be stored in {size / 1e6:,.2f} MB"
        )
        if refit_steps := self.job.refit_steps:
            note(
                f"{self.job.all_steps:,} steps in all: {self.job.steps:,} that are measured on the "
                f"held-out rows, then up to {refit_steps:,} that train once more on all rows "
                "(`training.refit`)"
            )
        if is_sharded:
            shard_layers(network, self.group, machine.device)
            return_freed_memory()
            held = sum(local_shard(weight).nbytes for weight in model.parameters())
            note(
                f"the layers are cut into {self.group.size} shards: each process holds "
                f"{held / 1e6:,.1f} of {sum(w.nbytes for w in model.parameters()) / 1e6:,.1f} MB of "
                "weights"
            )
        others = self.job.others.items()
        network.others = {name: load_frozen(o, machine, self.reporter) for name, o in others}
        return network

    def _warn_of_unfamiliar_text(self, network: Network, resume: bool) -> None:
        """Say what the gate cannot see in the tokenizer, where it has not warned already."""
        data = self.job.data
        warned = data.report is not None and UNTRAINED in data.report.findings.rules()
        if resume or warned or data.objective.task != "causal_lm":
            return
        if warning := find_unfamiliar_text(network, self.job.chat, data.train):
            self.reporter.note(f"warning: {warning}")

    @torch.no_grad()
    def _prepare_rows(self, network: Network) -> None:
        """Let the objective add to the rows what the network says of them before it is trained."""
        objective, budget = self.job.data.objective, self._reading_budget
        network.model.eval()
        note = self.reporter.note
        train = self.job.data.train
        with self.clock.part("begin"):
            if self.job.new_head and objective.starts_head:
                done = objective.start_head(network, self.prepared_rows, budget)
                self.fitted_head = bool(done)
                if done:
                    note(done)
            train = objective.prepare(network, train, budget, note)
        self.prepared_rows = train
        self.job = self.job.with_rows(train)
        with self.clock.part("ahead"):
            # rows of a pre-training are read from disk
            rows = chain(self.job.data.train, self.job.data.validation)
            objective.precompute(network, rows, budget, self.run_folder.folder / PRECOMPUTED, note)
        return_freed_memory()  # a teacher may have been let go

    def _compare(self, network: Network) -> None:
        """Fit the baselines on what the base model says before anything of it has moved."""
        train, held = self.job.data.compared
        seconds = self.recipe.training.baseline_seconds
        with self.clock.part("baselines"):
            if train and held and seconds:
                self.reporter.stage("Fitting simple baselines to compare with")
            media = self.job.chat.media

            def on_progress(done: int, total: int) -> None:
                if media is not None:  # texts are read in no time
                    self.reporter.progress(done, total, f"{PLURAL[media.kind]} read")

            budget, objective = self._reading_budget, self.job.data.objective
            self.baselines = fit_baselines(
                network, objective, train, held, budget, seconds, on_progress, label_issues=True
            )
            if self.baselines is not None:
                self.reporter.note(self.baselines.describe())
            found = self.baselines.label_issues if self.baselines is not None else None
            self.run_folder.write_label_issues(found.issues if found is not None else ())
        return_freed_memory()

    @property
    def _reading_budget(self) -> int:
        """Tokens read at once where nothing is learned."""
        return max(self.recipe.training.micro_batch_tokens or 1, READING_BUDGET)

    def _cache_frozen_layers(self, network: Network) -> int:
        """Where the bottom is frozen and rows come more than once, compute it ahead for all rows.

        Returns how many layers that are.
        """
        data = self.job.data
        media = network.layout if isinstance(network.layout, MediaLayout) else None
        if media is not None:
            frozen = is_frozen(network.model.base_model)
            count = len(layer_names(network.model)) if frozen else 0
        else:
            count = frozen_layers(network.model) if network.layout.flat else 0
        seen = self.job.steps * (self.recipe.training.batch_size or 1)
        fixed = data.objective.same_each_epoch and not self.recipe.data.augmentation
        if not count or not fixed or seen < 2 * self.job.rows or network.is_sharded:
            return 0
        rows = data.objective.augment([*data.train, *data.validation])
        size = sum(map(len, rows)) * network.width * network.dtype.itemsize
        file = None
        if size > available_memory() // 4:
            need_disk(self.run_folder.folder, size, "keeping the activations of the frozen layers")
            file = self._activations
        self.reporter.stage(f"Computing the {count} frozen layers once for {len(rows):,} rows")
        if media is not None:
            media.compute_ahead(network, rows, self._reading_budget, file)
            self.reporter.note(f"{size / 1e6:,.1f} MB of features are kept; only the head runs now")
            return count
        network.bottom = Bottom.of(network, count, rows, self._reading_budget, file)
        self.reporter.note(
            f"{size / 1e6:,.0f} MB of activations are kept {'on disk' if file else 'in memory'}; each "
            f"epoch starts at layer {count + 1}"
        )
        return count

    @property
    def _activations(self) -> Path:
        return self.run_folder.folder / ACTIVATIONS

    def _loop(self, network: Network, checkpoints: Checkpoints) -> Loop:
        objective, folder = self.job.data.objective, self.run_folder.folder
        rows = self.job.data.validation or self.job.data.train
        grids = SampleGrids.of(objective, network, self.job.chat, folder, rows)
        return Loop(
            network=network,
            objective=self.job.data.objective,
            training=self.recipe.training,
            examples=self.job.data.train,
            validation=self.job.data.validation,
            steps=self.job.steps,
            checkpoints=checkpoints,
            metrics=MetricsFile(self.run_folder.folder / METRICS),
            reporter=self.reporter,
            mixed=self.job.data.mixed,
            augmentation=self.recipe.data.augmentation,
            samples=MetricsFile(self.run_folder.folder / SAMPLES),
            on_measured=grids.draw if grids is not None else None,
            clock=self.clock,
            until=self.job.until,
            steps_before=self.job.steps_before,
            all_steps=self.job.all_steps,
            processes=self.group,
            usual_rate=self.job.usual_rate,
        )
