"""Rewards: a number for each reply, larger for better replies."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task


class Reward(Task):
    """Rewards of replies."""

    head: ClassVar[HeadKind] = "sequence_classification"


REWARD = Reward()
