"""The seam of this package: what a method of distillation is given and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.distillation.recipe import DistilRecipe
from luthier.engine.metrics import Reporter

if TYPE_CHECKING:
    from luthier.engine.runs import Result


@dataclass(frozen=True)
class Distilled:
    """What a finished distillation gives back."""

    result: Result
    """The run that trained the student."""
    details: dict[str, Any]
    """What the manifest holds under ``distillation``, ready for JSON."""


Method = Callable[[DistilRecipe, bool, Reporter], Distilled]
"""``method(recipe, resume, reporter)`` trains a student and stores it."""
