"""Several graders as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from luthier.graders.base import Answer, Grader, GraderModels, Trouble, Ungraded
from luthier.graders.grade import attempt
from luthier.graders.specs import AnyGrader

if TYPE_CHECKING:
    from luthier.models.heads import Task


class CompositeGrader(Grader):
    """Base of graders that are made of others, by names of one's own."""

    parts_field: ClassVar[str]
    """The field that holds them."""

    @property
    def _parts(self) -> Mapping[str, Grader]:
        found: Mapping[str, Grader] = getattr(self, self.parts_field)
        return found

    @property
    def grades_prompts(self) -> bool:
        """When one of the parts does."""
        return any(part.grades_prompts for part in self._parts.values())

    @property
    def prefers_batches(self) -> bool:
        """When one of the parts does."""
        return any(part.prefers_batches for part in self._parts.values())

    @property
    def has_time_limit(self) -> bool:
        """When one of the parts has; without one there is no thread, which suits torch."""
        return any(part.has_time_limit for part in self._parts.values())

    @property
    def models(self) -> Mapping[str, Task]:
        """Those of all parts."""
        return {name: task for part in self._parts.values() for name, task in part.models.items()}

    @property
    def judgements(self) -> int:
        """Those of all parts."""
        return sum(part.judgements for part in self._parts.values())

    def with_models(self, models: GraderModels) -> Self:
        """The same with the models of all parts opened."""
        parts = {name: part.with_models(models) for name, part in self._parts.items()}
        return self.model_copy(update={self.parts_field: parts})

    def rehearse(self) -> str:
        """Each part's trial."""
        found = {name: part.rehearse() for name, part in self._parts.items()}
        return "; ".join(f"part `{name}`: {text}" for name, text in found.items() if text)

    def check(self) -> None:
        """Refuse what a part lacks."""
        for part in self._parts.values():
            part.check()

    def check_expected(self, expected: str | None) -> None:
        """Refuse what a part cannot compare with."""
        for part in self._parts.values():
            part.check_expected(expected)

    def each(
        self, answers: Sequence[Answer], troubles: dict[int, Trouble]
    ) -> dict[str, list[float]]:
        """Scores of each part, NaN where there is none; why goes to ``troubles``."""
        scores = {}
        for name, part in self._parts.items():
            scores[name], wrong = attempt(part, answers)
            for index, trouble in wrong.items():
                text = f"part `{name}`: {trouble.message}"
                troubles.setdefault(index, Trouble(trouble.rule, text, trouble.fix))
        return scores


class Mix(CompositeGrader):
    """The weighted mean of other graders: form and result together, for example.

    In TOML: ``parts = { result = "number", form = { method = "regex", pattern = "####" } }`` and
    ``weights = { result = 1.0, form = 0.2 }``.
    """

    method: Literal["mix"] = "mix"
    parts: dict[str, AnyGrader] = Field(min_length=1)
    """The graders by names of your own, each as its method or as a table of its fields."""
    weights: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(default_factory=dict)
    """How much each part counts; 1 for those not named. A negative weight is a penalty."""
    normalize: bool = True
    """Divide by the sum of the weights' sizes; otherwise the weights count as they are."""

    parts_field = "parts"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        unknown = self.weights.keys() - self.parts.keys()
        if unknown:
            raise ValueError(
                f"weights name {sorted(unknown)}, which is no part; there are {', '.join(self.parts)}"
            )
        if not any(self._weight(name) for name in self.parts):
            raise ValueError("all weights are 0, so every reply would score 0")
        return self

    @property
    def is_share(self) -> bool:
        """From 0 to 1 when normalized, all parts are, and none is a penalty."""
        return (
            self.normalize
            and all(part.is_share for part in self.parts.values())
            and all(self._weight(name) >= 0 for name in self.parts)
        )

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """The weighted means; :class:`Ungraded` where a part has no score."""
        totals = [0.0] * len(answers)
        troubles: dict[int, Trouble] = {}
        for name, scores in self.each(answers, troubles).items():
            weight = self._weight(name)
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        size = sum(abs(self._weight(name)) for name in self.parts) if self.normalize else 1.0
        totals = [total / size for total in totals]
        if self.is_share:  # weights such as 0.1, 0.2 may sum to a little more than their sum
            totals = [total if math.isnan(total) else min(1.0, total) for total in totals]
        if troubles:
            raise Ungraded(totals, troubles)
        return totals

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)
