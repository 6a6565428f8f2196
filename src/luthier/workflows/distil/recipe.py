"""The recipe of a distillation: that of tuning the student, its teacher, and what answers must
be."""

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
"""Objective of each method that is one."""


class TeacherSpec(ModelSpec):
    """Who answers: a model of this machine, or one behind an OpenAI-compatible endpoint."""

    role: ClassVar[str] = "teacher"
    set_by: ClassVar[str] = "--set teacher."
    goes_on: ClassVar[str] = "The answers so far are kept; the same command with --resume goes on"


class InsightSpec(StrictModel):
    """Which prompts and answers the student learns from."""

    longest_prompt: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Characters of a prompt at most."""
    shortest_answer: int = Field(default=1, ge=1, le=1_000_000_000)
    """Characters of an answer at least."""
    longest_answer: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Characters of an answer at most."""
    refusals: bool = True
    """Reject answers that begin like a refusal: English phrases, a heuristic."""
    grader: AnyGrader | None = None
    """Grader that compares the answers with the rows' own replies."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Score that an answer needs with ``grader``."""
    minimum: int = Field(default=10, ge=2, le=1_000_000_000)
    """Refuse to train on fewer accepted answers (10 is the least that OpenAI's fine-tuning
    takes)."""


class DistilRecipe(Recipe):
    """Everything that decides what a student becomes: ``base`` is the student, ``data.train``
    asks."""

    method: str = "responses"
    """How the student learns: ``responses`` tunes it on what the teacher answers, ``logits`` on
    what it thinks of every token, ``on_policy`` on what it thinks of the student's own answers;
    ``encoder`` and ``embedding`` are for networks that read."""
    teacher: TeacherSpec
    """Who answers."""
    sampling: SamplingSpec = SamplingSpec()
    """How the teacher chooses its words."""
    insights: InsightSpec = InsightSpec()
    """Which prompts and answers the student learns from."""

    @model_validator(mode="before")
    @classmethod
    def _objective_of_method(cls, fields: Any) -> Any:
        """Fields of the objective need not repeat its name."""
        if not isinstance(fields, Mapping) or fields.get("method") not in OBJECTIVE_OF:
            return fields
        name, given = OBJECTIVE_OF[fields["method"]], fields.get("objective")
        if not isinstance(given, Mapping):
            return fields
        return {**fields, "objective": {"method": name, **given}}

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher(cls, value: Any) -> Any:
        return address_fields(value) if isinstance(value, str) else value

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> DistilRecipe:
        """Build a recipe from plain values; :class:`RecipeError` names each bad field."""
        return parse(DistilRecipe, fields)

    def tuning_recipe(self, **changes: Any) -> Recipe:
        """The student's part of it, as `tune` takes it."""
        own = {name: getattr(self, name) for name in Recipe.model_fields}
        return Recipe.model_construct(**{**own, **changes})
