"""Processes of a search: parallel trials, and all runs of a search on a cluster.

Each process is ``python -m luthier.workflows.trial_processes FOLDER NUMBER``. The process locks its
folder, stops at a checkpoint when the search is gone, and writes ``outcome.json``; only the search
updates the study. A killed process is restarted and resumes from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportFile
from luthier.errors import Interrupted, LuthierError, RefusedInput
from luthier.files import lock, read_json, write_json
from luthier.processes import on_stdin_end, python_command
from luthier.recipe import Recipe
from luthier.workflows.child_processes import (
    REPORTS,
    ChildProcess,
    ProcessRunner,
    Resources,
    run_processes,
)
from luthier.workflows.space import with_settings
from luthier.workflows.trials import PLACE, TrialOutcome, Watch, open_study, run_trial, trial_folder
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    import optuna

BEST = "best"
"""Folder and name of the run of the best recipe."""
OUTCOME = "outcome.json"
_REQUEST = "trials.json"


class TrialRunner(ProcessRunner):
    """Runs the processes of a search on this machine.

    A runner with a ``name`` runs every training of the search as a process.
    """

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """Return the number of trials per round, and the threads of each."""
        parallel = parallel or 1
        cores = recipe.training.threads or os.cpu_count() or 1
        return parallel, max(1, cores // parallel)

    def resources(self, recipe: Recipe) -> Resources:
        """Return the resources of a training; not used on this machine."""
        return Resources()


def run_trials(
    folder: Path,
    recipe: Recipe,
    trials: Sequence[optuna.Trial],
    runner: TrialRunner,
    reporter: Reporter,
) -> list[TrialOutcome]:
    """Carry out trials at once, each in a process, and return the outcomes in order.

    Raises:
        RefusedInput: from the first trial of a search.
        Interrupted: on Ctrl-C or SIGTERM, after each process wrote a checkpoint.
    """
    works = [_trial_work(folder, trial) for trial in trials]
    recipes = [with_settings(recipe, trial.params) for trial in trials]
    names = [str(trial.number) for trial in trials]
    _run(folder, recipe, [*zip(names, works, recipes, strict=True)], runner, reporter)
    outcomes = [TrialOutcome(**read_json(work / OUTCOME)) for work in works]
    for work, outcome in zip(works, outcomes, strict=True):
        if outcome.state == "refused":
            (work / OUTCOME).unlink()  # a resumed search tries the settings again
            raise RefusedInput(outcome.reason)
    return outcomes


def run_best(folder: Path, recipe: Recipe, runner: TrialRunner, reporter: Reporter) -> None:
    """Train the best recipe in a process of ``runner``.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    if not (folder / BEST / OUTCOME).is_file():
        _run(folder, recipe, [(BEST, folder / BEST, recipe)], runner, reporter)


def _run(
    folder: Path,
    recipe: Recipe,
    works: Sequence[tuple[str, Path, Recipe]],
    runner: TrialRunner,
    reporter: Reporter,
) -> None:
    fields = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    write_json(folder / _REQUEST, {"recipe": fields})
    processes = [
        ChildProcess(
            runner,
            python_command("luthier.workflows.trial_processes", str(folder), name),
            runner.resources(own),
            work,
            "resumes after its last checkpoint",
        )
        for name, work, own in works
    ]

    def forward() -> bool:
        if len(processes) == 1:
            processes[0].reports.forward(reporter)
        return False

    try:
        codes = [code or 0 for code in run_processes(processes, reporter, forward)]
    except Interrupted:
        text = "Stopped. Run the same command with `--resume` to continue the running trials."
        raise Interrupted(text) from None
    for process, code in zip(processes, codes, strict=True):
        if code or not (process.work / OUTCOME).is_file():
            raise LuthierError(f"{process.work.name} has no outcome: {process.reason(code)}")


def _trial_work(folder: Path, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Path:
    return trial_folder(folder, int(trial.user_attrs[PLACE]) + 1)


def main(folder: Path, name: str) -> None:
    """Carry out trial number ``name`` of the study in ``folder``, or train the best recipe."""
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
    work = _trial_work(folder, frozen)
    with lock(work / ".lock", wait=True):
        trial = optuna.Trial(study, frozen._trial_id)
        reported = len(frozen.intermediate_values)
        if (work / OUTCOME).is_file():  # the trial ended before a kill of the search
            Watch(Reporter(), trial, work, reported).report()
            return
        try:
            outcome = run_trial(
                with_settings(recipe, frozen.params),
                work,
                trial,
                ReportFile(work / REPORTS),
                reported,
            )
        except RefusedInput as error:
            outcome = TrialOutcome("refused", reason=str(error))
        write_json(work / OUTCOME, asdict(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
