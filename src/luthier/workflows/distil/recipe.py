"""Recipe of a distillation: the student's tuning recipe, the teacher, and rules for answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from luthier.chat_models.base import ModelSpec, SamplingSpec, address_fields
from luthier.graders import AnyGrader
from luthier.recipe import Recipe, parse
from luthier.validation import StrictModel

OBJECTIVE_OF = {
    "logits": "logit_distillation",
    "on_policy": "on_policy_distillation",
    "encoder": "encoder_distillation",
    "embedding": "embedding_distillation",
}
"""Objective of each method with an objective."""


class TeacherSpec(ModelSpec):
    """Teacher: a model on this machine, or behind an OpenAI-compatible endpoint."""

    role: ClassVar[str] = "teacher"
    set_by: ClassVar[str] = "--set teacher."
    goes_on: ClassVar[str] = (
        "The answers are stored. Run the same command with --resume to continue"
    )


class InsightSpec(StrictModel):
    """Rules for prompts and answers that the student learns from."""

    longest_prompt: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Maximum characters of a prompt."""
    shortest_answer: int = Field(default=1, ge=1, le=1_000_000_000)
    """Minimum characters of an answer."""
    longest_answer: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Maximum characters of an answer."""
    refusals: bool = True
    """Reject answers that begin like a refusal: English phrases, a heuristic."""
    grader: AnyGrader | None = None
    """Grader that compares the answers with the rows' own replies."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Minimum score of an answer with ``grader``."""
    questions: bool = False
    """True for prompts about passages whose replies are questions with answers."""
    minimum: int = Field(default=10, ge=2, le=1_000_000_000)
    """Minimum number of accepted answers (10 is the minimum of OpenAI's fine-tuning)."""


class DistilRecipe(Recipe):
    """Recipe of a student: ``base`` is the student, ``data.train`` has the prompts."""

    method: str = "responses"
    """Method: ``responses``, ``logits``, ``on_policy``, or for encoders ``encoder``, ``embedding``."""
    teacher: TeacherSpec
    """Teacher model."""
    sampling: SamplingSpec = SamplingSpec()
    """Sampling settings of the teacher."""
    insights: InsightSpec = InsightSpec()
    """Rules for prompts and answers that the student learns from."""

    @model_validator(mode="before")
    @classmethod
    def _objective_of_method(cls, fields: Any) -> Any:
        """Add the name of the objective, which follows from the method."""
        if not isinstance(fields, Mapping) or fields.get("method") not in OBJECTIVE_OF:
            return fields
        name, objective = OBJECTIVE_OF[fields["method"]], fields.get("objective")
        if not isinstance(objective, Mapping):
            return fields
        return {**fields, "objective": {"method": name, **objective}}

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher(cls, value: Any) -> Any:
        return address_fields(value) if isinstance(value, str) else value

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> DistilRecipe:
        """Build a recipe from plain values; :class:`RecipeError` names each bad field."""
        return parse(DistilRecipe, fields)

    def tuning_recipe(self, **changes: Any) -> Recipe:
        """Return the student's tuning recipe."""
        fields = {name: getattr(self, name) for name in Recipe.model_fields}
        return Recipe.model_construct(**{**fields, **changes})
