"""Graders made of other graders, and their weighted mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from luthier.errors import RowRefused
from luthier.graders.base import Answer, Grader, GraderModels, Ungraded
from luthier.graders.grade import attempt
from luthier.graders.specs import AnyGrader

if TYPE_CHECKING:
    from luthier.models.networks.heads import HeadKind


class CompositeGrader(Grader):
    """Base of graders made of named graders."""

    parts_field: ClassVar[str]
    """Name of the field with the graders."""

    @property
    def _parts(self) -> Mapping[str, Grader]:
        found: Mapping[str, Grader] = getattr(self, self.parts_field)
        return found

    @property
    def grades_prompts(self) -> bool:
        """True if a part grades prompts."""
        return any(part.grades_prompts for part in self._parts.values())

    @property
    def prefers_batches(self) -> bool:
        """True if a part prefers batches."""
        return any(part.prefers_batches for part in self._parts.values())

    @property
    def has_time_limit(self) -> bool:
        """True if a part has a time limit."""
        return any(part.has_time_limit for part in self._parts.values())

    @property
    def models(self) -> Mapping[str, HeadKind]:
        """Models of all parts."""
        return {name: task for part in self._parts.values() for name, task in part.models.items()}

    @property
    def judgements(self) -> int:
        """Judge verdicts of all parts per answer."""
        return sum(part.judgements for part in self._parts.values())

    def with_models(self, models: GraderModels) -> Self:
        """Return the grader with the models of all parts opened."""
        parts = {name: part.with_models(models) for name, part in self._parts.items()}
        return self.model_copy(update={self.parts_field: parts})

    def rehearse(self) -> str:
        """Try each part."""
        found = {name: part.rehearse() for name, part in self._parts.items()}
        return "; ".join(f"part `{name}`: {text}" for name, text in found.items() if text)

    def check(self) -> None:
        """Check each part."""
        for part in self._parts.values():
            part.check()

    def check_expected(self, expected: str | None) -> None:
        """Check the expected text with each part."""
        for part in self._parts.values():
            part.check_expected(expected)

    def grade_parts(
        self, answers: Sequence[Answer], faults: dict[int, RowRefused]
    ) -> dict[str, list[float]]:
        """Return the scores of each part, NaN if missing, and add the reasons to ``faults``."""
        scores = {}
        for name, part in self._parts.items():
            scores[name], wrong = attempt(part, answers)
            for index, fault in wrong.items():
                text = f"part `{name}`: {fault.problem.message}"
                faults.setdefault(index, RowRefused(fault.rule, text, fault.problem.advice))
        return scores


class Mix(CompositeGrader):
    """The weighted mean of other graders, for example of form and result.

    In TOML: ``parts = { result = "number", form = { method = "regex", pattern = "####" } }`` and
    ``weights = { result = 1.0, form = 0.2 }``.
    """

    method: Literal["mix"] = "mix"
    parts: dict[str, AnyGrader] = Field(min_length=1)
    """Graders by names of your choice, each as a method or a table of fields."""
    weights: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(default_factory=dict)
    """Weight of each part, 1 by default. A negative weight is a penalty."""
    normalize: bool = True
    """Divide by the sum of the absolute weights."""

    parts_field = "parts"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if unknown := self.weights.keys() - self.parts.keys():
            raise ValueError(
                f"weights for {sorted(unknown)}; the parts are {', '.join(self.parts)}"
            )
        if not any(self._weight(name) for name in self.parts):
            raise ValueError("all weights are 0, so every reply would score 0")
        return self

    @property
    def is_share(self) -> bool:
        """True for a normalized mean without penalties, of scores from 0 to 1."""
        return self.normalize and all(
            part.is_share and self._weight(name) >= 0 for name, part in self.parts.items()
        )

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the weighted means; raise :class:`Ungraded` if a part has no score."""
        totals = [0.0] * len(answers)
        faults: dict[int, RowRefused] = {}
        for name, scores in self.grade_parts(answers, faults).items():
            weight = self._weight(name)
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        size = sum(abs(self._weight(name)) for name in self.parts) if self.normalize else 1.0
        totals = [total / size for total in totals]
        if self.is_share:  # rounding: weights such as 0.1 and 0.2 may sum to more than their sum
            totals = [total if math.isnan(total) else min(1.0, total) for total in totals]
        if faults:
            raise Ungraded(totals, faults)
        return totals

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)
