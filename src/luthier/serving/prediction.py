"""Reading with a model: labels, ratings and tags for texts, on the flat layout it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network
    from luthier.objectives import Objective
    from luthier.store.models import StoredModel

BUDGET = 2048
"""Tokens read at once."""


class Predictor:
    """One model in memory that answers with labels, ratings or tags."""

    def __init__(
        self, network: Network, objective: Objective, chat: ChatFormat, context: int
    ) -> None:
        self.network, self.objective, self.chat, self.context = network, objective, chat, context
        network.model.eval()

    @staticmethod
    def open(stored: StoredModel, chat: ChatFormat | None = None) -> Predictor:
        """Load ``stored`` on the best device of this machine; ``chat`` stands for its own format."""
        from luthier.engine.devices import choose_machine
        from luthier.models.load import as_network
        from luthier.store.models import chat_format, load, objective_of, room_of

        objective = objective_of(stored)
        if not objective.reads:
            raise RecipeError(
                f"{stored.id} writes text, it was not trained to give labels. Use luthier generate."
            )
        machine = choose_machine()
        model = load(stored, machine.dtype, machine.device)
        network = as_network(model, machine.device, machine.dtype)
        return Predictor(network, objective, chat or chat_format(stored), room_of(stored))

    def answers(
        self, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
    ) -> list[dict[str, Any]]:
        """What the model says of each row, in the order given; what rows say themselves is not read."""
        import torch

        examples = [self._encode(row, index) for index, row in enumerate(rows)]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        finished = 0
        with torch.inference_mode():
            for batch in self.network.batches(examples, BUDGET):
                found = self.objective.answers(self.network, batch)
                for example, answer in zip(batch.tree.examples, found, strict=True):
                    answers[example.row] = answer
                finished += len(found)
                done(finished)
        return answers

    def scores(
        self, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Answers to ``rows``, and how good they are by what the rows say."""
        from luthier.evaluation.labels import scores
        from luthier.evaluation.retrieval import retrieval_scores

        if rows and "preference" in self.objective.shapes:
            return self._preferences(rows, done)
        answers = self.answers(rows, done)
        if not rows or rows[0].positive is None:
            return scores(rows, answers), answers
        partners = self.answers([replace(row, text=row.positive) for row in rows])
        found = [answer["embedding"] for answer in answers]
        return retrieval_scores(found, [answer["embedding"] for answer in partners]), answers

    def _preferences(
        self, rows: Sequence[Row], done: Callable[[int], None]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Rewards of both answers of each pair, and how often the chosen one has the higher."""
        from luthier.evaluation.preferences import ranking_scores

        if any(row.reply is None for row in rows):
            raise RecipeError(
                "a reward model is measured on chosen and rejected answers or ratings"
            )
        pairs = self.objective.gather(rows)
        chosen = self.answers([replace(row, rejected=None) for row in pairs], done)
        rejected = self.answers([replace(row, reply=row.rejected, rejected=None) for row in pairs])
        found = [(c["reward"], r["reward"]) for c, r in zip(chosen, rejected, strict=True)]
        answers = [
            {"line": row.line, "chosen": c, "rejected": r}
            for row, (c, r) in zip(pairs, found, strict=True)
        ]
        return ranking_scores(found, "reward"), answers

    def _encode(self, row: Row, index: int) -> Any:
        if row.text is None and row.tokens is None and "preference" not in self.objective.shapes:
            raise RecipeError(
                f"row {index + 1} is an answer to a prompt, and this model reads texts"
            )
        plain = replace(row, label=None, rating=None, tags=None, positive=None)
        example = self.objective.encode(plain, index, self.chat)
        if len(example) > self.context:
            raise RecipeError(
                f"row {index + 1} has {len(example)} tokens, more than the model's context of "
                f"{self.context}. Shorten it."
            )
        return example
