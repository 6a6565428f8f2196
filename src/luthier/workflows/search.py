"""Hyperparameter search: trials of a recipe on the same validation rows, then training of the best.

Optuna (Akiba et al. 2019, arXiv:1907.10902) proposes settings and stops hopeless trials. The folder
``searches/NAME`` has the files that a search needs to resume:

    search.json      the request
    study.journal    Optuna's journal of trials
    trials/001/      metrics of each trial; its checkpoints while it runs
    best/            output of a cluster process that trained the best recipe
    best.toml        the best recipe

The settings of a trial follow from the seed, its place and the trials before its round. Each place
has a separate sampler, so a resumed search makes the same trials.

The custom model is an ordinary run of the best recipe, not the weights of the best trial. The
search needs one more run, but no second way to store and resume models. The engine is exact, so the
run repeats the trial.
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
from luthier.engine.runs import METRICS, Result, Run, automatic_name, is_resumed, lock_folder
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
from luthier.workflows.trial_processes import BEST, TrialRunner, run_best, run_trials
from luthier.workflows.trials import (
    PLACE,
    Trial,
    TrialOutcome,
    describe_trial,
    ended_trials,
    open_journal,
    pruner,
    run_trial,
    trial_folder,
    trial_of,
)
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 5
"""Random trials before the sampler learns from results; the first trial is the given recipe."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    name: str
    folder: str
    trials: list[Trial]
    """Trials, the best first: complete, pruned, failed."""
    recipe: str
    """TOML file of the best recipe."""
    result: Result
    """Run of the best recipe."""


def search(
    recipe: Recipe,
    trials: int = 12,
    space: Sequence[str] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
    parallel: int | None = None,
    runner: TrialRunner | None = None,
) -> SearchResult:
    """Try ``trials`` settings of ``recipe`` and train the best recipe as a custom model.

    Args:
        recipe: the first trial, if inside the space.
        trials: number of trials.
        space: dimensions for :func:`parse_space`; by default the learning rate and LoRA's rank.
        resume: continue the same search.
        reporter: receives progress.
        parallel: simultaneous trials per round. The settings of a round follow from earlier rounds.
        runner: runner of the trials; by default trials share the cores of this machine.

    Raises:
        RefusedInput: before any training, for space, data, recipe or name.
        Interrupted: on Ctrl-C or SIGTERM.
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
    if runner.name:  # remote processes have different working folders
        recipe = Recipe.parse({**portable(recipe), "base": base.id, "name": name})
    work = _Search(recipe, base, dimensions, trials, parent / name, reporter, parallel, runner)
    with lock_folder(work.folder, f"the search {name}"):
        try:
            work.begin(resume)
            result = work.run()
            certify(result.result.model_id)
            return result
        except RefusedInput as error:
            # Without a started trial, the search cannot be resumed.
            has_trials = (work.folder / "trials").exists()
            if has_trials and not isinstance(error, RunConflict):  # a process rejected its trial
                has_trials = any((work.folder / "trials").glob(f"*/{METRICS}"))
            if not has_trials:
                shutil.rmtree(work.folder, ignore_errors=True)
            raise


def need_optuna() -> None:
    """Raise :class:`RefusedInput` if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise RefusedInput("`search` needs Optuna: pip install 'luthier[search]'")


class _Search:
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
            # Otherwise a trial's rate also changes the rate of the head.
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
        """Claim the name of search and model, or check that the request is the same."""
        path = self.folder / "search.json"
        if self.runner.name and resume and path.is_file():
            # Rounds and sums stay the same even if the cluster has grown or shrunk.
            stored = read_json(path)
            self.threads = stored.get("threads", self.threads)
            if self._chosen_by_runner:
                self.parallel = stored["parallel"]
        request = self._request()
        started = self.run_folder.folder.exists() or self.run_folder.model_folder.exists()
        expected = request
        if path.is_file() and not started:
            # Trials may be added until the best recipe is trained.
            expected = {**request, "trials": read_json(path)["trials"]}
        if not is_resumed(path, expected, f"search {self.recipe.name}", resume) and started:
            raise RunConflict(
                f"{self.run_folder.model_id} exists. Choose a different `--name` for the best model.",
                rule="run.name_taken",
            )
        write_json(path, request)

    def run(self) -> SearchResult:
        """Run the remaining trials and train the best recipe."""
        for dimension in self.dimensions:
            self.reporter.note(f"search {dimension.key}: {dimension} ({dimension.reason})")
        if self.runner.name and self.parallel > 1:
            self.reporter.note(
                f"rounds of {self.parallel} trials (--parallel {self.parallel}) with {self.threads} "
                "threads each"
            )
        study = self._study()
        while len(ended_trials(study)) < self.count:
            self._round(study)
        order = ("complete", "pruned", "failed")
        trials = [trial_of(n, each) for n, each in enumerate(ended_trials(study), start=1)]
        trials.sort(key=lambda trial: (order.index(trial.state), trial.value or 0.0))
        best = trials[0]
        if best.value is None or best.state != "complete":
            raise Diverged(
                f"None of {len(trials)} trials finished. The first failed: {best.reason}"
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
            reporter = Reporter()  # `tune` only reads the result
        result = tune(recipe, resume=True, reporter=reporter)
        return SearchResult(str(recipe.name), str(self.folder), trials, str(file), result)

    def _request(self) -> dict[str, Any]:
        files = [path for path in self.recipe.data.files if path.is_file()]
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
            with lock(folder / ".lock", wait=True):  # a process of a killed search is about to stop
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
            # The trial was killed; the next trial at its place gets the same settings.
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _round(self, study: optuna.Study) -> None:
        first = len(ended_trials(study))
        # A resumed search has the same rounds.
        size = self.parallel - (first - 1) % self.parallel if first else 1
        study_trials = [
            self._ask(study, first + index) for index in range(min(size, self.count - first))
        ]
        trials = [
            Trial(first + index + 1, dict(a.params), None, "failed")
            for index, a in enumerate(study_trials)
        ]
        for trial in trials:
            self.reporter.stage(f"Trial {trial.number} of {self.count}: {describe_trial(trial)}")
        if len(study_trials) > 1 or self.runner.name:
            shared = self._with_threads(self.recipe)
            outcomes = run_trials(self.folder, shared, study_trials, self.runner, self.reporter)
        else:
            recipe = with_settings(self.recipe, trials[0].settings)
            folder = trial_folder(self.folder, first + 1)
            outcomes = [run_trial(recipe, folder, study_trials[0], self.reporter)]
        for trial, each, outcome in zip(trials, study_trials, outcomes, strict=True):
            self._tell(study, trial, each, outcome)

    def _with_threads(self, recipe: Recipe) -> Recipe:
        """Return ``recipe`` with the threads of a single process."""
        training = recipe.training.model_copy(update={"threads": self.threads})
        return recipe.model_copy(update={"training": training})

    def _ask(self, study: optuna.Study, place: int) -> optuna.Trial:
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
        self, study: optuna.Study, trial: Trial, study_trial: optuna.Trial, outcome: TrialOutcome
    ) -> None:
        """Record the outcome in the study, and remove the trial's checkpoints."""
        import optuna

        if outcome.state == "complete":
            study.tell(study_trial, outcome.value)
        else:
            if outcome.reason:
                study_trial.set_user_attr("reason", outcome.reason)
            study.tell(study_trial, state=optuna.trial.TrialState.PRUNED)
        folder = trial_folder(self.folder, trial.number)
        Run(self.base.root, folder.name, rehearsal=folder).drop_working_files()
        done = trial_of(trial.number, ended_trials(study)[trial.number - 1])
        value = "" if done.value is None else f", validation {done.measurement}"
        self.reporter.note(f"trial {done.number} of {self.count} {done.state}{value}")

    def _write_recipe(self, recipe: Recipe, best: Trial) -> Path:
        """Write ``best.toml`` without a name, with paths that work anywhere."""
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
