"""The training loop: batches, steps and time. Objectives define the loss, adaptations the trained
weights.

Each step selects the rows and merges the rows into token trees within a token budget. The
objective's loss is summed over all trees. The sum is divided once by the weight of the whole batch,
and the optimizer moves the weights.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from luthier.data.augmentation import RowChange
from luthier.data.loader import MixedSet, RowOrder
from luthier.engine.checkpoints import Checkpoints, TrainingProgress
from luthier.engine.embedding_rows import embedding_tables, sparse_gradients
from luthier.engine.machine import peak_memory
from luthier.engine.metrics import (
    SCORES,
    SHARES,
    MetricsFile,
    Reporter,
    best_measurement,
    chance_between,
    cost_of,
    deciding_measure,
    is_within_chance,
    without_rows,
)
from luthier.engine.optimizers import MasterAdamW, schedule_factor
from luthier.engine.timings import Clock
from luthier.errors import Diverged, Interrupted
from luthier.evaluation.significance import CHANCE
from luthier.models.formats.save import adapter_buffers
from luthier.models.networks.heads import head_weights
from luthier.models.networks.layers import layer_names, layer_positions
from luthier.models.networks.network import Network, TreeBatch
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.models.random_numbers import derive_seed, drawn_from, seed_torch
from luthier.models.sharding import gather_to_first, is_sharded, local_shard, shard_like
from luthier.objectives.base import Objective
from luthier.objectives.means import Means
from luthier.recipe import Training
from luthier.types import Example

_BEST, _BUFFER = "best.", "buffer."
MANY_HELD_OUT = 50
"""Minimum number of held-out rows for announcing the first measurement; long rows take minutes."""
ADVICE_EVERY = 10
"""Steps between two pieces of advice."""
ADVICE_LINES = 200
"""Number of recent training lines passed to the objective with each report."""


ROWS_FOR_PERFECT = 30
"""Minimum number of held-out rows for a perfect score to end a run. Runs with augmentation
continue: augmented rows are harder than the held-out rows (docs/log/media.md)."""

SMALL_LOSS = 1e-2
"""Share of the initial training loss at which the rows count as learned."""
FITTED_LOSS = 1.0
"""Minimum initial loss for :data:`SMALL_LOSS`, in nats: a trained head begins with a small loss."""
FALLS = 0.05
"""Minimum fall of the held-out loss, as a share, for a run to continue at a small training loss."""
LAST_STEPS = 10
"""Number of recent steps in the mean loss for :data:`SMALL_LOSS`."""


@dataclass
class Loop:
    """A training loop over encoded rows. Every ``None`` of ``training`` is filled in."""

    network: Network
    objective: Objective
    training: Training
    examples: Sequence[Example]
    validation: Sequence[Example]
    steps: int
    """Number of steps of the schedule."""
    checkpoints: Checkpoints
    metrics: MetricsFile
    reporter: Reporter
    mixed: tuple[MixedSet, ...] = ()
    """Sizes of the mixed-in sets, stored after the main set in ``examples``."""
    augmentation: RowChange | None = None
    samples: MetricsFile | None = None
    """File for text generated in training."""
    on_measured: Callable[[int], None] | None = None
    """Function to call with the step after each measurement."""
    clock: Clock = field(default_factory=Clock)
    """Clock for the time of steps, measurements and checkpoints."""
    until: int = 0
    """Step to stop after; 0 for the last step of the schedule."""
    steps_before: int = 0
    """Steps of an earlier training of the same run, added to every reported step."""
    all_steps: int = 0
    """Number of steps of all trainings of the run; 0 for a single training."""
    processes: ProcessGroup = ALONE
    """Processes that share the work of each step. Each process has a loop and takes the same
    decisions."""
    usual_rate: float = 0.0
    """Default learning rate for the run; 0 if unknown."""
    untrained_head: bool = False
    """True if the head starts from random weights."""
    fitted_head: bool = False
    """True if the head starts from logistic regression."""
    separable_rows: bool = False
    """True if logistic regression is right on training rows left out of its fit."""
    unfreeze_every: int | None = None
    """Steps after which the next lower layer starts to train; ``None`` trains all from step 1."""

    def __post_init__(self) -> None:
        # A refit stops early in the schedule of the first training, so `until` and `steps` differ.
        self.until = self.until or self.steps
        self.all_steps = self.all_steps or self.until
        training = self.training
        assert training.batch_size and training.learning_rate and training.micro_batch_tokens
        self.rate = training.learning_rate
        self.budget = training.micro_batch_tokens
        main = len(self.examples) - sum(each.rows for each in self.mixed)
        self.order = RowOrder(
            main, training.batch_size, training.seed, training.shuffle, self.mixed
        )
        model = self.network.model
        layers = layer_names(model) if training.layer_decay < 1 or self.unfreeze_every else []
        heads = head_weights(model)
        # Weight decay moves every row, and processes exchange dense gradients.
        whole = self.processes.size > 1 or self.network.is_sharded or training.weight_decay
        self._tables = {} if whole else embedding_tables(model)
        self.optimizer = MasterAdamW(
            model.named_parameters(),
            training,
            layers,
            heads,
            self.processes,
            self._tables,
        )
        self._layers = len(layers)
        named = [name for name, _ in model.named_parameters()]
        self._positions = layer_positions(named, layers) if layers else {}
        """Layer of each weight, counted from 1, if layers have rates of their own."""
        self._groups = self._weight_groups(heads)
        if self.objective.uses_reference:
            # Before any step and before `resume`: the reference is the initial model.
            self.network.remember_start()
        self.progress = TrainingProgress()
        self._upcoming: list[Example] | None = None
        """Rows of the next step, read ahead while the current step computes."""
        self._buffers = [*adapter_buffers(model).values()]
        """Trained buffers, such as statistics of norms. The first process decides, as in PyTorch's
        DDP."""
        self.best: dict[str, torch.Tensor] = {}
        self.measured: list[Mapping[str, Any]] = []
        """Measurements on the validation rows, in order."""
        # In memory: reading the metrics file for advice took 9 of 74 s in short runs
        # (docs/log/defaults.md).
        self.train_lines: deque[Mapping[str, Any]] = deque(maxlen=ADVICE_LINES)
        """Metrics of the last training steps."""
        self._advice = ""
        """Last advice of the objective; repeated advice is not printed."""

    def resume(self, progress: TrainingProgress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state of :meth:`Checkpoints.latest`."""
        self.progress = progress
        self.optimizer.restore(tensors)
        for name, buffer in adapter_buffers(self.network.model).items():
            buffer.copy_(tensors[f"{_BUFFER}{name}"])
        # Checkpoints contain whole tensors, so the number of processes may change on resume.
        self.best = {
            name: shard_like(tensors[f"{_BEST}{name}"], weight)
            for name, weight in self.optimizer.weights.items()
            if f"{_BEST}{name}" in tensors
        }
        # Truncate first, because steps after the checkpoint run again and must not be read below.
        self.truncate_files()
        # Row-level scores decide which weights are kept, and only the first process has the file.
        lines = self.processes.first(self.metrics.read(rows=True))
        self.measured = [line for line in lines if line["event"] == "validation"]
        self.train_lines.extend(line for line in lines if line["event"] == "train")

    def truncate_files(self) -> None:
        """Remove the lines written after the restored state. Training will write the lines again."""
        progress = self.progress
        for file, lines in (
            (self.metrics, progress.metrics_lines),
            (self.samples, progress.sample_lines),
        ):
            if file is not None and (lines or file.path.exists()):
                file.truncate(lines)

    def run(self) -> TrainingProgress:
        """Train to the end or until early stopping. Afterwards the network has the best weights."""
        self.network.group = self.processes
        try:
            with sparse_gradients(self._tables):
                return self._run()
        finally:
            self.network.group = ALONE
            for weight in self.optimizer.weights.values():
                weight.requires_grad_(True)
            # Drop the queue: images that wait to be read would delay the end of the process.
            self.network.layout.read_ahead(())

    def _run(self) -> TrainingProgress:
        if self.processes.size > 1:
            # Masters must be equal; calibration may differ in the last digits between machines.
            masters, weights = self.optimizer.masters, self.optimizer.weights
            self.processes.send_first([masters[n] for n, w in weights.items() if not is_sharded(w)])
            self.optimizer.publish()
        # The weights before training are a candidate too: a run that only harms keeps them.
        if self.progress.step == 0:
            if len(self.validation) >= MANY_HELD_OUT:
                self.reporter.stage(
                    f"Measuring {len(self.validation):,} held-out rows before training"
                )
            self.evaluate()
        with _stop_on_signal() as stopped:
            while self.progress.step < self.until and not self._patience_spent():
                self.step()
                last = self.progress.step == self.until
                every = self.training.evaluate_every or self.steps
                if last or self.progress.step % every == 0:
                    self.evaluate()
                # One process with a signal stops all; the rest would wait in the next exchange.
                if self.processes.any(stopped()):
                    # Before step 1 a checkpoint saves no work: a resume starts from the beginning.
                    if self.progress.step:
                        self.checkpoint()
                        # Barrier: no process may end before the checkpoint is on disk.
                        self.processes.first(None)
                    raise Interrupted(
                        f"stopped after step {self._run_step} of {self.all_steps}. Resume with "
                        "the same command and --resume"
                    )
                shards = self.processes.size if self.network.is_sharded else 1
                due = self.checkpoints.due(self.progress.step, shards * self.optimizer.bytes)
                # A checkpoint of shards is a collective call, so the first process's clock decides.
                if self.processes.first(due) if self.network.is_sharded else due:
                    self.checkpoint()
        if self.progress.step < self.until:
            self.reporter.note(self._why_it_stopped())
        if frozen := self._frozen_groups(self.progress.step - 1):
            never = f"{frozen} of {self._layers + 1} groups of layers"
            self.reporter.note(f"{never} stayed frozen. Lower `adaptation.unfreeze_every`")
        if self.best and self.progress.best_step != self.progress.step:
            for name, weight in self.optimizer.weights.items():
                local_shard(weight.data).copy_(self.best[name])
        return self.progress

    def step(self) -> float:
        """Run one optimizer step and return the duration in seconds."""
        started = time.monotonic()
        with self.clock.part("steps"):
            self._step()
        seconds = time.monotonic() - started
        self.progress.seconds += seconds
        return seconds

    def evaluate(self) -> None:
        """Measure the validation rows, and keep a copy of the weights if the weights are the best
        so far."""
        if not self.validation:
            return
        with self.clock.part("validation"):
            self._evaluate()
            if self.on_measured is not None:
                self.on_measured(self._run_step)

    def checkpoint(self) -> None:
        """Write the state for a resume."""
        with self.clock.part("checkpoints"):
            self._checkpoint()

    def _step(self) -> None:
        self.network.model.train()
        chosen = self._upcoming or self._rows(self.progress.step)
        started = time.monotonic()
        rate = self.rate * schedule_factor(
            self.training.schedule,
            self.progress.step,
            self.steps,
            self.training.warmup_ratio,
            self.training.warmup_steps,
            self.training.step_size,
            self.training.step_factor,
        )
        self._unfreeze()
        objective, limit = self.objective, self.training.max_gradient_norm
        self.network.done = self.progress.step / self.steps
        # Random numbers depend on seed and step alone, so checkpoints store no generator state.
        seed_torch(derive_seed(self.training.seed, self.progress.step))
        # Processes share the work of annotation, such as sampling and scoring.
        with torch.no_grad(), self.network.split_work():
            batches = objective.annotate(self.network, chosen, self.budget)
        self._upcoming = None
        if self.progress.step + 1 < self.until and not objective.contrasts_rows:
            # Contrastive objectives draw the views of a row within the step, not ahead of the step.
            self._upcoming = self._rows(self.progress.step + 1)
            # With several processes, most rows are read by another process.
            if self.processes.size == 1:
                self.network.layout.read_ahead(self._upcoming)
        metrics: dict[str, float] = {}
        turns, number = objective.turns(batches), 0
        # Each turn contains exchanges, so a process without a micro-batch takes part too.
        while self.processes.any((turn := next(turns, None)) is not None):
            loss, turn_metrics = self._backward(objective, turn or (), number)
            number += 1
            # If several turns report a metric, the last turn counts, as for the loss.
            metrics |= turn_metrics
            try:
                norm = self.optimizer.step(rate)
            except Diverged as error:
                raise Diverged(
                    f"{error} in step {self._run_step + 1}. {self._divergence_advice}",
                    rule="training.gradient",
                ) from error
        self.processes.send_first(self._buffers)
        seconds = time.monotonic() - started
        # A filler repeats a micro-batch and would count its tokens twice.
        counted = [batch.tree.examples for batch in batches if not batch.is_filler]
        own_tokens = sum(row.tokens for rows in counted for row in rows)
        tokens = int(self.processes.sum(own_tokens))
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.rows += len(chosen)
        progress.last_loss = loss
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        with self.network.split_work():
            report = objective.report(self.network, batches, [*self.train_lines])
        self.record(
            "train",
            loss=loss,
            learning_rate=rate,
            **self._rates_of_layers(rate),
            gradient_norm=norm,
            **({"gradient_clipped": float(norm > limit)} if limit else {}),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            **({"rows_per_second": len(chosen) / seconds} if chosen[0].media else {}),
            **metrics,
            **report.metrics,
        )
        if progress.step % ADVICE_EVERY == 0:
            if report.advice and not self._advice:
                self.reporter.note(report.advice)
            self._advice = report.advice
        if self.samples is not None:
            for record in report.samples:
                line = {"step": progress.step, **record}
                progress.sample_lines = self.samples.append(line)

    def _frozen_groups(self, step: int) -> int:
        """Return the number of layers, embeddings included, that are frozen in a 0-based step."""
        if not self.unfreeze_every:
            return 0
        return max(0, self._layers - max(0, step) // self.unfreeze_every)

    def _unfreeze(self) -> None:
        """Set which weights train in the current step (Howard & Ruder 2018): the top layer and all
        above, and one more layer after every ``unfreeze_every`` steps."""
        if self.unfreeze_every:
            frozen = self._frozen_groups(self.progress.step)
            for name, weight in self.optimizer.weights.items():
                weight.requires_grad_(self._positions[name] >= frozen)

    def _weight_groups(self, heads: Collection[str]) -> dict[str, str]:
        """Return a weight of each group with a learning rate of its own, from the bottom to the top;
        nothing if all rates are equal."""
        groups: dict[str, str] = {}
        for name in self.optimizer.weights:
            position = self._positions.get(name, 0)
            group = "all layers"
            if name in heads or position > self._layers:
                group = "head"
            elif self._positions:
                group = f"layer {position}" if position else "embeddings"
            groups[group] = name
        shares = {self.optimizer.shares[name] for name in groups.values()}
        return groups if len(shares) > 1 or self.unfreeze_every else {}

    def _rates_of_layers(self, rate: float) -> dict[str, dict[str, float]]:
        """Return the rates of the step by group for the metrics, if the rates differ."""
        rates = {
            group: rate * self.optimizer.shares[name] * self.optimizer.weights[name].requires_grad
            for group, name in self._groups.items()
        }
        return {"rates": rates} if rates else {}

    def _rows(self, step: int) -> list[Example]:
        """Return the augmented rows of a 0-based step: a function of seed and step alone."""
        seed = self.training.seed
        chosen = [self.examples[index] for index in self.order.batch(step)]
        if not self.augmentation:
            return chosen
        return [
            self.augmentation.change(example, np.random.default_rng([seed, step, place]))
            for place, example in enumerate(chosen)
        ]

    def _backward(
        self, objective: Objective, batches: Sequence[TreeBatch], turn: int
    ) -> tuple[float, dict[str, float]]:
        """Compute the gradients of the mean loss over the micro-batches of all processes. Return
        the mean loss and the objective's metrics."""
        # fsum: the sum must not depend on the order of the micro-batches.
        own_weight = math.fsum(batch.weight for batch in batches if not batch.is_filler)
        weight = self.processes.sum(own_weight)
        means = Means()
        for batch in batches:
            # Dropout depends on the place of the micro-batch, not on the process that computes it.
            seed = derive_seed(self.training.seed, self.progress.step, turn, batch.place)
            with drawn_from(seed, self.network.device):
                loss = objective.loss(self.network, batch)
                # The only division: all micro-batches then sum to the gradient of the global mean.
                # A filler batch (sharded training) runs the same collectives with a gradient of 0.
                (loss.total / (math.inf if batch.is_filler else weight)).backward()
            self.optimizer.collect()
            if not batch.is_filler:
                means.add(loss, batch.weight, batch.place)
        self.optimizer.add_up()
        metrics = means.of_all(self.processes).values()
        mean = metrics.pop("loss")
        if not math.isfinite(mean):
            raise Diverged(
                f"the loss of step {self._run_step + 1} is {mean}. {self._divergence_advice}"
            )
        return mean, metrics

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.network.model.eval()
        measured = self.objective.validation_metrics(self.network, self.validation, self.budget)
        progress = self.progress
        if self.untrained_head and not progress.step:
            measured["untrained_head"] = True
        # Only the measures that decide must be finite; `record` omits other non-finite values.
        if not all(math.isfinite(measured[name]) for name in {"loss", self.objective.measure}):
            advice = self._divergence_advice
            if progress.step == 0:
                advice = "Check for extreme targets, or set `training.precision=float32`"
            raise Diverged(
                f"the validation measurement at step {progress.step} is not finite. {advice}",
                rule="training.validation",
            )
        progress.validation_loss = measured["loss"]
        measure = deciding_measure([*self.measured, measured], self.objective.measure)
        before = min((cost_of(line, measure) for line in self.measured), default=math.inf)
        self.measured.append(measured)
        best = best_measurement(self.measured, measure)
        better = best is measured
        if better:
            progress.best_loss, progress.best_step = measured["loss"], progress.step
            # The weights that were measured: half the size of the masters. Training never continues
            # from this copy.
            self.best = {n: local_shard(w.data).clone() for n, w in self.optimizer.weights.items()}
        min_delta = self.training.min_delta
        # Relative, because losses and scores have different scales.
        gained = better and (
            not min_delta
            or math.isinf(before)
            or cost_of(measured, measure) < before - min_delta * abs(before)
        )
        if gained:
            progress.worse = 0
        elif min_delta or not is_within_chance(measured, best, measure):
            progress.worse += 1
        self.record("validation", **measured, best=progress.best_loss, best_step=progress.best_step)

    @property
    def _divergence_advice(self) -> str:
        """Advice for non-finite numbers."""
        if self.rate > self.usual_rate > 0:
            return f"Lower the learning rate of {self.rate:g} (default: {self.usual_rate:.2g})"
        return f"Lower the learning rate of {self.rate:g}, or check for rows with extreme content"

    def record(self, event: str, **values: Any) -> None:
        """Add a line to the metrics file and report the line."""
        # JSON has no literal for a non-finite number, such as the mean of no rows.
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        line = {"event": event, "step": self._run_step, **finite}
        if self.objective.measure in line:
            line["measure"] = self.objective.measure
        line["memory_bytes"] = peak_memory(self.network.device)
        self.progress.metrics_lines = self.metrics.append(line)
        if event == "train":
            self.train_lines.append(line)
        self.reporter.metrics(without_rows(line), self.all_steps)

    @property
    def _run_step(self) -> int:
        """Step number in reports and files, counted over both trainings of a refit."""
        return self.steps_before + self.progress.step

    def _checkpoint(self) -> None:
        if self.processes.rank and not self.network.is_sharded:
            return  # every process has the same state
        tensors = self.optimizer.state()
        weights = self.optimizer.weights
        tensors |= gather_to_first(
            (f"{_BEST}{n}", value, weights[n]) for n, value in self.best.items()
        )
        if self.processes.rank:
            return  # the first process has gathered the shards
        buffers = adapter_buffers(self.network.model)
        tensors |= {f"{_BUFFER}{name}": value for name, value in buffers.items()}
        self.checkpoints.write(self.progress, tensors)

    def _loss_spent(self) -> bool:
        """Return true if the training loss is near 0 and the held-out rows show no clear gain.

        Without held-out rows, the training loss decides. Only for losses of scores, which are
        cross-entropies: other losses may gain below any share of the initial loss.
        """
        measure = self.objective.measure
        if measure not in SHARES:
            return False
        losses = [line["loss"] for line in self.train_lines][-LAST_STEPS:]
        first = self.progress.first_loss or 0.0
        start = first if self.untrained_head else max(first, FITTED_LOSS)
        if len(losses) < LAST_STEPS or math.fsum(losses) > SMALL_LOSS * start * LAST_STEPS:
            return False
        if not self.validation:
            return True
        if self.progress.step % (self.training.evaluate_every or self.steps):
            return False  # not measured since the last step
        *before, last = self.measured
        if not before or last["loss"] < (1 - FALLS) * min(line["loss"] for line in before):
            return False
        best = min(before, key=lambda line: cost_of(line, measure))
        gain = cost_of(best, measure) - cost_of(last, measure)
        return not cost_of(last, measure) or gain <= chance_between(best, last, measure)

    def _start_suffices(self) -> bool:
        """Return true if even a perfect score would be within chance of the logistic regression.

        With few held-out rows, the training rows must be separable. For a run with a refit only:
        with few rows, longer training gained nothing and took three times as many steps
        (docs/log/defaults.md).
        """
        if not self.fitted_head or not self.training.refit or self.augmentation:
            return False
        rows = len(self.validation)
        if not self.measured:
            return False
        wrong = cost_of(self.measured[0], self.objective.measure) * rows
        if self.separable_rows and not wrong:
            return True
        if rows < ROWS_FOR_PERFECT or len(self.measured) < 2:
            return False
        # w rows that become right differ by w +- sqrt(w).
        return wrong <= CHANCE * math.sqrt(wrong)

    def _patience_spent(self) -> bool:
        """Return true if training ends early: ``patience`` measurements worse than the best, or
        nothing left to gain."""
        patience, measure = self.training.patience, self.objective.measure
        # A refit repeats the number of passes of the first training.
        if not patience or self.steps_before:
            return False
        if self._loss_spent() or self._start_suffices():
            return True
        last = self.measured[-patience:]
        perfect = len(last) == patience and not any(cost_of(line, measure) for line in last)
        enough = len(self.validation) >= ROWS_FOR_PERFECT and measure in SCORES
        enough = enough and not self.augmentation
        return self.progress.worse >= patience or (perfect and enough)

    def _why_it_stopped(self) -> str:
        """Return the note about early stopping."""
        patience, best = self.training.patience, self.progress.best_step or 0
        ends = f"stopped early after step {self._run_step} of {self.steps_before + self.until}: "
        to_end = "`training.patience=0` trains to the end"
        if self._loss_spent():
            held = " and the held-out rows show no gain" if self.validation else ""
            return f"{ends}the training loss is near 0{held}. {to_end}"
        if self._start_suffices():
            right = "all rows left out of its fit"
            if not self.separable_rows:
                right = "nearly all held-out rows"
            return f"{ends}the logistic regression is right on {right}. {to_end}"
        if self.progress.worse < patience:
            return f"{ends}all held-out rows are right. {to_end}"
        since = f"step {best + self.steps_before}" if best else "before training"
        return f"{ends}no gain since {since}. {to_end}"


def row_gradients(
    network: Network,
    objective: Objective,
    examples: Sequence[Example],
    training: Training,
    reporter: Reporter,
) -> Callable[[int], Iterator[None]]:
    """Return the gradient source for :meth:`Adaptation.calibrate`: gradients of single rows, in
    training order.

    Objectives that contrast rows yield gradients of whole batches. Nothing is random.
    """

    assert training.batch_size and training.micro_batch_tokens
    budget = training.micro_batch_tokens
    size = training.batch_size if objective.contrasts_rows else 1
    order = RowOrder(len(examples), training.batch_size, training.seed, training.shuffle)

    def gradients(rows: int) -> Iterator[None]:
        network.model.eval()
        steps = range(order.steps_per_epoch)
        whole = (examples[index] for step in steps for index in order.batch(step))
        # A single row may have no view to learn from, such as a text without a label.
        chosen = list(islice((row for row in whole if objective.views([row], "fixed")), rows))
        reporter.stage(f"Computing gradients of {len(chosen):,} rows to select the trained weights")
        for start in range(0, len(chosen), size):
            with torch.no_grad():
                batches = objective.annotate(network, chosen[start : start + size], budget)
            for turn in objective.turns(batches):
                for batch in turn:
                    objective.loss(network, batch).total.backward()
            yield
            # The caller reads the gradients while the generator is suspended at `yield`.
            network.model.zero_grad(set_to_none=True)

    return gradients


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag for the training loop. A second signal stops at once."""
    stopped = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    try:
        before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where Python allows no signal handlers
        before = {}
    try:
        yield lambda: stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
