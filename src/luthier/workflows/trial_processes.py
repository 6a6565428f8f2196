"""Processes of a search: its trials side by side, and on a cluster the run of the best as well.

Each is ``python -m luthier.workflows.trial_processes FOLDER NUMBER``. It holds the lock of its
folder, so that one left over by a killed search ends before the next begins there, and it stops at
a checkpoint when the process that started it is gone. How a trial ended it writes to
``outcome.json``; only the search itself tells the study. One that is killed is started again, and
goes on from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cancellation import on_stdin_end
from luthier.child_python import python_command
from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportFile
from luthier.engine.runs import METRICS
from luthier.errors import Interrupted, LuthierError, RefusedInput
from luthier.files import lock, read_json, write_json
from luthier.recipe import Recipe
from luthier.workflows.child_processes import (
    REPORTS,
    ChildProcess,
    ProcessRunner,
    Resources,
    run_processes,
)
from luthier.workflows.space import with_settings
from luthier.workflows.trials import PLACE, TrialOutcome, Watch, carry_out, open_study, trial_folder
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    import optuna

BEST = "best"
"""Folder and name of the run of the best."""
OUTCOME = "outcome.json"
_REQUEST = "trials.json"


class TrialRunner(ProcessRunner):
    """Where the processes of a search run: on this machine, as its children.

    Where a runner has a ``name``, as ``search.json`` has it, every run of the search is a process,
    the first trial and that of the best among them.
    """

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """How many trials are a round, ``parallel`` where it is given, and the threads of each."""
        parallel = parallel or 1
        cores = recipe.training.threads or os.cpu_count() or 1
        return parallel, max(1, cores // parallel)

    def resources(self, recipe: Recipe) -> Resources:
        """What a process needs that carries out ``recipe``; here nobody asks."""
        return Resources()


def _process(
    runner: TrialRunner, folder: Path, name: str, work: Path, recipe: Recipe
) -> ChildProcess:
    """A process for the trial number ``name`` of the study in ``folder``, or the best; in
    ``work``."""
    process = python_command("luthier.workflows.trial_processes", str(folder), name)
    goes_on = "goes on after its last checkpoint"
    return ChildProcess(runner, process, runner.resources(recipe), work, goes_on)


def side_by_side(
    folder: Path,
    recipe: Recipe,
    trials: Sequence[optuna.Trial],
    runner: TrialRunner,
    reporter: Reporter,
) -> list[TrialOutcome]:
    """Carry out trials at once, each in a process of its own; how they ended, in the same order.

    Raises:
        RefusedInput: by the first trial of a search, whose settings are the recipe's own.
        Interrupted: on Ctrl-C or SIGTERM, after each of them wrote a checkpoint.
    """
    _write_request(folder, recipe)
    processes = [
        _process(
            runner,
            folder,
            str(trial.number),
            _folder(folder, trial),
            with_settings(recipe, trial.params),
        )
        for trial in trials
    ]
    codes = _run(processes, reporter)
    for process, code in zip(processes, codes, strict=True):
        if code or not (process.work / OUTCOME).is_file():
            raise _failure(process, code)
    outcomes = [TrialOutcome(**read_json(process.work / OUTCOME)) for process in processes]
    for process, outcome in zip(processes, outcomes, strict=True):
        if outcome.state == "refused":
            (process.work / OUTCOME).unlink()  # so that it is tried anew where the search is
            raise RefusedInput(outcome.reason)
    return outcomes


def run_best(folder: Path, recipe: Recipe, runner: TrialRunner, reporter: Reporter) -> None:
    """Have the best recipe of the search in ``folder`` tuned by a process of ``runner``.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after it wrote a checkpoint.
    """
    work = folder / BEST
    if (work / OUTCOME).is_file():
        return
    _write_request(folder, recipe)
    process = _process(runner, folder, BEST, work, recipe)
    [code] = _run([process], reporter)
    if code or not (work / OUTCOME).is_file():
        raise _failure(process, code)


def _run(processes: Sequence[ChildProcess], reporter: Reporter) -> list[int]:
    """Run processes to their ends; their exit statuses."""

    def hand_on() -> bool:
        if len(processes) == 1:
            processes[0].reports.hand_on(reporter)
        return False

    try:
        return [code or 0 for code in run_processes(processes, reporter, hand_on)]
    except Interrupted:
        again = "stopped; the same command with --resume goes on with the trials that were running"
        raise Interrupted(again) from None


def _failure(process: ChildProcess, code: int) -> LuthierError:
    return LuthierError(f"{process.work.name} ended without an outcome: {process.reason(code)}")


def _write_request(folder: Path, recipe: Recipe) -> None:
    fields = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    write_json(folder / _REQUEST, {"recipe": fields})


def _folder(folder: Path, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Path:
    return trial_folder(folder, int(trial.user_attrs[PLACE]) + 1)


def main(folder: Path, name: str) -> None:
    """Carry out the trial number ``name`` of the study in ``folder``, or tune the best."""
    on_stdin_end(lambda: os.kill(os.getpid(), signal.SIGTERM))
    recipe = Recipe.parse(read_json(folder / _REQUEST)["recipe"])
    if name == BEST:
        with lock(folder / BEST / ".lock", wait=True):
            result = tune(recipe, resume=True, reporter=ReportFile(folder / BEST / REPORTS))
            write_json(folder / BEST / OUTCOME, {"model_id": result.model_id})
        return
    import optuna

    study = open_study(folder)
    frozen = study.trials[int(name)]
    work = _folder(folder, frozen)
    with lock(work / ".lock", wait=True):
        trial = optuna.Trial(study, frozen._trial_id)
        reported = len(frozen.intermediate_values)
        if (work / OUTCOME).is_file():  # it ended before a kill, and the study does not know
            Watch(Reporter(), trial, work / METRICS, reported).report()
            return
        recipe = with_settings(recipe, frozen.params)
        reporter = ReportFile(work / REPORTS)
        try:
            outcome = carry_out(recipe, work, trial, reporter, reported)
        except RefusedInput as error:
            outcome = TrialOutcome("refused", reason=str(error))
        write_json(work / OUTCOME, asdict(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
