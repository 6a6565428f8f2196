"""Tagging: a tag for each word, such as the kind of an entity."""

from __future__ import annotations

import json
from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task


class Tagging(Task):
    """Tags of words."""

    head: ClassVar[HeadKind] = "token_classification"

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the entities with positions."""
        found = [
            f"{e['label']}: {json.dumps(e['text'], ensure_ascii=False)} [{e['start']}:{e['end']}]"
            for e in answer["entities"]
        ]
        return "\n".join(found) or "(no entities)"


TAGGING = Tagging()
