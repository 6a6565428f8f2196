"""Search for settings: trials of a recipe, compared on the same validation rows; the best is
stored.

Optuna (Akiba et al. 2019, arXiv:1907.10902) proposes the settings and stops hopeless trials; the
engine that runs them does not know it. What a search needs to go on after a kill lies in
``searches/NAME``:

    search.json      what was asked for
    study.journal    Optuna's journal of trials, append-only
    trials/001/      metrics of each trial; its checkpoints while it runs
    best/            what a process wrote that tuned the best on a cluster
    best.toml        the recipe found

A trial's settings follow from the seed, its place and the trials finished before it, never from a
random state that a kill would lose: each place has a sampler of its own. So a search that was
killed and resumed makes the trials of one that was not.

The custom model is one more ordinary run of the recipe found, not the weights of the best trial: it
costs one run more, and keeps no second way to store, verify and resume models, nor a copy of the
weights of every trial that led for a while. The engine being exact, it measures what the trial did.
Trials are compared by what decides which weights of a run are kept: a score where there is one,
else the validation loss.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier import __version__
from luthier.engine.job import prepare_job, with_base
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.runs import (
    METRICS,
    Result,
    Run,
    automatic_name,
    is_resumed,
    lock_folder,
)
from luthier.errors import Diverged, RefusedInput, RunConflict
from luthier.files import lock, luthier_home, read_json, sha256_of, write_bytes, write_json
from luthier.library.models import StoredModel, find
from luthier.recipe import Recipe, portable, to_toml
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.space import (
    Dimension,
    default_space,
    parse_space,
    start_of,
    with_settings,
)
from luthier.workflows.trial_processes import BEST, TrialRunner, run_best, side_by_side
from luthier.workflows.trials import (
    PLACE,
    Trial,
    TrialOutcome,
    carry_out,
    describe_trial,
    ended_trials,
    open_journal,
    pruner,
    trial_folder,
    trial_of,
)
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 5
"""Trials before the sampler begins to learn from them; the first is the recipe as it stands."""


@dataclass(frozen=True)
class SearchResult:
    """What a finished search gives back."""

    name: str
    folder: str
    trials: list[Trial]
    """Best first: complete ones by what they measured, then those pruned, then those that
    failed."""
    recipe: str
    """TOML file of the recipe found, without a name."""
    result: Result
    """The run of the recipe found, whose model is stored."""


def search(
    recipe: Recipe,
    trials: int = 12,
    space: Sequence[str] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
    parallel: int | None = None,
    runner: TrialRunner | None = None,
) -> SearchResult:
    """Try ``trials`` settings of ``recipe`` and store the best as a custom model.

    ``space`` holds texts for :func:`parse_space`; when empty, the learning rate is searched and,
    for LoRA, the rank. The recipe as it stands is the first trial wherever it lies in the space, so
    what is found is at least as good on the validation rows.

    ``parallel`` trials are a round and run at once where there is room: what is tried, and what is
    stopped, follows from the rounds before, not from who ends first. ``runner`` says where, and how
    many where ``parallel`` does not; on this machine it is one, and several share its cores.

    Raises:
        RefusedInput: before any training, for space, data, recipe or name.
        Interrupted: on Ctrl-C or SIGTERM; with ``resume`` the same call goes on.
    """
    reporter = reporter or Reporter()
    need_optuna()
    dimensions = parse_space(space, recipe)
    runner = runner or TrialRunner()
    recipe = with_base(recipe, reporter)
    base = find(recipe.base, reporter.stage)
    parent = luthier_home() / "searches"
    name = recipe.name or automatic_name(base.root, recipe.data.train, resume, parent)
    recipe = recipe.model_copy(update={"name": name})
    if runner.name:  # its processes have other working folders
        recipe = Recipe.parse({**portable(recipe), "base": base.id, "name": name})
    work = _Search(recipe, base, dimensions, trials, parent / name, reporter, parallel, runner)
    with lock_folder(work.folder, f"the search {name}"):
        try:
            work.begin(resume)
            found = work.run()
            certify(found.result.model_id)
            return found
        except RefusedInput as error:
            # Refused before the first trial began: nothing is there that could be resumed.
            begun = (work.folder / "trials").exists()
            if begun and not isinstance(error, RunConflict):  # a process of it was refused
                begun = any((work.folder / "trials").glob(f"*/{METRICS}"))
            if not begun:
                shutil.rmtree(work.folder, ignore_errors=True)
            raise


def need_optuna() -> None:
    """Refuse with what to install where Optuna is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise RefusedInput("a search needs Optuna: pip install 'luthier[search]'")


class _Search:
    """One search in its folder."""

    def __init__(
        self,
        recipe: Recipe,
        base: StoredModel,
        dimensions: Sequence[Dimension],
        count: int,
        folder: Path,
        reporter: Reporter,
        parallel: int | None,
        runner: TrialRunner,
    ) -> None:
        machine = choose_machine(recipe.training.precision, recipe.training.threads)
        resolved = prepare_job(recipe, base, machine, Reporter()).recipe
        self.base, self.count, self.folder = base, count, folder
        self.dimensions = list(dimensions) or default_space(recipe, resolved)
        keys = {dimension.key for dimension in self.dimensions}
        if "training.learning_rate" in keys and "adaptation.method" not in keys:
            # Without it a rate that is given is one for the head, too, and no trial the default run.
            recipe = with_settings(
                recipe, {"training.head_rate_multiplier": resolved.training.head_rate_multiplier}
            )
        self.recipe = recipe
        self.reporter, self.runner = reporter, runner
        self.parallel, self.threads = runner.shares(recipe, parallel)
        self._chosen_by_runner = parallel is None
        self.run_folder = Run(base.root, str(recipe.name))
        starts = {d.key: start_of(d.key, resolved) for d in self.dimensions}
        self.start = {d.key: starts[d.key] for d in self.dimensions if starts[d.key] in d}

    def begin(self, resume: bool) -> None:
        """Claim the name of search and model, or check that the same is asked for again."""
        path = self.folder / "search.json"
        if self.runner.name and resume and path.is_file():
            # The cluster may have grown or shrunk, and rounds and sums stay what they were.
            before = read_json(path)
            self.threads = before.get("threads", self.threads)
            if self._chosen_by_runner:
                self.parallel = before["parallel"]
        request = self._request()
        started = self.run_folder.folder.exists() or self.run_folder.model_folder.exists()
        asked = request
        if path.is_file() and not started:
            # More trials may be added until their best is on its way to a model.
            asked = {**request, "trials": read_json(path)["trials"]}
        if not is_resumed(path, asked, f"search {self.recipe.name}", resume) and started:
            raise RunConflict(
                f"there is a run or a model {self.run_folder.model_id} already, and the best of the "
                "trials would be stored there; choose another --name"
            )
        write_json(path, request)

    def run(self) -> SearchResult:
        """All trials that are left, and the run of the best."""
        for dimension in self.dimensions:
            self.reporter.note(f"search {dimension.key}: {dimension} ({dimension.reason})")
        if self.runner.name and self.parallel > 1:
            self.reporter.note(
                f"{self.parallel} trials are a round, as --parallel {self.parallel} has it, of "
                f"{self.threads} threads each"
            )
        study = self._study()
        while len(ended_trials(study)) < self.count:
            self._round(study)
        trials = _table(ended_trials(study))
        best = trials[0]
        if best.value is None or best.state != "complete":
            raise Diverged(
                f"none of the {len(trials)} trials came to its end; the first failed because "
                f"{trials[0].reason}"
            )
        recipe = with_settings(self.recipe, best.settings)
        file = self._write_recipe(recipe, best)
        self.reporter.note(
            f"best is trial {best.number}: {best.measurement} with {describe_trial(best)}"
        )
        reporter = self.reporter
        if self.runner.name:
            recipe = self._with_threads(recipe)
            run_best(self.folder, recipe, self.runner, reporter)
            reporter = Reporter()  # only the result is read
        result = tune(recipe, resume=True, reporter=reporter)
        return SearchResult(str(recipe.name), str(self.folder), trials, str(file), result)

    def _request(self) -> dict[str, Any]:
        data = self.recipe.data
        files = [path for path in data.files if path.is_file()]
        return {
            "recipe": self.recipe.plain(),
            "space": {dimension.key: str(dimension) for dimension in self.dimensions},
            "trials": self.count,
            "parallel": self.parallel,
            "data": {str(path): sha256_of(path) for path in files},
            "luthier": __version__,
            **({"runner": self.runner.name, "threads": self.threads} if self.runner.name else {}),
        }

    def _study(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for folder in (*(self.folder / "trials").glob("*"), *self.folder.glob(BEST)):
            with lock(folder / ".lock", wait=True):  # one left over by a kill is about to stop
                pass
        storage = optuna.storages.JournalStorage(open_journal(self.folder / "study.journal"))
        study = optuna.create_study(
            study_name="search",
            storage=storage,
            direction="minimize",
            load_if_exists=True,
            pruner=pruner(),
        )
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            # Cut short; its place is free, and the next trial there gets the same settings.
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _round(self, study: optuna.Study) -> None:
        """The next trials that run at once. The first of all runs alone: it may be refused."""
        first = len(ended_trials(study))
        # Rounds begin where they would have begun had the search not been cut short.
        size = self.parallel - (first - 1) % self.parallel if first else 1
        asked = [self._ask(study, first + index) for index in range(min(size, self.count - first))]
        trials = [
            Trial(first + index + 1, dict(a.params), None, "failed")
            for index, a in enumerate(asked)
        ]
        for trial in trials:
            self.reporter.stage(f"Trial {trial.number} of {self.count}: {describe_trial(trial)}")
        if len(asked) > 1 or self.runner.name:
            shared = self._with_threads(self.recipe)
            outcomes = side_by_side(self.folder, shared, asked, self.runner, self.reporter)
        else:
            recipe = with_settings(self.recipe, trials[0].settings)
            folder = trial_folder(self.folder, first + 1)
            outcomes = [carry_out(recipe, folder, asked[0], self.reporter)]
        for trial, each, outcome in zip(trials, asked, outcomes, strict=True):
            self._tell(study, trial, each, outcome)

    def _with_threads(self, recipe: Recipe) -> Recipe:
        """``recipe`` for one of several processes at once, which share the cores."""
        training = recipe.training.model_copy(update={"threads": self.threads})
        return recipe.model_copy(update={"training": training})

    def _ask(self, study: optuna.Study, place: int) -> optuna.Trial:
        """Settings for the trial at ``place``, which follow from it and the trials before its
        round."""
        import optuna

        seeds = np.random.SeedSequence([self.recipe.training.seed, place])
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            seed=int(seeds.generate_state(1)[0]),
            constant_liar=False,
        )
        waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if place == 0 and self.start and not waiting:
            study.enqueue_trial(self.start)
        trial = study.ask({d.key: _distribution(d) for d in self.dimensions})
        trial.set_user_attr(PLACE, place)
        return trial

    def _tell(
        self, study: optuna.Study, trial: Trial, asked: optuna.Trial, outcome: TrialOutcome
    ) -> None:
        """Give the trial its place in the study, and let go of its checkpoints."""
        import optuna

        if outcome.state == "complete":
            study.tell(asked, outcome.value)
        else:
            if outcome.reason:
                asked.set_user_attr("reason", outcome.reason)
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        folder = trial_folder(self.folder, trial.number)
        Run(self.base.root, folder.name, rehearsal=folder).drop_working_files()
        done = trial_of(trial.number, ended_trials(study)[trial.number - 1])
        value = "" if done.value is None else f", validation {done.measurement}"
        self.reporter.note(f"trial {done.number} of {self.count} {done.state}{value}")

    def _write_recipe(self, recipe: Recipe, best: Trial) -> Path:
        """``best.toml``: no name, so that it can be tuned again as it is; paths that work
        anywhere."""
        fields = portable(recipe.model_copy(update={"base": self.base.id}))
        head = (
            f"# Found by `luthier search`: trial {best.number} of {self.count}, validation "
            f"{best.measurement}.\n\n"
        )
        path = self.folder / "best.toml"
        write_bytes(path, (head + to_toml(fields)).encode())
        return path


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _table(frozen: Sequence[optuna.trial.FrozenTrial]) -> list[Trial]:
    order = ("complete", "pruned", "failed")
    trials = [trial_of(number, trial) for number, trial in enumerate(frozen, start=1)]
    return sorted(trials, key=lambda trial: (order.index(trial.state), trial.value or 0.0))
