"""Steps of a run around the training loop, in the order of execution.

A step prepares the rows or the network, measures next to the loop, or decides about the stored
model. :meth:`TrainingStep.applies` selects the jobs; :func:`select_steps` returns the steps of a
run. A package adds a step with an entry point in the group ``luthier.training_steps``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import torch

from luthier.chat_models.base import SamplingSpec
from luthier.data.inputs import PLURAL
from luthier.data.loader import one_pass
from luthier.engine.comparison import fit_baselines, measure_tuned
from luthier.engine.job import TrainingJob, prepare_refit
from luthier.engine.loop import row_gradients
from luthier.engine.machine import available_memory, return_freed_memory
from luthier.engine.metrics import MetricsFile, ShownReply
from luthier.engine.runs import ACTIVATIONS, LABEL_ISSUES, METRICS, PRECOMPUTED, REFIT, Run
from luthier.engine.verdict import Refit, RunVerdict, judge_run
from luthier.errors import read_line_field
from luthier.evaluation.label_issues import LEAST_ROWS
from luthier.files import need_disk
from luthier.gate.checks.language import UNTRAINED
from luthier.models.networks.frozen_layer_cache import FrozenLayerCache, frozen_layers, is_frozen
from luthier.models.networks.heads import score_layer, scratch_rate
from luthier.models.networks.layers import layer_names
from luthier.models.networks.layouts import MediaLayout
from luthier.objectives.base import PreparedRows, RunStart
from luthier.objectives.preferences.references import ReferenceObjective, with_reference_logps
from luthier.objectives.reinforcement.scoring import write_replies
from luthier.plugins import PluginTable

if TYPE_CHECKING:
    from luthier.engine.train import Trainer

TEMPERATURES = tuple(2 ** (step / 10) for step in range(-20, 21))
"""Temperatures to choose from, 0.25 to 4."""
LEAST_GAIN = 2.0
"""Fewest nats of all held-out rows that a temperature must gain: 95 % of a likelihood ratio test."""
REPLY_TOKENS = 32
"""Maximum length of a reply during training, in tokens."""
PRIOR = 0.5
"""Standard deviation of the logarithm of a temperature before any row is seen."""


class TrainingStep:
    """A part of a run outside the training loop. Each method is called once per run, unless stated
    otherwise."""

    first_process_only: ClassVar[bool] = False
    """True if only the process that stores the model runs the step."""
    in_trials: ClassVar[bool] = True
    """True if trial runs, which store no model, run the step."""

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if ``job`` needs the step."""
        return True

    def before_training(self, trainer: Trainer) -> None:
        """Act on the network at the initial weights, at each start of a run, also on resume."""

    def after_evaluation(self, trainer: Trainer, step: int) -> None:
        """Act on the network after each measurement of the held-out rows."""

    def after_training(self, trainer: Trainer) -> None:
        """Act on the network with the best weights, after the optimizer's memory is free."""

    def before_storing(self, trainer: Trainer) -> None:
        """Decide about the model to store, in the storing process only."""


class Preparation(TrainingStep):
    """Computations of the objective with the network before the first step."""

    @torch.no_grad()
    def before_training(self, trainer: Trainer) -> None:
        """Prepare the objective, then precompute values for all epochs."""
        job, network, note = trainer.job, trainer.network, trainer.reporter.note
        objective, budget = job.data.objective, trainer.reading_budget
        network.model.eval()
        with trainer.clock.part("begin"):
            seen, mixed = job.data.train, job.data.mixed
            if network.is_stepless and mixed:
                seen = [seen[place] for place in one_pass(len(seen), mixed)]
            if fit := network.fit_rows(seen, budget):
                note(fit)
                prepared = PreparedRows(job.data.train, head_fitted=True)
            else:
                prepared = objective.prepare(_run_start(trainer, job))
        trainer.fitted_head, trainer.prepared_rows = prepared.head_fitted, prepared.examples
        trainer.separable_rows = prepared.separable
        trainer.is_final = network.is_stepless and prepared.head_fitted
        trainer.job = job = job.with_rows(trainer.prepared_rows)
        with trainer.clock.part("ahead"):
            rows = chain(job.data.train, job.data.validation)
            folder = trainer.run_folder.folder / PRECOMPUTED
            objective.precompute(network, rows, budget, folder, note)
        return_freed_memory()  # the objective may have closed a teacher


def _run_start(trainer: Trainer, job: TrainingJob) -> RunStart:
    """Return what an objective prepares from: the network, and the training rows of ``job``."""
    return RunStart(
        trainer.network,
        job.data.train,
        trainer.reading_budget,
        job.new_head,
        *count_rows(job),
        trainer.reporter.note,
        job.data.mixed,
    )


class Baselines(TrainingStep):
    """Simple baselines on the same rows, and rows with possibly wrong labels."""

    first_process_only, in_trials = True, False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if both splits have comparable rows and the time limit is not 0."""
        return all(job.data.compared) and bool(job.recipe.training.baseline_seconds)

    def before_training(self, trainer: Trainer) -> None:
        """Fit the baselines on the hidden states of the base model, before any weight moves."""
        if trainer.network.is_sharded:
            trainer.reporter.note("baselines skipped: one process cannot run shards alone")
            return
        job, media = trainer.job, trainer.job.chat.media
        train, held = job.data.compared

        def on_progress(done: int, total: int) -> None:
            what = "rows" if media is None else PLURAL[media.kind]
            trainer.reporter.progress(done, total, f"{what} read")

        with trainer.clock.part("baselines"):
            trainer.reporter.stage("Fitting simple baselines to compare with")
            fitted = fit_baselines(
                trainer.network,
                job.data.objective,
                job.data.objective.task,
                train,
                held,
                trainer.reading_budget,
                job.recipe.training.baseline_seconds,
                on_progress,
                label_issues=True,
                roots=(job.base.root,),
            )
        trainer.baselines = fitted
        if fitted is not None:
            trainer.reporter.note(fitted.describe())
        issues = fitted.label_issues if fitted is not None else None
        if trainer.checkpoint is None:  # a resumed run learns from the same rows
            trainer.run_folder.write_label_issues(issues.issues if issues is not None else ())
        return_freed_memory()

    def after_training(self, trainer: Trainer) -> None:
        """Measure the trained model on the same rows as the baselines."""
        if trainer.baselines is None:
            return
        data, budget = trainer.job.data, trainer.reading_budget
        with trainer.clock.part("baselines"):
            trainer.comparison = measure_tuned(
                trainer.network, data.objective, data.compared[1], trainer.baselines, budget
            )


class LabelIssueRows(TrainingStep):
    """Training rows with a label issue are left out, or get the likely label."""

    in_trials = False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if the recipe does not keep the rows."""
        return job.recipe.data.label_issues != "keep"

    def before_training(self, trainer: Trainer) -> None:
        """Change the training rows as ``data.label_issues`` says."""
        job, chosen = trainer.job, trainer.job.recipe.data.label_issues
        if job.label_issues is not None:
            return  # the rows of a refit are changed already
        # Only the first process has the file.
        records = trainer.group.first(
            [
                [r["file"], read_line_field(r), r["likely_label"]]
                for r in trainer.run_folder.read_label_issues()
            ]
        )
        likely = {(file, line): label for file, line, label in records}
        if not likely and (trainer.baselines is None or trainer.baselines.label_issues is None):
            trainer.reporter.note(
                f"warning: `data.label_issues={chosen}` has no effect, because the labels were "
                f"not checked. The check needs {LEAST_ROWS} rows of one label each, held-out rows "
                "and `training.baseline_seconds`"
            )
        if not likely:
            return
        rows, steps = len(job.data.train), job.steps
        trainer.job = trainer.stored_job = job.with_label_issues(likely)
        what = "get the likely label" if chosen == "relabel" else "are left out"
        if trainer.job.steps != steps:
            what += f", so the run has {trainer.job.steps:,} steps instead of {steps:,}"
        count = sum((row.file, row.line) in likely for row in job.data.learned)
        trainer.reporter.note(
            f"label issues: {count:,} of {rows:,} training rows {what} "
            f"({trainer.run_folder.folder / LABEL_ISSUES})"
        )


class AdaptationCalibration(TrainingStep):
    """Calibration of the adaptation by gradients of single rows."""

    def before_training(self, trainer: Trainer) -> None:
        """Calibrate the adaptation.

        A resumed run skips calibration, because the checkpoint stores the result. Objectives with a
        reference calibrate again: the checkpoint does not store the initial weights.
        """
        job = trainer.job
        if trainer.checkpoint is not None and not job.data.objective.uses_reference:
            return
        read_rows = row_gradients(
            trainer.network,
            job.data.objective,
            job.data.train,
            job.recipe.training,
            trainer.reporter,
        )

        def gradients(rows: int) -> Iterator[None]:
            trainer.calibration_rows += rows
            return read_rows(rows)

        with trainer.clock.part("calibrate"):
            job.recipe.adaptation.calibrate(trainer.network, gradients)
            return_freed_memory()


class FrozenLayers(TrainingStep):
    """Caching of the frozen lower layers, if rows are used more than once."""

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if each row is used at least twice on average, always with equal inputs."""
        seen = job.steps * (job.recipe.training.batch_size or 1)
        fixed = job.data.objective.same_each_epoch and not job.recipe.data.augmentation
        return fixed and seen >= 2 * job.rows

    def before_training(self, trainer: Trainer) -> None:
        """Compute the frozen layers for all rows and store the states in memory or on disk."""
        network, data, reporter = trainer.network, trainer.job.data, trainer.reporter
        media = network.layout if isinstance(network.layout, MediaLayout) else None
        if media is not None:
            frozen = is_frozen(network.model.base_model)
            count = len(layer_names(network.model)) if frozen else 0
        else:
            count = frozen_layers(network.model) if network.layout.flat else 0
        if not count or network.is_sharded:
            return
        with trainer.clock.part("ahead"):
            started = time.monotonic()
            rows = data.objective.views([*data.train, *data.validation], "fixed")
            size = sum(map(len, rows)) * network.width * network.dtype.itemsize
            file = None
            if size > available_memory() // 4:
                folder = trainer.run_folder.folder
                need_disk(folder, size, "keeping the activations of the frozen layers")
                file = folder / ACTIVATIONS
            reporter.stage(f"Computing the {count} frozen layers once for {len(rows):,} rows")
            size_note = (
                f"{size / 1e6:,.1f} MB of states are stored {'on disk' if file else 'in memory'}"
            )
            if media is not None:
                media.compute_ahead(network, rows, trainer.reading_budget, file)
                reporter.note(f"{size_note}; each epoch computes the head alone")
            else:
                # Before the first step, not during the first epoch: a cache filled while training
                # would depend on the step of a resume.
                network.frozen_cache = FrozenLayerCache.of(
                    network, count, rows, trainer.reading_budget, file
                )
                reporter.note(f"{size_note}; each epoch starts at layer {count + 1}")
            seconds = time.monotonic() - started
        trainer.first_lines["frozen_layers"] = {"layers": count, "seconds": seconds}


class ReferenceScores(TrainingStep):
    """Reference log-probabilities of repeated rows."""

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if the objective compares with a reference model."""
        return isinstance(job.data.objective, ReferenceObjective)

    @torch.no_grad()
    def before_training(self, trainer: Trainer) -> None:
        """Add reference log-probabilities to the held-out rows, and to training rows of several
        epochs.

        Training rows of a single epoch are scored in the training step, so that the first step is
        not delayed.
        """
        job = trainer.job
        # Steps of one epoch, rounded up: the last batch of an epoch may be smaller.
        repeats = job.steps > -(-job.rows // (job.recipe.training.batch_size or 1))
        if not (repeats or job.data.validation):
            return
        network, data, budget = trainer.network, job.data, trainer.reading_budget
        network.model.eval()
        with trainer.clock.part("ahead"):
            trainer.reporter.stage("Scoring rows with the reference model")
            held = with_reference_logps(network, data.validation, budget)
            train = with_reference_logps(network, data.train, budget) if repeats else data.train
        trainer.job = replace(job, data=replace(data, train=train, validation=held))


class Temperature(TrainingStep):
    """One factor for the class scores of a network without pretrained weights (Guo et al. 2017, "On
    Calibration of Modern Neural Networks").

    The factor is fitted to rows held out from the first training, and divides the score layer that
    is stored, after a refit too (docs/log/defaults.md).
    """

    in_trials = False

    def __init__(self) -> None:
        self.temperature = 1.0

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true for a classifier of rows with held-out rows."""
        classifies = job.data.objective.head().kind == "sequence_classification"
        return classifies and bool(job.data.validation)

    @torch.no_grad()
    def after_training(self, trainer: Trainer) -> None:
        """Choose the temperature with the lowest loss on the held-out rows."""
        network, data = trainer.network, trainer.job.data
        if scratch_rate(network.model) is None or (layer := score_layer(network.model)) is None:
            return
        network.model.eval()
        budget = trainer.reading_budget
        weights = {weight: weight.clone() for weight in layer.parameters()}

        def cost(temperature: float) -> float:
            for weight, learned in weights.items():
                weight.copy_(learned / temperature)
            loss = data.objective.parity_loss(network, data.validation, budget)
            # A normal prior: few rows that are all right would ask for infinite certainty.
            return len(data.validation) * loss + 0.5 * (math.log(temperature) / PRIOR) ** 2

        with trainer.clock.part("calibrate"):
            best = min(TEMPERATURES, key=cost)
            if cost(1.0) - cost(best) > LEAST_GAIN:
                self.temperature = best
            cost(1.0)  # restores the weights

    @torch.no_grad()
    def before_storing(self, trainer: Trainer) -> None:
        """Divide the score layer of the stored weights."""
        layer = score_layer(trainer.network.model) if self.temperature != 1 else None
        if layer is None:
            return
        for weight in layer.parameters():
            weight.div_(self.temperature)
        rows = len(trainer.job.data.validation)
        trainer.reporter.note(
            f"class scores are divided by {self.temperature:.2f}, fitted to {rows:,} held-out rows"
        )


class RefitTraining(TrainingStep):
    """Refit: a second training from the base on all rows. The weights of the refit are stored."""

    in_trials = False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if the recipe asks for a refit."""
        return bool(job.refit_steps)

    def after_training(self, trainer: Trainer) -> None:
        """Train on all rows for the number of passes that led to the best weights, if the first
        training learned.

        The refit has a folder and checkpoints, so that a killed run resumes the refit. The metrics
        of the refit are appended to the metrics of the run.
        """
        measured, group, clock = trainer.progress, trainer.group, trainer.clock
        if trainer.fitted_head and not measured.best_step and group.size == 1:
            self._fit_on_all_rows(trainer)
            return
        # Only the first process has the baselines that the verdict needs; all must take one branch.
        if not group.first(None if group.rank else judge(trainer).learned):
            why = "more rows would not improve the model"
            if not measured.best_step:
                why = "the weights from before training are the best"
            trainer.reporter.note(f"refit skipped: {why}")
            return
        # Two networks may not fit in memory, and the refit starts from the base.
        trainer.network.close()
        base, name = trainer.job.base.root, trainer.run_folder.name
        run = Run(base, name, rehearsal=trainer.run_folder.folder / REFIT)
        with clock.part("data"):
            job = prepare_refit(
                trainer.job,
                measured.best_step or 0,
                measured.step,
                group.size,
                run.checkpoint_bytes(),
            )
        trainer.reporter.stage(
            f"Refit: training again on all {job.data.counts['rows']:,} rows, for {job.until:,} steps"
        )
        # Only the first process has the refit's files.
        resume = bool(group.first(run.has_metrics()))
        run.begin(job.request(), resume=True)
        again = trainer.refit_trainer(job, run)
        again.first_lines["refit"] = {"row_count": job.data.counts["rows"]}
        again.learn(resume)
        metrics = MetricsFile(trainer.run_folder.folder / METRICS)
        # After the end of the refit: a killed run repeats the first training's last steps and
        # truncates the file.
        for line in again.lines:
            metrics.append(line)
        trainer.refit_lines = again.lines
        # The refit has learned the held-out rows, so a later run must count the rows as learned.
        trainer.run_folder.record_held_out(job.data.held_out)
        trainer.network, trainer.stored_job = again.network, again.stored_job
        trainer.progress = replace(
            again.progress,
            step=measured.step + again.progress.step,
            tokens=measured.tokens + again.progress.tokens,
            rows=measured.rows + again.progress.rows,
            seconds=measured.seconds + again.progress.seconds,
            best_loss=measured.best_loss,
        )
        held_out = trainer.job.data.counts["validation_rows"]
        trainer.refit = Refit(again.stored_job.data.counts["rows"], held_out, job.until)

    @torch.no_grad()
    def _fit_on_all_rows(self, trainer: Trainer) -> None:
        """Fit the stored logistic regression again, on all rows."""
        first = trainer.job
        with trainer.clock.part("data"):
            job = prepare_refit(first, 0, trainer.progress.step)
        trainer.network.model.eval()
        with trainer.clock.part("begin"):
            job.data.objective.prepare(_run_start(trainer, job))
        trainer.run_folder.record_held_out(job.data.held_out)
        trainer.stored_job = job
        counts = job.data.counts
        trainer.refit = Refit(counts["rows"], first.data.counts["validation_rows"], 0)


class Threshold(TrainingStep):
    """Settings of the objective derived from the trained network, for example a decision threshold."""

    @torch.no_grad()
    def before_storing(self, trainer: Trainer) -> None:
        """Complete the objective of the stored model."""
        job, network = trainer.stored_job, trainer.network
        held = trainer.job.data.validation
        network.model.eval()
        objective, budget = job.data.objective, trainer.reading_budget
        done = objective.finish(network, held, job.data.train, budget)
        if done.objective is objective:
            return
        reason = f"from the scores of {done.rows:,} rows" if done.rows else "usual for this network"
        before = dict(objective)
        changed = [(name, value) for name, value in done.objective if value != before[name]]
        trainer.reporter.settings([(f"objective.{name}", value, reason) for name, value in changed])
        if done.note:
            trainer.reporter.note(done.note)
        is_rough = len(held) < done.wanted or trainer.refit is not None
        if done.rows and is_rough and not network.is_stepless:
            why = f"{len(held):,} rows are held out, and {done.wanted:,} are needed"
            why += " (`data.validation_share`)"
            if trainer.refit is not None:
                why = "the refit trained on the held-out rows"
            trainer.reporter.note(
                "warning: the threshold comes from training rows, so more new rows will exceed "
                f"the threshold; {why}"
            )
        recipe = job.recipe.model_copy(update={"objective": done.objective})
        origin = {**job.origin, "recipe": recipe.plain()}
        data = replace(job.data, objective=done.objective)
        trainer.stored_job = replace(job, recipe=recipe, data=data, origin=origin)


class ShownReplies(TrainingStep):
    """Replies to a few held-out rows after each measurement, for people who follow the run."""

    first_process_only, in_trials = True, False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return true if the network generates text and held-out rows have prompts."""
        return bool(job.data.shown)

    def after_evaluation(self, trainer: Trainer, step: int) -> None:
        """Report the most likely replies. The random state of the training stays as it was."""
        network, rows = trainer.network, trainer.job.data.shown
        # A single process cannot run the shards of a network.
        if not trainer.reporter.shows_replies or network.is_sharded:
            return
        sampling = SamplingSpec(max_tokens=REPLY_TOKENS, temperature=0)
        written = write_replies(network, sampling, len(rows), [row.prompt_turns() for row in rows])
        # A prompt without room for a reply in the context is left out.
        replies = [
            ShownReply(
                prompt=row.prompt_turns()[-1].content,
                wanted=row.expected_reply() or "",
                reply=reply,
            )
            for row, reply in zip(rows, written, strict=True)
            if isinstance(reply, str)
        ]
        if replies:
            trainer.reporter.replies(step, replies)


class FinalVerdict(TrainingStep):
    """The verdict on the run, from its measurements."""

    def before_storing(self, trainer: Trainer) -> None:
        """Judge the measured training."""
        trainer.verdict = judge(trainer, trainer.refit)


STEPS: PluginTable[type[TrainingStep]] = PluginTable(
    "training_steps",
    TrainingStep,
    {
        # Before every step that may change weights: baselines describe the base model.
        "baselines": Baselines,
        # Before the head is fitted on the rows.
        "label_issues": LabelIssueRows,
        "preparation": Preparation,
        "shown_replies": ShownReplies,
        "calibration": AdaptationCalibration,
        "frozen_layers": FrozenLayers,
        "reference_scores": ReferenceScores,
        # Before the refit learns the held-out rows.
        "temperature": Temperature,
        "refit": RefitTraining,
        "threshold": Threshold,
        "verdict": FinalVerdict,
    },
)


def select_steps(
    job: TrainingJob, *, trial: bool = False, stores: bool = True
) -> list[TrainingStep]:
    """Return the steps of a run of ``job``, in order.

    A ``trial`` stores no model. ``stores`` is true in the process that stores the model.
    """
    return [
        step()
        for step in STEPS.values()
        if step.applies(job)
        and (step.in_trials or not trial)
        and (stores or not step.first_process_only)
    ]


def judge(trainer: Trainer, refit: Refit | None = None) -> RunVerdict:
    """Return the verdict on the measured training. ``refit`` is the second training, if any."""
    job = trainer.job
    report = job.data.report
    language = report.findings.examples.get(UNTRAINED.id) if report is not None else None
    baselines, comparison = trainer.baselines, trainer.comparison
    informed = baselines.best_informative if baselines is not None else None
    issues = baselines.label_issues if baselines is not None else None
    return judge_run(
        trainer.lines,
        job.data.objective.measure,
        job.recipe.training,
        job.steps,
        len(job.data.validation),
        job.rows / (job.recipe.training.batch_size or 1),
        trainer.fitted_head,
        uninformative=comparison is not None and comparison.uninformative,
        informed=informed.name if informed is not None else "",
        other_base=language[0].closest_fix if language else "",
        refit=refit,
        new_head=job.new_head,
        label_issues=issues.counts if issues is not None else None,
        learns_issues=job.recipe.data.label_issues == "keep",
    )


def count_rows(job: TrainingJob) -> tuple[int, int, int]:
    """Return the maximum number of rows used by training, by all measurements, and by the
    calibration."""
    training, rows = job.recipe.training, len(job.data.train)
    # The first measurement comes before the first step, the last after the last step.
    measurements = 1 + -(-job.steps // (training.evaluate_every or job.steps))
    calibrated = min(job.recipe.adaptation.calibration_rows, rows)
    return (
        job.steps * (training.batch_size or 1),
        measurements * len(job.data.validation),
        calibrated,
    )
