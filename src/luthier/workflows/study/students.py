"""Students of a study: half of the layers of a tuned teacher."""

from __future__ import annotations

import hashlib
import json

from luthier import __version__
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Run
from luthier.errors import RecipeError
from luthier.files import cached_sha256_of, lock, luthier_home
from luthier.library.models import custom_models, find
from luthier.models.networks.layers import layer_names
from luthier.models.shrinking.student import StudentShape
from luthier.recipe import Recipe, portable
from luthier.workflows.student import make_student
from luthier.workflows.study.grid import with_settings
from luthier.workflows.tuning import tune

_DISTILLATIONS = {"classification": "encoder_distillation", "sft": "logit_distillation"}
"""Objective of a student by objective of the teacher."""


def student_recipe(recipe: Recipe, is_taught: bool, reporter: Reporter) -> Recipe:
    """Return the recipe of a student of the model that ``recipe`` trains.

    Teacher and untrained student stay in the library, because several cells need both.

    Raises:
        RecipeError: for a teacher without a distillation of its scores, or a single layer.
    """
    key = [
        find(recipe.base).content_hash, portable(recipe), __version__,
        [cached_sha256_of(path) for path in recipe.data.files],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    first = recipe.model_copy(update={"name": f"teacher-{digest}"})
    with lock(luthier_home() / "studies" / f".{first.name}.lock", wait=True):
        teacher = find(tune(first, resume=True, reporter=reporter).model_id)
        student = Run(teacher.root, f"student-{digest}")
        if student.model_id not in [each.id for each in custom_models()]:
            depth = len(layer_names(teacher.network.sketch(teacher.objective.head())))
            shape = StudentShape(layers=depth // 2)
            make_student(teacher.id, student.name, shape, reporter)
    if not is_taught:
        return with_settings(recipe, {"base": student.model_id})
    if (method := teacher.objective.method) not in _DISTILLATIONS:
        raise RecipeError(
            f"A student learns from a teacher of labels or replies, not of objective {method}.",
            setting="preset",
        )
    objective = {"method": _DISTILLATIONS[method], "teacher": teacher.id}
    return with_settings(recipe, {"base": student.model_id, "objective": objective})
