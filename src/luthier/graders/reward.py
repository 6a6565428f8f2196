"""Grading by a reward model: how much people would like the reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from luthier.errors import RecipeError
from luthier.graders.base import Answer, GraderModels, NetworkGrader, Scorer

if TYPE_CHECKING:
    from luthier.models.heads import Task


class Reward(NetworkGrader):
    """What a model of objective ``reward_model`` says: any number, more is better.

    The text is read in the reward model's own format, so its tokenizer may be another. The model is
    loaded beside the one that is graded; from Python, ``Reward(model=..., scorer=...)``
    takes any function from answers to numbers. A reward model is right about texts like those it has
    seen: a policy that learns from it long enough finds where it is wrong (Gao et al. 2022,
    arXiv:2210.10760), so look at the samples and keep the divergence small.
    """

    method: Literal["reward"] = "reward"
    model: str = Field(min_length=1)
    """Id of the reward model."""
    scorer: SkipJsonSchema[Scorer | None] = Field(default=None, exclude=True, repr=False)
    """The model itself: answers to numbers. Not stored."""

    @property
    def models(self) -> Mapping[str, Task]:
        """The reward model."""
        return {self.model: "sequence_classification"}

    def with_models(self, models: GraderModels) -> Self:
        """The same with its model in memory."""
        return self.model_copy(update={"scorer": models.scorer(self.model)})

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards."""
        if self.scorer is None:
            raise RecipeError(
                f"grader `reward` needs {self.model} in memory; from Python, give "
                "Reward(model=..., scorer=...), a function from answers to numbers"
            )
        return self.scorer(answers)
