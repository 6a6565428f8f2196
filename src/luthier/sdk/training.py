"""What makes models (``tune``, ``distil``, ``pretrain``, ``student``), and what is asked
before.

Fields of a recipe are keywords, with ``__`` for the dot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.cluster.launch import Target
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result
    from luthier.recipe import Recipe
    from luthier.workflows.advise.facts import Goal
    from luthier.workflows.advise.recommend import Advice
    from luthier.workflows.distil.responses import Distilled
    from luthier.workflows.estimate.estimate import Estimate
    from luthier.workflows.learning_curve import LearningCurve
    from luthier.workflows.student import Student


def distil(
    prompts: str | Path,
    *,
    teacher: str | None = None,
    student: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Distilled:
    """Let a teacher answer prompts, and tune a student on the answers that are accepted.

    Args:
        prompts: a file of prompts or conversations, or a TOML recipe.
        teacher: id of a local model, or ``https://host/v1#model`` for an OpenAI-compatible endpoint.
        student: base or custom model that learns; the default base model when not given.
        resume: go on with an interrupted distillation of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of :class:`luthier.workflows.distil.recipe.DistilRecipe` with ``__`` for the
            dot: those of :func:`tune`, and for example ``sampling__max_tokens=256`` or
            ``insights__minimum=50``.

    Returns:
        The finished run of the student, and what the manifest says of the distillation.

    Raises:
        RefusedInput: for prompts or settings that cannot work, or too few accepted answers.
        LuthierError: where the teacher cannot be reached; the answers so far are kept.
    """
    from luthier.chat_models.base import address_fields
    from luthier.recipe import assign, fields_of
    from luthier.workflows.distil import distil as run
    from luthier.workflows.distil.recipe import DistilRecipe

    plain = fields_of(prompts)
    if isinstance(plain.get("teacher"), str):
        plain["teacher"] = address_fields(plain["teacher"])
    for key, value in (address_fields(teacher) if teacher else {}).items():
        assign(plain, ["teacher", key], value)
    if student is not None:
        plain["base"] = student
    assign_fields(plain, fields)
    return run(DistilRecipe.parse(plain), resume, reporter)


def pretrain(
    data: str | Path | Sequence[str | Path],
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    processes: int = 1,
    **fields: Any,
) -> Result:
    """Train a tokenizer and a network from random weights on raw text; the result is a base model.

    Args:
        data: one file of raw text, several, or a TOML recipe.
        resume: go on with an interrupted run of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        processes: of this machine that share the rows of each step.
        **fields: fields of :class:`luthier.pretrain_recipe.PretrainRecipe` with ``__`` for the dot, for
            example ``name="..."`` (which it needs), ``network__size="10m"``, ``training__epochs=1``.

    Returns:
        Model id, folders, losses, time and memory of the finished run.

    Raises:
        RefusedInput: before any training, for text or settings that cannot work.
    """
    from luthier.pretrain_recipe import PretrainRecipe
    from luthier.recipe import fields_of
    from luthier.workflows.pretrain import pretrain as run

    plain = fields_of([data] if isinstance(data, str | Path) else data)
    assign_fields(plain, fields)
    return run(PretrainRecipe.parse(plain), resume, reporter, processes)


def student(
    teacher: str,
    *,
    name: str,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    heads: int | None = None,
    intermediate: int | None = None,
    hidden: int | None = None,
    reporter: Reporter | None = None,
) -> Student:
    """Make a smaller model of a teacher's own weights and store it; it has yet to be tuned.

    Args:
        teacher: id, local directory or hub id.
        name: of the new custom model.
        layers: how many, spread evenly over the teacher's; or ``keep``, their numbers from 0.
        heads, intermediate, hidden: widths; see :class:`luthier.models.student.StudentShape`.
        reporter: receives what will be cut; nothing is printed without one.

    Raises:
        RefusedInput: before any weight is read, for sizes, family, name or disk.
    """
    from luthier.models.student import StudentShape
    from luthier.workflows.student import make_student

    kept = None if keep is None else tuple(keep)
    shape = StudentShape(layers, kept, heads, intermediate, hidden)
    return make_student(teacher, name, shape, reporter)


def estimate(
    data: str | Path | Recipe, *, reporter: Reporter | None = None, **fields: Any
) -> Estimate:
    """Say how long a tuning will take, and its memory and disk, from a few real steps.

    Args:
        data: a data file, a TOML recipe, or a :class:`~luthier.recipe.Recipe`.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of the recipe, as of :func:`luthier.tune`.

    Returns:
        ``seconds``, ``memory``, ``disk`` and ``tokens``, each with ``value``, ``low`` and ``high``, the
        parts of the time, and ``plain()`` for JSON.
        :func:`luthier.workflows.estimate.budget.plan` says how much of it fits into a time.

    Raises:
        RefusedInput: as :func:`luthier.tune` does, for the same reasons.
    """
    from luthier.workflows.estimate.estimate import estimate as run

    return run(recipe_of(data, fields), reporter)


def launch(
    data: str | Path | Recipe,
    *,
    on: Target,
    processes: int = 1,
    nodes: int = 1,
    gpu: str | None = None,
    image: str | None = None,
    seconds: float | None = None,
    reporter: Reporter | None = None,
    **fields: Any,
) -> str:
    """The file that runs a tuning on a cluster: sized by its estimate, each number with its reason.

    Args:
        data: a data file, a TOML recipe, or a :class:`~luthier.recipe.Recipe`.
        on: ``slurm`` (a batch script), ``kubernetes`` (a Job), ``skypilot`` (a task) or ``ray`` (a
            script that ``ray job submit`` takes).
        processes: on each node.
        nodes: how many machines.
        gpu: the cluster's name of the GPU that each process gets, or ``none``; not given, as here.
        image: container image; what ``deploy/Dockerfile`` makes when not given.
        seconds: time limit of a run; the estimate's upper end and half as much when not given.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of the recipe, as of :func:`luthier.tune`.

    Raises:
        RefusedInput: for what cannot be launched, and as :func:`luthier.tune` does.
    """
    from luthier.cluster.launch import LaunchRequest, launch_file
    from luthier.engine.dataset import check_sources

    request = LaunchRequest(on, processes, nodes, gpu, image, seconds)
    recipe = recipe_of(data, fields)
    check_sources(recipe.data, recipe.objective)
    found = estimate(recipe, reporter=reporter)
    from luthier.engine.machine import choose_machine

    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    return launch_file(recipe, found, request, machine)


def learning_curve(
    data: str | Path | Recipe,
    *,
    shares: Sequence[float] | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> LearningCurve:
    """Estimate the effect of more rows by training on growing shares; no model is stored.

    Args:
        data: a data file, a TOML recipe, or a :class:`~luthier.recipe.Recipe`.
        shares: shares of the rows, at least four; seven from an eighth to all when not given.
        resume: continue an interrupted curve of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of the recipe, as of :func:`luthier.tune`.

    Returns:
        ``points``, the ``gain`` of twice the rows with its ``interval``, and ``verdict()``.

    Raises:
        RefusedInput: before any training, for data, settings or shares that cannot work.
    """
    from luthier.workflows.learning_curve import SHARES
    from luthier.workflows.learning_curve import learning_curve as run

    return run(recipe_of(data, fields), SHARES if shares is None else shares, resume, reporter)


def advise(
    data: str | Path,
    *,
    documents: Sequence[str | Path] = (),
    goal: Goal = "quality",
    max_minutes: float | None = None,
    max_seconds: float | None = None,
    max_megabytes: float | None = None,
    trial: float = 60.0,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Advice:
    """Compare fine-tuning with prompting, search, distillation and the rest, tried on your rows.

    Args:
        data: a data file or a TOML recipe.
        documents: sources of texts that answers should be true to.
        goal: what matters most: ``quality``, ``cost``, ``latency``, ``knowledge`` or ``style``.
        max_minutes: that training may take.
        max_seconds: that an answer may take.
        max_megabytes: that the model may have.
        trial: seconds of training on trial; 0 trains nothing.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of the recipe, as of :func:`luthier.tune`.

    Returns:
        ``judgements`` of every technique, the ``recommendation`` with its reasons and commands, the
        ``facts`` behind them, and ``plain()`` for JSON.

    Raises:
        RefusedInput: for a recipe or documents that cannot be.
    """
    from luthier.engine.metrics import Reporter
    from luthier.workflows.advise import advise as run
    from luthier.workflows.advise import command_of
    from luthier.workflows.advise.facts import Wishes

    recipe = recipe_of(data, fields)
    dotted = {field_path(key): value for key, value in fields.items()}
    command = command_of(str(data), dotted)
    wishes = Wishes(goal, max_minutes, max_seconds, max_megabytes)
    texts = [str(source) for source in documents]
    return run(recipe, command, texts, wishes, trial, reporter or Reporter())


def recipe_of(data: str | Path | Recipe, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of a data file, a TOML file or a recipe, with ``fields`` by dotted name (``__``).

    Raises:
        RecipeError: for a field that there is not, or fields beside a :class:`~luthier.recipe.Recipe`.
    """
    from luthier.recipe import Recipe, fields_of

    if isinstance(data, Recipe):
        if fields:
            raise RecipeError("a Recipe is complete; give no further fields beside it")
        return data
    plain = fields_of(data)
    assign_fields(plain, fields)
    return Recipe.parse(plain)


SHORT_NAMES: Mapping[str, str] = {
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
}
"""Fields that may be given without their group, as on the command line."""


def field_path(key: str) -> str:
    """The dotted name of a field from a keyword: ``training__epochs``, or ``epochs`` for short."""
    return SHORT_NAMES.get(key, key.replace("__", "."))


def assign_fields(plain: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set ``fields``, by keyword, in the plain values of a recipe.

    Raises:
        RecipeError: for a field that is given twice, in short and by its full name.
    """
    from luthier.recipe import assign

    paths: dict[str, str] = {}
    for key, value in fields.items():
        path = field_path(key)
        if path in paths:
            raise RecipeError(f"{paths[path]} and {key} are the same field; give one")
        paths[path] = key
        assign(plain, path.split("."), value)
