"""Trials of a search: where they are kept, and how one is carried out and reported to the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.engine.metrics import (
    SCORES,
    MetricsFile,
    Reporter,
    best_measurement,
    cost_of,
    measured_of,
)
from luthier.engine.runs import METRICS
from luthier.engine.train import rehearse
from luthier.errors import Diverged, RefusedInput
from luthier.files import write_bytes
from luthier.recipe import Recipe

if TYPE_CHECKING:
    import optuna

TRIALS_BEFORE_PRUNING = 3
"""The median of fewer says little."""
MEASUREMENTS_BEFORE_PRUNING = 2
"""Of about eight in a run. At the first the rate has hardly left its warm-up."""
PLACE = "place"
"""Attribute of a trial in the study: its place in the search, from 0."""
MEASURE = "measure"
"""The same: what is measured."""


@dataclass(frozen=True)
class Trial:
    """One trial that ended."""

    number: int
    """Place in the search, from 1."""
    settings: dict[str, Any]
    value: float | None
    """What is to be low, as :func:`~luthier.engine.metrics.cost_of` has it; of the weights that
    a run would keep, or the last one where it was pruned."""
    state: Literal["complete", "pruned", "failed"]
    reason: str = ""
    """Why it failed."""
    measure: str = "loss"
    """What is measured: ``loss``, ``reward`` or a score."""

    @property
    def measurement(self) -> str:
        """What was measured, for people."""
        if self.value is None:
            return ""
        shown = measured_of(self.value, self.measure)
        return f"{SCORES.get(self.measure, self.measure)} {shown:.4f}"


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended."""

    state: Literal["complete", "pruned", "failed", "refused"]
    """``refused`` is the first trial alone, whose settings are the recipe's own."""
    value: float | None = None
    """:attr:`Trial.value`, where it is complete."""
    reason: str = ""
    """Why it failed, or was refused."""


def open_study(folder: Path) -> optuna.Study:
    """The study in ``folder``, as another process may have it open too."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(backend),
        pruner=pruner(),
    )


def pruner() -> optuna.pruners.BasePruner:
    """Stops trials that are worse than the median of those that came to their end."""
    import optuna

    return optuna.pruners.MedianPruner(
        TRIALS_BEFORE_PRUNING, n_warmup_steps=MEASUREMENTS_BEFORE_PRUNING + 1
    )


def trial_folder(folder: Path, number: int) -> Path:
    """Where trial ``number`` (from 1) of the search in ``folder`` works."""
    return folder / "trials" / f"{number:03d}"


def carry_out(
    recipe: Recipe, folder: Path, trial: optuna.Trial, reporter: Reporter, reported: int = 0
) -> TrialOutcome:
    """Rehearse ``recipe`` in ``folder``, as one trial of a study.

    ``reported`` is how many measurements the study has of it, from a process that was killed.

    Raises:
        RefusedInput: by the first trial, whose settings are the recipe's own.
    """
    import optuna

    watch = Watch(reporter, trial, folder / METRICS, reported)
    try:
        rehearse(recipe, folder, watch)
    except optuna.TrialPruned:
        return TrialOutcome("pruned")
    except (Diverged, RefusedInput) as error:
        if isinstance(error, RefusedInput) and trial.user_attrs[PLACE] == 0:
            raise
        return TrialOutcome("failed", reason=str(error))
    watch.report()
    return TrialOutcome("complete", watch.value)


class Watch(Reporter):
    """Hands each measurement of a trial to the study, and stops the trial when that says so."""

    def __init__(
        self, outer: Reporter, trial: optuna.Trial, metrics: Path, reported: int = 0
    ) -> None:
        """``reported`` is how many measurements the study has of it already."""
        self.outer, self.trial, self.file = outer, trial, MetricsFile(metrics)
        self.reported = reported
        self.value: float | None = None
        """What the weights that would be kept so far cost."""

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Report by the number of the measurement: trials may have different numbers of steps.

        The metrics file has those of before a kill, too. Without them, a resumed trial would be
        judged by other measurements than one that was never cut short.
        """
        self.outer.metrics(line, steps)
        if line["event"] != "validation":
            return
        self.report()
        if line["step"] < steps and self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned

    def report(self) -> None:
        """Tell the study what it does not know yet."""
        lines = self.file.read(rows=True)
        measured = [line for line in lines if line["event"] == "validation"]
        if not measured:
            return
        measure = measured[0].get("measure", "loss")
        if not self.reported:
            self.trial.set_user_attr(MEASURE, measure)
        for number, line in enumerate(measured[self.reported :], start=self.reported):
            self.trial.report(cost_of(line, measure), number)
        self.reported = max(self.reported, len(measured))
        self.value = cost_of(best_measurement(measured, measure), measure)


def open_journal(path: Path) -> Any:
    """Optuna's journal file; what a kill left in it is put right first.

    Only for who holds the lock of the search: then a lock on the journal is a dead process's, which
    Optuna would wait 30 s for, and a last line without an end is one that was cut short.
    """
    from optuna.storages.journal import JournalFileBackend

    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            write_bytes(path, whole + b"\n" if whole else b"")
    return JournalFileBackend(str(path))


def ended_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that hold a place, in order; those cut short do not."""
    from optuna.trial import TrialState

    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted(found, key=lambda trial: int(trial.user_attrs[PLACE]))


def trial_of(number: int, frozen: optuna.trial.FrozenTrial) -> Trial:
    """What the study knows of a trial that ended."""
    reason = frozen.user_attrs.get("reason", "")
    complete = frozen.state.name == "COMPLETE"
    state: Any = "failed" if reason else "complete" if complete else "pruned"
    value, measure = None if reason else frozen.value, frozen.user_attrs.get(MEASURE, "loss")
    return Trial(number, dict(frozen.params), value, state, reason, measure)


def describe_trial(trial: Trial) -> str:
    """The settings of a trial, for people."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in trial.settings.items()}
    return ", ".join(f"{key}={value}" for key, value in shown.items())
