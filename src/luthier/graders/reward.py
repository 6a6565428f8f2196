"""Grading by a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from luthier.errors import RecipeError
from luthier.graders.base import Answer, GraderModels, NetworkGrader, Scorer

if TYPE_CHECKING:
    from luthier.models.networks.heads import HeadKind


class Reward(NetworkGrader):
    """The reward of a model of objective ``reward_model``: any number, more is better.

    The reward model uses its own format and tokenizer. In Python, ``Reward(model=..., scorer=...)``
    takes a function from answers to numbers. A policy that trains long enough finds the faults of a
    reward model (Gao et al. 2022, arXiv:2210.10760): look at samples and keep the divergence small.
    """

    method: Literal["reward"] = "reward"
    model: str = Field(min_length=1)
    """Id of the reward model."""
    scorer: SkipJsonSchema[Scorer | None] = Field(default=None, exclude=True, repr=False)
    """The opened model: answers to numbers. Not stored."""

    @property
    def models(self) -> Mapping[str, HeadKind]:
        """The reward model and its task."""
        return {self.model: "sequence_classification"}

    def with_models(self, models: GraderModels) -> Self:
        """Return the grader with its model opened."""
        return self.model_copy(update={"scorer": models.scorer(self.model)})

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the rewards."""
        if self.scorer is None:
            raise RecipeError(
                f"grader `reward` needs {self.model} in memory; give Reward(model=..., scorer=...), a "
                "function from answers to numbers"
            )
        return self.scorer(answers)
