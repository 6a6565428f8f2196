"""Rewards: a number for each reply, larger for better replies."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task


class Reward(Task):
    """Rewards of replies."""

    head: ClassVar[HeadKind] = "sequence_classification"

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the reward."""
        return f"{answer['reward']:.3f}"


REWARD = Reward()
