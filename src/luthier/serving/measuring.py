"""Measuring a generating model on held-out rows: grade its answers, or its surprise at raw text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.evaluation.evaluate import Evaluation, grade, questions
from luthier.serving.long_rows import LongRows, refuse_long_rows, too_long

if TYPE_CHECKING:
    from luthier.graders import Grader, OnError
    from luthier.serving.generation import Generator
    from luthier.store.models import StoredModel
    from luthier.types import Example, Row

BUDGET = 2048
"""Tokens computed at once."""


def measure(
    generator: Generator,
    rows: Sequence[Row],
    graders: Mapping[str, Grader],
    max_tokens: int,
    done: Callable[[int], None] = lambda count: None,
    on_error: OnError = "fail",
    long_rows: LongRows = "error",
) -> Evaluation:
    """Greedy replies to ``rows``, graded; ``done`` hears how many are finished.

    ``on_error`` says what becomes of replies that a grader cannot grade, and ``long_rows`` of prompts
    that leave no room for a reply; they are never cut, as their end is what is asked.

    Raises:
        DataError: with ``error``, naming every prompt that is too long.
        RecipeError: for ``truncate``.
    """
    from luthier.serving.generation import Sampling

    if long_rows == "truncate":
        raise RecipeError(
            "a prompt that is cut loses what it asks, so prompts are not truncated; choose "
            "`long_rows=drop`"
        )
    asked, _ = questions(rows)
    sampling = Sampling(max_tokens=max_tokens)
    refusals = [generator.refusal(prompt, sampling) for prompt in asked]
    kept = [index for index, refusal in enumerate(refusals) if refusal is None]
    dropped = len(rows) - len(kept)
    problems = [
        too_long(row, refusal, cure=", or lower max_tokens")
        for row, refusal in zip(rows, refusals, strict=True)
        if refusal is not None and long_rows == "error"
    ]
    refuse_long_rows(problems, len(kept), dropped)
    replies = generator.replies([asked[index] for index in kept], sampling, done=done)
    graded = grade([rows[index] for index in kept], replies, graders, on_error)
    return replace(graded, dropped=dropped)


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts raw text."""

    loss: float
    """Nats a token, the first of each sequence left out."""
    tokens: int
    """Tokens predicted."""
    characters: int

    def plain(self) -> dict[str, Any]:
        """All of it, with what compares models of different tokenizers: bits for each character."""
        bits = self.loss * self.tokens / math.log(2) / max(1, self.characters)
        scores = {"perplexity": math.exp(self.loss), "loss": self.loss, "bits_per_character": bits}
        return {"scores": scores, "tokens": self.tokens}


def perplexity(stored: StoredModel, rows: Sequence[Row]) -> Perplexity:
    """Loss of a causal language model on raw text, packed as it was trained (512 tokens elsewhere)."""
    from luthier.engine.devices import choose_machine
    from luthier.models.load import as_network
    from luthier.objectives import CausalLM
    from luthier.store import models as store

    trained = store.objective_of(stored)
    objective = trained if isinstance(trained, CausalLM) else CausalLM()
    if trained.task != "causal_lm":
        raise RecipeError(f"{stored.id} is no causal language model, so raw text has no perplexity")
    chat = store.chat_format(stored)
    context = store.room_of(stored)
    encoded = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    sequences = objective.arrange(encoded, context)
    machine = choose_machine()
    model = store.load(stored, machine.dtype, machine.device)
    network = as_network(model, machine.device, machine.dtype)
    groups: list[list[Example]] = [sequences[i : i + 64] for i in range(0, len(sequences), 64)]
    weights = [sum(example.weight for example in group) for group in groups]
    losses = [objective.mean_loss(network, group, BUDGET) for group in groups]
    total = math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    characters = sum(len(row.text or "") for row in rows)
    return Perplexity(total / sum(weights), int(sum(weights)), characters)
