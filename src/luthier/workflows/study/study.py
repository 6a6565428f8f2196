"""A study: time estimate, trainings and result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean

from luthier.engine.dataset import NAMED_MEDIA, check_augmentation
from luthier.engine.job import TrainingJob, prepare_job, sketch_of, with_base
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.runs import automatic_name, is_resumed, lock_folder
from luthier.errors import Diverged, RecipeError, RefusedInput
from luthier.files import luthier_home, read_json, write_bytes, write_json
from luthier.formatting import format_duration
from luthier.library.models import find
from luthier.recipe import Recipe, Training, portable, to_toml
from luthier.workflows.estimate.estimate import estimate
from luthier.workflows.study.cells import Cell, CellResult, CellRunner, measured_result, run_cells
from luthier.workflows.study.figures import draw_study
from luthier.workflows.study.grid import (
    NONE,
    TAUGHT,
    UNKNOWN_ROWS,
    Configuration,
    Dimension,
    check_grid,
    check_limits,
    is_search,
    with_settings,
)
from luthier.workflows.study.prompts import check_prompts
from luthier.workflows.study.results import Study, StudyRow
from luthier.workflows.study.search import Search, default_space
from luthier.workflows.study.starts import check_student

PROCESS_SECONDS = 20.0
"""Seconds to start the two processes of a cell and to load data and model, beyond the training."""


def study(
    recipe: Recipe,
    grid: Sequence[Configuration],
    dimensions: Sequence[Dimension] = (),
    seeds: int = 1,
    forgetting: bool = False,
    earlier: Path | None = None,
    limits: Mapping[str, float] | None = None,
    max_minutes: float | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    trials: int | None = None,
    parallel: int | None = None,
    runner: CellRunner | None = None,
    home: Path | None = None,
) -> Study:
    """Train ``recipe`` with the settings of each configuration, and compare the results.

    All trainings learn from the same rows and are measured on the same held-out rows. Measurements
    of earlier studies are reused.

    Args:
        recipe: settings of all trainings.
        grid: configurations.
        dimensions: the varied fields, if the grid has all combinations of values.
        seeds: number of trainings of each configuration.
        forgetting: measure the drift from the base; for text generation.
        earlier: rows of an earlier task, measured before and after each training.
        limits: limits of the choice by figure, see :data:`FIGURES`.
        max_minutes: no training starts if the time would be exceeded. The result names the rest.
        resume: continue the same study, and train failed configurations again.
        reporter: receives progress.
        trials: number of configurations of a search, if fewer than the combinations of values. The
            search proposes each from the measurements before its round.
        parallel: trainings at the same time.
        runner: runner of the trainings; by default this machine.
        home: folder of the study and the cells; by default ``studies`` in the home folder.

    Raises:
        RefusedInput: before any training, for grid, recipe or data.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    reporter, runner = reporter or Reporter(), runner or CellRunner()
    limits = dict(limits or {})
    check_limits(limits, forgetting, earlier is not None)
    check_grid(grid, dimensions, recipe, seeds, trials)
    keys = {key for each in grid for key in each.settings}
    if "base" in keys:
        recipe = with_settings(recipe, {"base": grid[0].settings["base"]})
    recipe = with_base(recipe, reporter)
    given = recipe.training
    training = given.model_copy(update={"baseline_seconds": 0.0, "refit": False})
    recipe = recipe.model_copy(update={"training": training})
    base = find(recipe.base, reporter.stage)
    grid = [each for each in grid if each.suits(base.chat.reads)]
    reporter.stage("Checking the data")
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    parent = home or luthier_home() / "studies"
    name_of = partial(automatic_name, base.root, recipe.data.train, resume, parent)
    request_file = parent / (recipe.name or name_of()) / "request.json"
    stored = read_json(request_file) if resume and request_file.is_file() else {}
    parallel = parallel or stored.get("parallel")
    if runner.name is not None or (parallel or 1) > 1:
        parallel, threads = runner.shares(recipe, parallel)
        # Sums stay the same even if a cluster has grown or shrunk.
        threads = stored.get("recipe", {}).get("training", {}).get("threads", threads)
        recipe = with_settings(recipe, {"training.threads": threads})
    # All cells are rendered with one date, if the chat template prints a date.
    date = stored.get("template_date")
    fixed = {} if date is None else {"template_date": date}
    job = prepare_job(recipe, base, machine, _Warnings(reporter), fixed)
    _check_comparable(dimensions, job.data.objective.measure)
    if not job.data.validation:
        raise RecipeError(
            "A study compares on held-out rows, and none exist. Give --validation FILE, or at least "
            "20 rows."
        )
    grid = _suitable(grid, recipe, job, reporter)
    if file := grid[0].settings.get("prompts"):
        check_prompts(job, file)
    if forgetting and not job.data.objective.task.writes:
        raise RecipeError("`forgetting` needs an objective for text generation.")
    if trials and not dimensions:
        dimensions = default_space(recipe, job.recipe)
        keys = {each.key for each in dimensions}
    if "training.learning_rate" in keys and not keys & {"adaptation", "adaptation.method"}:
        # Otherwise the rate of the cell also changes the rate of the head.
        rate = job.recipe.training.head_rate_multiplier
        recipe = with_settings(recipe, {"training.head_rate_multiplier": rate})
    count = job.data.counts["rows"]
    for value in (v for each in dimensions if each.key == "rows" for v in each.values):
        if isinstance(value, int) and value > count:
            raise RecipeError(
                f"`--vary rows`: {value:,} is more than the {count:,} training rows. Write all.",
                setting="rows",
            )
    kwargs = job.recipe.data.chat_template_kwargs
    data = recipe.data.model_copy(update={"chat_template_kwargs": kwargs})
    recipe = recipe.model_copy(update={"data": data})
    # Again, because a study that started at the same time has taken the first free name.
    name = recipe.name or name_of()
    request_file = parent / name / "request.json"
    with lock_folder(parent / name, f"the study {name}"):
        request = {
            "recipe": portable(recipe), "seeds": seeds, "forgetting": forgetting,
            "earlier": None if earlier is None else str(earlier.absolute()),
            "grid": {each.name: dict(each.settings) for each in grid}, "parallel": parallel or 1,
            "space": [str(each) for each in dimensions], "trials": trials,
            "data": job.request()["data"], "template_date": job.chat.template.date,
        }  # fmt: skip
        if not is_resumed(request_file, request, f"study {name}", resume):
            write_json(request_file, request)
        cell = Cell(
            recipe.model_copy(update={"name": None}),
            forgetting=forgetting,
            home=parent,
            earlier=request["earlier"],
            media=job.data.hashes.get(NAMED_MEDIA),
        )
        work = _Work(cell, seeds, count, reporter, runner, parallel or 1, max_minutes)
        searches = is_search(dimensions, trials)
        if trials and searches:
            for each in dimensions:
                reporter.note(f"search {each}")
            rows = work.search(Search(dimensions, trials, parallel or 1, limits, job.recipe))
        else:
            rows = work.measure(grid, len(grid))
        result = Study(
            name,
            str(parent / name),
            rows,
            dimensions,
            len(job.data.validation),
            limits,
            is_search=searches,
        )
        return _complete(result, given)


def _suitable(
    grid: Sequence[Configuration], recipe: Recipe, job: TrainingJob, reporter: Reporter
) -> list[Configuration]:
    """Return the configurations that suit the network and the rows.

    A preset leaves out the others, with a note.

    Raises:
        RecipeError: for an unsuitable configuration of ``--vary``, or fewer than two suitable.
    """
    suitable, refused = list[Configuration](), ""
    known = dict[str, str]()
    for each in grid:
        groups = {key.partition(".")[0] for key in each.settings}
        varied, student = each.recipe(recipe, 0, UNKNOWN_ROWS), each.settings.get("student")
        method = None if varied.objective is None else varied.objective.method
        mixed = [str(mix.train) for mix in varied.data.mix if "data.mix" in each.settings]
        changes = varied.data.augmentation if "data.augmentation" in each.settings else None
        key = f"{varied.adaptation.model_dump_json()} {method} {student} {mixed} {changes}"
        if key not in known:
            known[key] = ""
            objective = job.data.objective
            try:
                if "objective" in groups or mixed:
                    prepare_job(varied, job.base, job.machine, Reporter())
                elif "adaptation" in groups and "base" not in groups:
                    sketch_of(job.base, job.chat, objective, varied.adaptation, job.machine)
                if changes:
                    check_augmentation(changes, objective, job.chat)
                if student is not None:
                    check_student(job, student == TAUGHT)
            except RefusedInput as error:
                known[key] = str(error)
        if not known[key]:
            suitable.append(each)
            continue
        refused = f"`{each.name}`: {known[key]}"
        if not each.label:
            raise RecipeError(refused, setting="vary")
        reporter.note(f"left out: {refused}")
    if refused and len(suitable) < 2:
        raise RecipeError(f"The preset has no two configurations for these rows. {refused}")
    return suitable


def _check_comparable(dimensions: Sequence[Dimension], measure: str) -> None:
    """Reject a grid whose losses cannot be compared."""
    for each in dimensions:
        if measure in ("loss", "reward") and each.key.startswith("objective"):
            raise RecipeError(
                f"`--vary {each.key}`: the {measure} of different objectives cannot be compared, and "
                "these rows have no score.",
                setting=each.key,
            )
        if measure == "loss" and each.key == "base":
            first, *others = (find(str(v)).chat.tokenizer.get_vocab() for v in each.values)
            if any(other != first for other in others):
                raise RecipeError(
                    "`--vary base`: losses per token of different tokenizers cannot be compared, and "
                    "these rows have no score.",
                    setting="base",
                )


class _Warnings(Reporter):
    """Passes on the warnings of the data check alone."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """Pass on a warning."""
        if text.startswith("warning"):
            self.outer.note(text)


@dataclass
class _Work:
    """The cells of a study."""

    cell: Cell
    seeds: int
    rows: int
    """Number of training rows."""
    reporter: Reporter
    runner: CellRunner
    parallel: int
    max_minutes: float | None
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    spent: list[float] = field(default_factory=list)
    """Seconds of each round."""
    expected: float = 0.0

    def cells(self, configuration: Configuration) -> list[Cell]:
        """Return a cell for each seed."""
        recipe, settings = self.cell.recipe, configuration.settings
        files = {key: settings.get(key, NONE) for key in ("before", "prompts")}
        paths = {k: None if f == NONE else str(Path(f).absolute()) for k, f in files.items()}
        return [
            replace(
                self.cell,
                recipe=configuration.recipe(recipe, recipe.training.seed + seed, self.rows),
                student=settings.get("student"),
                before=paths["before"],
                prompts=paths["prompts"],
            )
            for seed in range(self.seeds)
        ]

    def search(self, search: Search) -> list[StudyRow]:
        """Run the trials of a search, and return a row for each."""
        rows = list[StudyRow]()
        new = rows
        # Rounds, and not a queue: the proposals then depend on the seed alone, and not on which
        # trial ends first.
        while configurations := search.propose(new):
            new = self.measure(configurations, search.trials)
            rows += new
        return rows

    def measure(self, grid: Sequence[Configuration], count: int) -> list[StudyRow]:
        """Run the missing cells of ``grid``, and return a row for each configuration.

        ``count`` is the number of configurations in the study.
        """
        names = [each.name for each in grid for _ in range(self.seeds)]
        cells = [cell for each in grid for cell in self.cells(each)]
        outcomes = [measured_result(cell) for cell in cells]
        missing = [number for number, outcome in enumerate(outcomes) if outcome is None]
        if reused := len(cells) - len(missing):
            self.reporter.note(f"{reused} of {len(cells)} trainings are measured already")
        left = self.seeds * count - self.done - reused
        if missing and not self.expected:
            known = [each.seconds for each in outcomes if each is not None and each.seconds]
            self.expected = self._estimate(cells[missing[0]], known, left)
        for start in range(0, len(missing), self.parallel):
            part = missing[start : start + self.parallel]
            needed = mean(self.spent) if self.spent else self.expected
            over = time.monotonic() - self.began + needed
            if self.max_minutes is not None and over > 60 * self.max_minutes:
                reason = f"not started: over the limit of {self.max_minutes:g} minutes"
                for number in part:
                    outcomes[number] = CellResult(reason=reason)
                continue
            text = f", about {format_duration(needed * left / self.parallel)} left"
            for number in part:
                self.reporter.stage(
                    f"Training {self.done + number + 1} of {self.seeds * count}: {names[number]}, "
                    f"seed {cells[number].recipe.training.seed}{text * bool(self.spent)}"
                )
            began = time.monotonic()
            found = run_cells([cells[n] for n in part], self.reporter, self.runner)
            # Failures end after seconds, and would make the estimate of the rest too short.
            if not all(each.reason for each in found):
                self.spent.append(time.monotonic() - began)
            left -= len(part)
            for number, outcome in zip(part, found, strict=True):
                outcomes[number] = outcome
                failed = outcome.reason.partition("\n")[0]
                measured = f"{outcome.measure} {outcome.value or 0.0:.4f}"
                self.reporter.note(f"failed: {failed}" if failed else measured)
        self.done += len(cells)
        complete = iter([each for each in outcomes if each is not None])
        return [
            row for each in grid for row in _rows(each, [next(complete) for _ in range(self.seeds)])
        ]

    def _estimate(self, cell: Cell, known: Sequence[float], missing: int) -> float:
        """Report the estimated time of the missing cells, and return the seconds of a round.

        The estimate has the steps of a training without an early stop. The durations of measured
        cells are better.
        """
        if known:
            seconds = mean(known)
        else:
            self.reporter.stage("Estimating the time of the first training")
            try:
                seconds = estimate(cell.recipe, Reporter()).seconds.value
            except (Diverged, RefusedInput):  # the cell will be a row with the reason
                return 0.0
        seconds += PROCESS_SECONDS
        total = seconds * missing / self.parallel
        end = ", as the measured trainings did" if known else ", less if they stop early"
        text = f"{missing} trainings take about {format_duration(total)}{end}"
        self.reporter.note(text)
        if self.max_minutes is not None and total > 60 * self.max_minutes:
            text = f"some trainings may not start within {self.max_minutes:g} minutes"
            self.reporter.note(f"warning: {text}")
        return seconds


def _rows(configuration: Configuration, outcomes: Sequence[CellResult]) -> list[StudyRow]:
    """Return the row of a configuration, or with several prompts a row for each prompt."""
    if reason := next((each.reason for each in outcomes if each.reason), ""):
        return [StudyRow(configuration, outcomes, reason)]
    return [
        StudyRow(
            replace(configuration, label=name or configuration.label),
            [replace(each, **(each.contenders or {}).get(name, {})) for each in outcomes],
        )
        for name in outcomes[0].contenders or [""]
    ]


def _complete(found: Study, given: Training) -> Study:
    """Write result, pictures and the recipe of the choice, and return the study with their paths."""
    folder, command = Path(found.folder), ""
    pictures: list[str] = []
    if found.measured:
        pictures = draw_study(found, folder)
        if found.chosen is not None and found.more_rows is None and found.chosen.figure("steps"):
            fields = dict(found.chosen.outcomes[0].recipe or {})
            kept = given.model_dump(mode="json", exclude_unset=True)
            # Cells train without baselines and refit; the model of the user gets both, as every
            # run.
            own = ("baseline_seconds", "refit")
            fields["training"] = {
                **{name: value for name, value in fields["training"].items() if name not in own},
                **{name: kept[name] for name in own if name in kept},
            }
            head = f"# Chosen by the study {found.name}: {found.chosen.name}.\n\n"
            write_bytes(folder / "chosen.toml", (head + to_toml(fields)).encode())
            command = shlex.join(["luthier", "tune", str(folder / "chosen.toml")])
    found = replace(found, command=command, pictures=pictures)
    write_json(folder / "result.json", found.plain())
    return found
