"""Trials: measured trainings without a stored model, for searches."""

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
"""The median of fewer trials says little."""
MEASUREMENTS_BEFORE_PRUNING = 2
"""Minimum measurements before pruning, of about eight in a run: the first is within the warm-up."""
PLACE = "place"
"""Attribute of a trial in the study: its place in the search, from 0."""
MEASURE = "measure"
"""Attribute of a trial in the study: ``loss``, ``reward`` or a score."""


@dataclass(frozen=True)
class Measured:
    """Best measurement of a training on its validation rows."""

    measure: str
    """``loss``, ``reward`` or a score."""
    cost: float
    """The measurement as a number to minimize (:func:`luthier.engine.metrics.cost_of`)."""
    error: float
    """Standard error of a score."""

    @staticmethod
    def of(lines: list[dict[str, Any]]) -> Measured:
        """Return the best of some validation lines."""
        measure = lines[0].get("measure", "loss")
        best = best_measurement(lines, measure)
        error = float(best.get(f"{measure}_error", 0.0))
        return Measured(measure, cost_of(best, measure), error)


def validation_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the validation measurements of the training in ``folder``."""
    lines = MetricsFile(folder / METRICS).read(rows=True)
    return [line for line in lines if line["event"] == "validation"]


@dataclass(frozen=True)
class Trial:
    """A finished trial of a search."""

    number: int
    """Place in the search, from 1."""
    settings: dict[str, Any]
    value: float | None
    """Cost of the best weights, or of the last measurement of a pruned trial."""
    state: Literal["complete", "pruned", "failed"]
    reason: str = ""
    """Reason of a failure."""
    measure: str = "loss"
    """``loss``, ``reward`` or a score."""

    @property
    def measurement(self) -> str:
        """The measurement as text."""
        if self.value is None:
            return ""
        value = measured_of(self.value, self.measure)
        return f"{SCORES.get(self.measure, self.measure)} {value:.4f}"


@dataclass(frozen=True)
class TrialOutcome:
    """Result of a trial."""

    state: Literal["complete", "pruned", "failed", "refused"]
    """``refused``: the recipe itself was rejected; only for the first trial."""
    value: float | None = None
    """Cost of a complete trial."""
    reason: str = ""
    """Reason of a failure or rejection."""


def open_study(folder: Path) -> optuna.Study:
    """Open the study in ``folder``, which a second process may also have open."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(backend),
        pruner=pruner(),
    )


def pruner() -> optuna.pruners.BasePruner:
    """Return a pruner of trials below the median of complete trials."""
    import optuna

    return optuna.pruners.MedianPruner(
        TRIALS_BEFORE_PRUNING, n_warmup_steps=MEASUREMENTS_BEFORE_PRUNING + 1
    )


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of trial ``number`` (from 1) of the search in ``folder``."""
    return folder / "trials" / f"{number:03d}"


def run_trial(
    recipe: Recipe, folder: Path, trial: optuna.Trial, reporter: Reporter, reported: int = 0
) -> TrialOutcome:
    """Train ``recipe`` in ``folder`` as a trial of a study.

    ``reported`` is the number of measurements that a killed process has reported to the study.

    Raises:
        RefusedInput: from the first trial, whose settings are the recipe's.
    """
    import optuna

    watch = Watch(reporter, trial, folder, reported)
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
    """Reports each measurement of a trial to the study, and stops hopeless trials."""

    def __init__(
        self, outer: Reporter, trial: optuna.Trial, folder: Path, reported: int = 0
    ) -> None:
        """``reported`` is the number of measurements in the study."""
        self.outer, self.trial, self.folder = outer, trial, folder
        self.reported = reported
        self.value: float | None = None
        """Cost of the best weights so far."""

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Report by the number of the measurement: trials may have different numbers of steps."""
        self.outer.metrics(line, steps)
        if line["event"] != "validation":
            return
        self.report()
        if line["step"] < steps and self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned

    def report(self) -> None:
        """Report new measurements.

        The metrics file also has the measurements before a kill, so a resumed trial is judged like
        an uninterrupted trial.
        """
        lines = validation_lines(self.folder)
        if not lines:
            return
        best = Measured.of(lines)
        if not self.reported:
            self.trial.set_user_attr(MEASURE, best.measure)
        for number, line in enumerate(lines[self.reported :], start=self.reported):
            self.trial.report(cost_of(line, best.measure), number)
        self.reported = max(self.reported, len(lines))
        self.value = best.cost


def open_journal(path: Path) -> Any:
    """Open Optuna's journal after a possible kill; only for the owner of the search's lock.

    A lock on the journal then belongs to a dead process, for which Optuna would wait 30 s, and a
    last line without an end was cut short.
    """
    from optuna.storages.journal import JournalFileBackend

    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        complete, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            write_bytes(path, complete + b"\n" if complete else b"")
    return JournalFileBackend(str(path))


def ended_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the finished trials by place."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted(trials, key=lambda trial: int(trial.user_attrs[PLACE]))


def trial_of(number: int, frozen: optuna.trial.FrozenTrial) -> Trial:
    """Return a finished trial of the study."""
    reason = frozen.user_attrs.get("reason", "")
    complete = frozen.state.name == "COMPLETE"
    state: Any = "failed" if reason else "complete" if complete else "pruned"
    value, measure = None if reason else frozen.value, frozen.user_attrs.get(MEASURE, "loss")
    return Trial(number, dict(frozen.params), value, state, reason, measure)


def describe_trial(trial: Trial) -> str:
    """Return the settings of a trial as text."""
    settings = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in trial.settings.items()}
    return ", ".join(f"{key}={value}" for key, value in settings.items())
