"""The seam between what is asked and where it is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.asking.spec import Asking
from luthier.errors import LuthierError, RefusedInput
from luthier.types import Message

Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Reply:
    """What a model answered, and why it stopped."""

    text: str
    finish: str
    """``stop`` for a whole answer; ``length``, ``content_filter`` or what else the model says."""
    tokens: int | None = None
    """Tokens of the answer, where they are counted."""


@dataclass(frozen=True)
class Failure:
    """A conversation that got no answer: the rule, and the reason."""

    rule: str
    """The role of who was asked, and ``refused`` or ``failed``: ``teacher.failed``."""
    reason: str


Done = Callable[[int, Reply | Failure], None]
"""Hears the outcome of each question as soon as there is one."""

Writer = Callable[[list[Sequence[Message]]], Sequence[str | Failure]]
"""Replies of a model to conversations, in their order: a local model or an endpoint."""


class Answerer:
    """Answers conversations."""

    name: str
    """What people call it."""
    weights: int | None = None
    """How many it has, where that is known."""

    @property
    def terms(self) -> str:
        """How it is asked, where people should know; else empty."""
        return ""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells it from every other one; written into journals and manifests."""
        raise NotImplementedError

    def ask(
        self,
        questions: Conversations,
        sampling: Asking,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Answer all questions, in any order; ``done`` is told the index and outcome of each.

        Raises:
            LuthierError: when it is of no use to go on; what ``done`` has heard stands.
        """
        raise NotImplementedError


def writer_of(asked: Answerer, role: str, sampling: Asking, note: Callable[[str], None]) -> Writer:
    """``asked`` as a function; after an outage, what got no answer has a :class:`Failure`."""

    def write(conversations: Conversations) -> list[str | Failure]:
        outcomes: dict[int, Reply | Failure] = {}
        lost = Failure(f"{role}.failed", "no answer came")
        try:
            asked.ask(conversations, sampling, outcomes.__setitem__, note)
        except RefusedInput:  # a wrong key, an unknown model: nothing that another row could mend
            raise
        except LuthierError as error:
            lost = Failure(f"{role}.failed", str(error))
        found = (outcomes.get(index, lost) for index in range(len(conversations)))
        return [each.text if isinstance(each, Reply) else each for each in found]

    return write


class Remembering:
    """A writer that asks nothing twice: equal conversations have one answer. Failures are forgotten."""

    def __init__(self, write: Writer) -> None:
        self.write = write
        self._known: dict[bytes, str] = {}

    def __call__(self, conversations: Conversations) -> list[str | Failure]:
        """Answers to all of them, in their order."""
        keys = [_digest(each) for each in conversations]
        new = {
            key: each
            for key, each in zip(keys, conversations, strict=True)
            if key not in self._known
        }
        found = self.write(list(new.values())) if new else []
        if len(found) != len(new):
            raise ValueError(f"{len(found)} answers came to {len(new)} conversations")
        heard = dict(zip(new, found, strict=True))
        self._known |= {key: each for key, each in heard.items() if isinstance(each, str)}
        return [self._known.get(key, heard.get(key, "")) for key in keys]


def _digest(conversation: Sequence[Message]) -> bytes:
    """32 bytes for a conversation, so that a long run holds little of what it asked."""
    text = json.dumps([turn.to_dict() for turn in conversation], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
