"""Cells of a study: trainings of a grid, each in a process, with the measurements.

The first process of a cell trains and stores the model in the cell's folder. A second process,
without the memory of the training, measures the stored model. The measurements stay in
``studies/.cells/HASH``, by the SHA-256 of recipe, data, machine and program, so a later study
reuses them. An interrupted training resumes from its checkpoint. The model itself is deleted.

Each process is ``python -m luthier.workflows.study.cells FOLDER STAGE``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import __version__
from luthier.data.tree import READING_BUDGET
from luthier.engine.job import prepare_job
from luthier.engine.machine import choose_machine, open_network
from luthier.engine.metrics import SHARES, MetricsFile, Reporter, best_measurement
from luthier.engine.report_file import ReportFile
from luthier.engine.runs import METRICS, Result, Run
from luthier.engine.train import store_trial
from luthier.errors import Diverged, Interrupted, RefusedInput
from luthier.evaluation.significance import RowScores, as_gain
from luthier.files import (
    cached_sha256_of,
    lock,
    luthier_home,
    read_json,
    sha256_of,
    write_json,
)
from luthier.library.folders import RUN_RESULT
from luthier.library.models import StoredModel, find
from luthier.models.manifest import Manifest
from luthier.objectives.base import predicts
from luthier.processes import on_stdin_end, python_command
from luthier.recipe import Recipe, portable
from luthier.workflows.child_processes import (
    REPORTS,
    ChildProcess,
    ProcessRunner,
    Resources,
    run_processes,
)
from luthier.workflows.latency import measure_latency
from luthier.workflows.study.grid import TAUGHT
from luthier.workflows.study.prompts import with_prompts
from luthier.workflows.study.starts import after_text, student_recipe

if TYPE_CHECKING:
    from luthier.inference.generation import Generator
    from luthier.inference.prediction import Predictor
    from luthier.models.networks.network import Network
    from luthier.objectives.base import Objective
    from luthier.types import Example

REQUEST, OUTCOME, TRAINED = "cell.json", "outcome.json", "trained.json"
_PROCESS_LOCK = ".process.lock"
TIMED = 20
"""Timed answers."""
REPLY_TOKENS = 32
"""Tokens of a timed reply."""


@dataclass(frozen=True)
class Cell:
    """A training of a study."""

    recipe: Recipe
    before: str | None = None
    """File to train on first."""
    home: Path | None = None
    """Folder of all cells; by default ``studies`` in the home folder."""
    forgetting: bool = False
    """True to measure the drift from the base."""
    earlier: str | None = None
    """File with rows of an earlier task, to measure before and after the training."""
    media: str | None = None
    """Hash of images and sounds that the rows name."""
    prompts: str | None = None
    """File with instructions: the model and its base are measured with several prompts."""
    student: str | None = None
    """``taught`` for a student that learns from the teacher of ``recipe``, ``rows`` for the same
    student without the teacher."""

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that determines the measurements, as JSON values."""
        recipe, training = self.recipe, self.recipe.training
        named = [Path(path) for path in (self.before, self.earlier, self.prompts) if path]
        others = {} if recipe.objective is None else recipe.objective.other_models
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "home"},
            "recipe": portable(recipe),
            "base": find(recipe.base).content_hash,
            "others": {name: find(other).content_hash for name, other in others.items()},
            "data": [
                cached_sha256_of(path) if path.is_file() else sha256_of(path)
                for path in (*recipe.data.files, *named)
            ],
            # Times and bits depend on the processor, so a cell of another machine is no result of
            # this one.
            "machine": choose_machine(training.precision, training.threads).reason,
            "luthier": __version__,
        }

    @cached_property
    def folder(self) -> Path:
        """Folder of the measurements."""
        plain = json.dumps(self.request, sort_keys=True).encode()
        home = self.home or luthier_home() / "studies"
        return home / ".cells" / hashlib.sha256(plain).hexdigest()[:20]


@dataclass(frozen=True)
class CellResult:
    """Measurements of a cell."""

    measure: str = "loss"
    """``loss`` or a score."""
    value: float | None = None
    """Measurement of the best weights on the held-out rows; ``None`` for a failed cell."""
    error: float = 0.0
    """Standard error of the measurement, by the held-out rows."""
    rows: Mapping[str, Any] | None = None
    """Measurement by row, for :meth:`RowScores.read`."""
    recipe: Mapping[str, Any] | None = None
    """The recipe of the training, with the custom models that it started from."""
    order: str = ""
    """Key of the held-out rows in their order; rows of equal keys are pairs."""
    start: float | None = None
    """Measurement before training; ``None`` for an untrained head."""
    seconds: float = 0.0
    """Duration of the training, in seconds."""
    processor_seconds: float = 0.0
    """Processor time of the training, without the time of killed processes."""
    peak_memory_bytes: int = 0
    trained_weights: int = 0
    saved_bytes: int = 0
    training_rows: int = 0
    steps: int = 0
    kept_step: int | None = None
    """Step of the measured weights: 0 for the weights from before training."""
    batch_size: int = 0
    warmup_ratio: float = 0.0
    milliseconds: float | None = None
    """Mean time of an answer, one at a time; ``None`` for models that generate images."""
    forgotten: float | None = None
    """Drift from the base, in nats per token."""
    forgotten_error: float = 0.0
    """Standard error of the drift, by the tokens."""
    earlier: float | None = None
    """Change of the score of an earlier task; negative if worse."""
    earlier_error: float = 0.0
    """Standard error of the change, by the rows of the earlier task."""
    earlier_start: float | None = None
    """Score of the earlier task before training."""
    earlier_is_share: bool = False
    """True if the score of the earlier task is in percent."""
    earlier_remarks: Sequence[str] = ()
    """Limits of the score of the earlier task."""
    verdict: str = ""
    """Outcome of the run, such as ``learned``."""
    reason: str = ""
    """Reason of a failure; empty for a measured cell."""
    is_share: bool = False
    """True for the score of a grader from 0 to 1."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt, for several prompts."""
    contenders: Mapping[str, Mapping[str, Any]] | None = None
    """Changed fields of each prompt with the model or its base, by name."""


class CellRunner(ProcessRunner):
    """Runs the processes of cells on this machine."""

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """Return the number of trainings at the same time, and the threads of each."""
        parallel = parallel or 1
        cores = recipe.training.threads or os.cpu_count() or 1
        return parallel, max(1, cores // parallel)

    def resources(self, recipe: Recipe) -> Resources:
        """Return the resources of a training; not used on this machine."""
        return Resources()


def measured_result(cell: Cell) -> CellResult | None:
    """Return the measurements of an earlier study; ``None`` for a missing or failed cell."""
    path = cell.folder / OUTCOME
    found = CellResult(**read_json(path)) if path.is_file() else None
    return None if found is None or found.reason else found


def run_cells(cells: Sequence[Cell], reporter: Reporter, runner: CellRunner) -> list[CellResult]:
    """Train ``cells`` at the same time, measure one after the other, and return the outcomes.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM; a repeated call resumes.
    """
    by_folder = {cell.folder: cell for cell in cells}
    with ExitStack() as locks:
        # Sorted, so that two studies that share cells cannot wait for each other.
        for folder in sorted(by_folder):
            locks.enter_context(lock(folder / ".lock", wait=True))
        # A study at the same time may have measured some.
        missing = {f: c for f, c in by_folder.items() if measured_result(c) is None}
        for folder, cell in missing.items():
            # A process of a killed study is about to stop.
            with lock(folder / _PROCESS_LOCK, wait=True):
                (folder / OUTCOME).unlink(missing_ok=True)
            write_json(folder / REQUEST, cell.request)
        _run_stage(missing, "train", reporter, runner)
        for folder, cell in missing.items():
            if not (folder / OUTCOME).is_file():  # the training may have failed
                _run_stage({folder: cell}, "measure", reporter, runner)
            _clean(folder)
    return [CellResult(**read_json(cell.folder / OUTCOME)) for cell in cells]


def _clean(folder: Path) -> None:
    """Remove model and checkpoints, unless only the measurement failed."""
    outcome = CellResult(**read_json(folder / OUTCOME))
    if not outcome.reason or not (folder / RUN_RESULT).is_file():
        Run("", folder.name, rehearsal=folder).drop_working_files()
        shutil.rmtree(folder / "model", ignore_errors=True)
        for name in (RUN_RESULT, TRAINED):
            (folder / name).unlink(missing_ok=True)


class _Progress(Reporter):
    """Passes on progress alone: the notes of a run would be repeated for each cell."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def receive(self, method: str, *arguments: Any) -> None:
        """Pass on measurements and progress."""
        if method in ("metrics", "progress"):
            getattr(self.outer, method)(*arguments)


def _run_stage(
    cells: Mapping[Path, Cell], stage: str, reporter: Reporter, runner: CellRunner
) -> None:
    processes = [
        ChildProcess(
            runner,
            python_command("luthier.workflows.study.cells", str(folder), stage),
            runner.resources(cell.recipe),
            folder,
            "resumes after its last checkpoint",
        )
        for folder, cell in cells.items()
    ]

    def forward() -> bool:
        if len(processes) == 1:
            processes[0].reports.forward(_Progress(reporter))
        return False

    try:
        codes = run_processes(processes, reporter, forward)
    except Interrupted:
        text = "Stopped. Run the same command with `--resume` to continue."
        raise Interrupted(text) from None
    for process, code in zip(processes, codes, strict=True):
        if code:
            write_json(process.work / OUTCOME, asdict(CellResult(reason=process.reason(code))))


def _validation_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the validation measurements of the training in ``folder``."""
    lines = MetricsFile(folder / METRICS).read(rows=True)
    return [line for line in lines if line["event"] == "validation"]


def _train(folder: Path, reporter: Reporter) -> None:
    request, path = read_json(folder / REQUEST), folder / TRAINED
    earlier = read_json(path)["processor_seconds"] if path.is_file() else 0.0
    recipe = Recipe.parse(request["recipe"])
    if request["student"]:  # the time of the teacher's training is not the student's
        recipe = student_recipe(recipe, request["student"] == TAUGHT, reporter)
    began = time.process_time()
    try:
        if request["before"]:
            recipe = after_text(recipe, request["before"], reporter)
        store_trial(recipe, folder, reporter)
    # Also after an error or an interrupt, so that the time of failed attempts counts.
    finally:
        spent = earlier + time.process_time() - began
        write_json(path, {"processor_seconds": spent, "recipe": portable(recipe)})


def _measure(folder: Path, reporter: Reporter) -> None:
    from luthier.workflows.earlier_task import measure_earlier_task
    from luthier.workflows.forgetting import measure_forgetting

    request, trained = read_json(folder / REQUEST), read_json(folder / TRAINED)
    recipe = Recipe.parse({**request["recipe"], "base": trained["recipe"]["base"]})
    result = Result.parse(read_json(folder / RUN_RESULT))
    parent = find(recipe.base)
    manifest = Manifest.read(folder / "model")
    stored = StoredModel(
        manifest.id, folder / "model", manifest, parent if manifest.saved == "adapter" else None
    )
    lines = _validation_lines(folder)
    measure = lines[0].get("measure", "loss")
    best = best_measurement(lines, measure)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    fixed = Run("", folder.name, rehearsal=folder).read_request()
    job = prepare_job(recipe, parent, machine, Reporter(), fixed)
    opened = _open(stored)
    if request["student"] and opened is not None:
        # The loss of a taught student is a divergence: both students are measured as the teacher is.
        objective, validation = job.data.objective, job.data.validation
        measure = objective.measure
        lines = [
            objective.validation_metrics(network, validation, READING_BUDGET)
            for network in (open_network(parent), opened.network)
        ]
        best = lines[-1]
    rows = best.get("rows", {}).get(measure)
    if rows is None and measure == "loss":
        network = open_network(stored) if opened is None else opened.network
        rows = _row_losses(network, job.data.objective, job.data.validation)
    milliseconds = None if opened is None else _milliseconds(opened, job.data.validation)
    if opened is not None:
        opened.network.close()
    base, forgetting = find(request["recipe"]["base"]), dict[str, Any]()
    if request["forgetting"]:
        kl = measure_forgetting(stored, base).drift.kl
        forgetting |= {"forgotten": kl.value, "forgotten_error": kl.error}
    if request["earlier"]:
        found = measure_earlier_task(stored, base, request["earlier"])
        (change,) = found.changes
        difference = found.differences[change.name]
        forgetting |= {
            "earlier": as_gain(change.measure, difference.value),
            "earlier_error": difference.error,
            "earlier_start": change.base.value,
            "earlier_is_share": change.measure in SHARES or change.base.is_share,
            # The tuned model has a name of its own in each cell.
            "earlier_remarks": [r for r in found.remarks if not r.startswith(f"{stored.id}:")],
        }
    training = job.recipe.training
    # The metrics file has minus the reward, because the engine minimizes.
    sign = -1.0 if measure == "reward" else 1.0
    field = "loss" if measure == "reward" else measure
    outcome = CellResult(
        measure=measure,
        value=sign * best[field],
        error=best.get(f"{measure}_error", 0.0) if rows is None else RowScores.read(rows).error,
        rows=rows,
        recipe=trained["recipe"],
        order=_order(job.data.validation),
        start=None if lines[0].get("untrained_head") else sign * lines[0][field],
        seconds=result.seconds,
        processor_seconds=trained["processor_seconds"],
        peak_memory_bytes=result.peak_memory_bytes,
        trained_weights=result.trained_weights,
        saved_bytes=result.saved_bytes,
        training_rows=result.rows,
        steps=result.steps,
        kept_step=best.get("step"),
        batch_size=training.batch_size or 0,
        warmup_ratio=training.warmup_ratio or 0.0,
        milliseconds=milliseconds,
        **forgetting,
        verdict="" if result.verdict is None else result.verdict.outcome,
    )
    if request["prompts"]:
        outcome = with_prompts(outcome, job, stored, parent, request["prompts"], reporter)
    write_json(folder / OUTCOME, asdict(outcome))


def _order(examples: Sequence[Example]) -> str:
    """Return a key of the rows in their order, equal for equal tokens."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.ids_T.tobytes())
    return digest.hexdigest()[:16]


def _open(stored: StoredModel) -> Generator | Predictor | None:
    """Load a model that answers; ``None`` for a model that generates images."""
    from luthier.inference.generation import Generator
    from luthier.inference.prediction import Predictor

    if stored.writes:
        return Generator.open(stored)
    return Predictor.open(stored) if predicts(stored.objective) else None


def _row_losses(
    network: Network, objective: Objective, examples: Sequence[Example]
) -> dict[str, Any] | None:
    """Return the loss of each row, for objectives whose loss is a mean over rows."""
    import torch

    # The loss of such a row depends on the rows next to it, or on another network.
    if objective.contrasts_rows or objective.other_models:
        return None
    parts, weights = [], []
    with torch.no_grad():
        for example in examples:
            batches = objective.annotate(network, [example], READING_BUDGET)
            parts.append(sum(float(objective.loss(network, batch).total) for batch in batches))
            weights.append(sum(batch.weight for batch in batches))
    return RowScores.of(parts, weights, is_share=False).plain()


def _milliseconds(opened: Generator | Predictor, examples: Sequence[Example]) -> float | None:
    """Return the mean time of an answer in milliseconds, one answer at a time."""
    from luthier.evaluation.parity import generate_greedily, greedy_prompts
    from luthier.inference.generation import Generator

    if isinstance(opened, Generator):
        prompts = greedy_prompts(examples, TIMED, opened.context - REPLY_TOKENS)[:TIMED]
        answers: list[Callable[[], object]] = [
            partial(generate_greedily, opened.backend, [each], REPLY_TOKENS) for each in prompts
        ]
    else:
        answers = [partial(opened.read, [each]) for each in examples[:TIMED]]
    if not answers:  # no prompt leaves room for a reply
        return None
    seconds = measure_latency({"model": lambda: [answer() for answer in answers]})
    return float(1000 * seconds["model"] / len(answers))


_STAGES: Mapping[str, Callable[[Path, Reporter], None]] = {"train": _train, "measure": _measure}


def main(folder: Path, stage: str) -> None:
    """Carry out a stage of the cell in ``folder``. A refused recipe is the cell's outcome."""
    on_stdin_end(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with lock(folder / _PROCESS_LOCK, wait=True):
            _STAGES[stage](folder, ReportFile(folder / REPORTS))
    except (RefusedInput, Diverged) as error:
        write_json(folder / OUTCOME, asdict(CellResult(reason=str(error))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
