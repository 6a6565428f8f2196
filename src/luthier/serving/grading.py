"""Graders with the models they name: from the store, or behind an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.graders import Grader

if TYPE_CHECKING:
    from luthier.objectives.scoring import Remember


def open_graders(
    graders: Mapping[str, Grader],
    answers: int,
    note: Callable[[str], None],
    remember: Remember | None = None,
) -> dict[str, Grader]:
    """``graders`` ready for ``answers`` answers, each model tried and what it will cost told.

    ``remember`` keeps verdicts elsewhere than in memory.

    Raises:
        UnknownModel, RecipeError: for a model that is not there or is for something else, a key that
            is refused.
        LuthierError: for an endpoint that does not answer.
    """
    judgements = sum(grader.judgements for grader in graders.values())
    if judgements:
        note(f"the judge will be asked for {judgements * (answers + 1):,} verdicts at most")
    if not judgements and not any(grader.models for grader in graders.values()):
        return dict(graders)
    from luthier.engine.devices import choose_machine
    from luthier.engine.job import opened
    from luthier.engine.metrics import Reporter
    from luthier.objectives.scoring import Beside, check_judge
    from luthier.store.models import find, objective_of

    stored = {name: find(name, note) for each in graders.values() for name in each.models}
    for grader in graders.values():
        for name in grader.writers:
            check_judge(name, objective_of(stored[name]))
    machine = choose_machine()
    models = Beside({n: opened(s, machine, Reporter()) for n, s in stored.items()}, note)
    if remember is not None:
        models = replace(models, remember=remember)
    ready = {name: grader.with_models(models) for name, grader in graders.items()}
    for name, grader in ready.items():
        if warning := grader.rehearse():
            note(f"warning: grader {name}: {warning}")
    return ready
