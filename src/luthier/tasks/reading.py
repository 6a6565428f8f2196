"""Reading: the span of a context that answers a question."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task


class Reading(Task):
    """Answers from a context."""

    head: ClassVar[HeadKind] = "question_answering"


READING = Reading()
