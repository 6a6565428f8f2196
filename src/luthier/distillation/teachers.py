"""Who answers: a model of this machine, or one behind an endpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.asking.base import Answerer, Done, Failure, Reply
from luthier.asking.spec import Asking
from luthier.distillation.recipe import TeacherSpec
from luthier.errors import RecipeError
from luthier.files import hashes_of
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.store.models import StoredModel


class LocalTeacher(Answerer):
    """A base or custom model of this machine, a batch at a time."""

    def __init__(self, spec: TeacherSpec, stored: StoredModel) -> None:
        from luthier.models.load import sketch
        from luthier.store.models import objective_of

        objective = objective_of(stored)
        if objective.task != "causal_lm":
            raise RecipeError(
                f"{stored.id} cannot teach by its answers: it was trained for {objective.method} and "
                "does not write text"
            )
        self.name, self.spec, self.stored = stored.id, spec, stored
        network = sketch(stored.network_folder, objective.head())
        self.weights = sum(weight.numel() for weight in network.parameters())
        self._digest = digest_of(stored)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Its id, and the hash of its files: the same id may be trained anew."""
        return {"model": self.stored.id, "sha256": self._digest}

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        sampling: Asking,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Answer in batches of like length, the longest first."""
        from luthier.serving.generation import Generator, Sampling

        generator = Generator.open(self.stored)
        chosen = Sampling(**sampling.model_dump())
        able = []
        for index, messages in enumerate(questions):
            refusal = generator.refusal(messages, chosen)
            if refusal is None:
                able.append(index)
            else:
                done(index, Failure("teacher.refused", refusal))
        able.sort(key=lambda index: -sum(len(turn.content) for turn in questions[index]))
        size = self.spec.batch_size
        for start in range(0, len(able), size):
            batch = able[start : start + size]
            answers = generator.answers([questions[index] for index in batch], chosen, size)
            for index, answer in zip(batch, answers, strict=True):
                finish = "stop" if answer.finished else "length"
                done(index, Reply(answer.text, finish, answer.tokens))


def teacher_of(spec: TeacherSpec, say: Callable[[str], None]) -> Answerer:
    """The teacher that ``spec`` names; refused where it cannot be one."""
    if spec.url is not None:
        from luthier.asking.endpoint import Endpoint

        return Endpoint(spec)
    from luthier.store.models import find

    return LocalTeacher(spec, find(spec.model, say))


def digest_of(stored: StoredModel) -> str:
    """SHA-256 of all that decides what the model answers: its files, and those below its adapters."""
    files = stored.manifest.get("files") or hashes_of(stored.folder)
    below = digest_of(stored.parent) if stored.parent else ""
    return hashlib.sha256(json.dumps([files, below], sort_keys=True).encode()).hexdigest()
