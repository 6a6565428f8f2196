"""Processes of a search: its trials side by side, and on a cluster the run of the best as well.

Each is ``python -m luthier.workflows.trial_processes FOLDER NUMBER``. It holds the lock of its folder,
so that one left over by a killed search ends before the next begins there, and it stops at a checkpoint
when the process that started it is gone. How a trial ended it writes to ``outcome.json``; only the
search itself tells the study. One that is killed is started again, and goes on from its checkpoint.

Where they run a :class:`TrialRunner` says. A runner of another machine gives a command that stands for
the process here: it lives as long, ends as it does, and ends it where its own standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportFile, ReportReader
from luthier.engine.runs import METRICS
from luthier.errors import Interrupted, LuthierError, RefusedInput
from luthier.files import lock, read_json, write_json
from luthier.printable import format_exit
from luthier.recipe import Recipe
from luthier.workflows.space import with_settings
from luthier.workflows.trials import PLACE, TrialOutcome, Watch, carry_out, open_study, trial_folder
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    import optuna

STARTS = 3
"""How often one process is started that is killed each time."""
LOOK = 0.2
"""Seconds between two looks at the processes."""
BEST = "best"
"""Folder and name of the run of the best."""
OUTCOME, ERRORS, REPORTS = "outcome.json", "errors.txt", "reports.jsonl"
_REQUEST = "trials.json"


class TrialRunner:
    """Where the processes of a search run: on this machine, as its children."""

    name: str | None = None
    """What ``search.json`` calls a place elsewhere. There every run of the search is a process, the
    first trial and that of the best among them."""
    environment: Mapping[str, str] | None = None
    """Variables of the processes that are started here; those of this one when not given."""

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """How many trials are a round, ``parallel`` where it is given, and the threads of each."""
        parallel = parallel or 1
        cores = recipe.training.threads or os.cpu_count() or 1
        return parallel, max(1, cores // parallel)

    def command(self, process: Sequence[str], recipe: Recipe, errors: Path) -> list[str]:
        """The command that stands here for ``process``, which carries out ``recipe``.

        What the process prints is appended to the file ``errors``.
        """
        return list(process)

    def was_killed(self, code: int) -> bool:
        """Whether the exit status ``code`` says that the process was cut short, and can go on."""
        return code < 0


class TrialProcess:
    """One process of a search, which is started again where it was killed."""

    def __init__(self, runner: TrialRunner, folder: Path, name: str, work: Path, recipe: Recipe):
        """For the trial number ``name`` of the study in ``folder``, or the best; in ``work``."""
        self.runner, self.work = runner, work
        work.mkdir(parents=True, exist_ok=True)
        for old in (ERRORS, REPORTS):
            (work / old).write_bytes(b"")
        process = [sys.executable, "-m", "luthier.workflows.trial_processes", str(folder), name]
        self._command = runner.command(process, recipe, work / ERRORS)
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.reports = ReportReader(work / REPORTS)

    def start(self) -> None:
        """Start it, or start it again."""
        self._starts += 1
        with (self.work / ERRORS).open("ab") as errors:  # a runner's process appends to it, too
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stderr=errors,
                env=self.runner.environment,
                start_new_session=True,  # Ctrl-C goes to the search, which lets them finish their step
            )

    def release(self) -> None:
        """Let go of the process: where it has not ended it stops, at a checkpoint."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait for its end, after :meth:`release`."""
        if self._process is not None:
            self._process.wait()
        self.reports.remove()

    def poll(self, reporter: Reporter) -> int | None:
        """Its exit status; ``None`` while it works. ``reporter`` hears of a new start."""
        assert self._process is not None
        code = self._process.poll()
        if code is None or self._starts == STARTS or not self.runner.was_killed(code):
            return code
        how = format_exit(code) if code < 0 else "as its node or its actor did"
        reporter.note(f"{self.work.name} ended {how}, and goes on after its last checkpoint")
        self.release()
        self.start()
        return None

    def failure(self, code: int) -> str:
        """Why it ended with ``code`` and without an outcome, in words."""
        said = (self.work / ERRORS).read_text(errors="replace").strip().splitlines()
        why = said[-1] if said else format_exit(code)
        return f"{self.work.name} ended without an outcome: {why}"


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
        TrialProcess(
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
            raise LuthierError(process.failure(code))
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
    process = TrialProcess(runner, folder, BEST, work, recipe)
    [code] = _run([process], reporter)
    if code or not (work / OUTCOME).is_file():
        raise LuthierError(process.failure(code))


def _run(processes: Sequence[TrialProcess], reporter: Reporter) -> list[int]:
    """Run processes to their ends; their exit statuses. What a single one reports is handed on."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _as_interrupt)
        for process in processes:
            process.start()
        while True:
            codes = [process.poll(reporter) for process in processes]
            if len(processes) == 1:
                processes[0].reports.hand_on(reporter)
            ended = [code for code in codes if code is not None]
            if len(ended) == len(codes):
                return ended
            time.sleep(LOOK)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; the same command with --resume goes on with the trials that were running"
        ) from None
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
        for process in processes:
            process.release()
        for process in processes:
            process.wait()


def _write_request(folder: Path, recipe: Recipe) -> None:
    fields = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    write_json(folder / _REQUEST, {"recipe": fields})


def _folder(folder: Path, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Path:
    return trial_folder(folder, int(trial.user_attrs[PLACE]) + 1)


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(folder: Path, name: str) -> None:
    """Carry out the trial number ``name`` of the study in ``folder``, or tune the best."""
    threading.Thread(target=_stop_when_alone, daemon=True).start()
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


def _stop_when_alone() -> None:
    """Ask this process to stop as soon as nothing holds the other end of its standard input."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
