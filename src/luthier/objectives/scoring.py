"""What a reward model, loaded beside the network that trains, says of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.graders import Answer
from luthier.models.heads import task_of
from luthier.objectives.reward_model import RewardModel
from luthier.types import Message, Row

if TYPE_CHECKING:
    from luthier.models.network import Network

READ_AT_ONCE = 2048
"""Tokens that a reward model reads at once."""


def check_reward_model(name: str, network: Network) -> None:
    """Refuse a model that does not give one number for a text."""
    if task_of(network.model) != "sequence_classification" or network.model.config.num_labels != 1:
        raise RecipeError(f"{name} is no reward model; train one with --objective reward_model")


def rewards(network: Network, answers: Sequence[Answer]) -> list[float]:
    """A number for each answer, read in the reward model's own format and by its own tokenizer.

    Of a text that is longer than its context it reads the beginning.
    """
    import torch

    objective, chat = RewardModel(), network.chat
    assert chat is not None
    context = int(getattr(network.model.config, "max_position_embeddings", 0) or 1 << 30)
    examples = []
    for place, answer in enumerate(answers):
        turns = (*answer.prompt, Message("assistant", answer.reply))
        row = Row(answer.row.file, answer.row.line, messages=turns)
        examples.append(objective.cut(objective.encode(row, place, chat), context))
    found = [0.0] * len(answers)
    network.model.eval()
    with torch.no_grad():
        for batch in network.batches(examples, READ_AT_ONCE):
            scores = network.row_scores(batch).float()[:, 0].tolist()
            for example, score in zip(batch.tree.examples, scores, strict=True):
                found[example.row] = score
    return found
