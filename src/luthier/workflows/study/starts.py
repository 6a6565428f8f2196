"""Models that cells start from: trained on text of the domain first, or half of a teacher's layers.

The models stay in the library, because several cells need each.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from luthier import __version__
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Run
from luthier.errors import RecipeError
from luthier.files import cached_sha256_of, lock, luthier_home
from luthier.library.models import custom_models, find
from luthier.models.shrinking.student import StudentShape, depth_of, plan
from luthier.recipe import Recipe, portable
from luthier.workflows.student import make_student
from luthier.workflows.study.grid import with_settings
from luthier.workflows.tuning import tune

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob

_DISTILLATIONS = {"classification": "encoder_distillation", "sft": "logit_distillation"}
"""Objective of a student by objective of the teacher."""


def after_text(recipe: Recipe, before: str, reporter: Reporter) -> Recipe:
    """Return ``recipe`` on the model that was trained on the file ``before`` first."""
    first = Recipe.parse({"base": recipe.base, "data": {"train": before}})
    return with_settings(recipe, {"base": _train_once(first, "before", reporter)[0]})


def _train_once(
    recipe: Recipe, kind: str, reporter: Reporter, has_student: bool = False
) -> tuple[str, str]:
    """Train ``recipe`` unless an earlier cell did; return the ids of the model and of a student."""
    key = [
        find(recipe.base).content_hash, portable(recipe), __version__,
        [cached_sha256_of(path) for path in recipe.data.files],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    first = recipe.model_copy(update={"name": f"{kind}-{digest}"})
    with lock(luthier_home() / "studies" / f".{first.name}.lock", wait=True):
        model = find(tune(first, resume=True, reporter=reporter).model_id)
        student = Run(model.root, f"student-{digest}")
        if has_student and student.model_id not in [each.id for each in custom_models()]:
            half = _half(model.network.config(model.objective.head()))
            make_student(model.id, student.name, half, reporter)
    return model.id, student.model_id


def _half(config: Any) -> StudentShape:
    # At least one layer, so that the plan names a single layer as the reason.
    return StudentShape(layers=max(1, depth_of(config) // 2))


def check_student(job: TrainingJob, is_taught: bool) -> None:
    """Reject a student that cannot be cut from the network, or cannot learn from a teacher.

    Raises:
        RecipeError: for an objective without distillation, or a network without separate layers.
    """
    objective = job.data.objective
    if is_taught and objective.method not in _DISTILLATIONS:
        raise RecipeError(
            f"A student learns from a teacher of labels or replies, not of {objective.method}.",
            setting="preset",
        )
    network = job.base.network.sketch(objective.head())
    plan(network, _half(network.config))


def student_recipe(recipe: Recipe, is_taught: bool, reporter: Reporter) -> Recipe:
    """Return the recipe of a student of the model that ``recipe`` trains."""
    teacher, student = _train_once(recipe, "teacher", reporter, has_student=True)
    fields: dict[str, Any] = {"base": student}
    if is_taught:
        method = _DISTILLATIONS[find(teacher).objective.method]
        fields["objective"] = {"method": method, "teacher": teacher}
    return with_settings(recipe, fields)
