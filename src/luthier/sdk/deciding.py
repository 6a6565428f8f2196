"""Before a tuning: whether it is the answer, and what it will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.sdk.assembly import field_path, recipe_of

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.recipe import Recipe
    from luthier.workflows.advise.facts import Goal
    from luthier.workflows.advise.recommend import Advice
    from luthier.workflows.estimate.estimate import Estimate


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
