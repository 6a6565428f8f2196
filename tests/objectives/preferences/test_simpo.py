"""SimPO against the formula, on single rows of a plain transformers model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.shapes.preferences import Preference
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.preferences.simpo import SimPO
from luthier.types import Example, Message

PAIRS = [
    ("What is the capital of France?", "Paris.", "I will not answer the question."),
    ("The lazy dog", "jumps over the quick brown fox", "sleeps"),
    ("My card has not arrived yet.", "When was it sent to you?", "no"),
]


def reward(model: Any, answer: Example, beta: float) -> torch.Tensor:
    logp = model(input_ids=torch.from_numpy(answer.ids_T)[None]).logits[0, :-1].log_softmax(-1)
    places = range(1, len(answer))
    learned = [logp[t - 1, answer.ids_T[t]] for t in places if answer.weight_T[t]]
    return beta * sum(learned[1:], learned[0]) / len(learned)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.7, 0.0), (10.0, 5.5)])
def test_loss_and_gradients_match_formula(
    beta: float, gamma: float, family_folder: Callable[[str], Path]
) -> None:
    folder, cpu = family_folder("llama"), torch.device("cpu")
    objective, chat = SimPO(beta=beta, gamma=gamma), load_chat_format(folder)
    rows = [
        Preference(
            "f",
            line,
            messages=(Message("user", prompt),),
            chosen=(Message("assistant", good),),
            rejected=(Message("assistant", bad),),
        )
        for line, (prompt, good, bad) in enumerate(PAIRS)
    ]
    examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    plain: Any = load_model(folder, torch.float32, cpu, objective.head()).eval()
    network = as_network(copy.deepcopy(plain), cpu, torch.float32)
    expected = torch.zeros(())
    for example in examples:
        assert example.partner is not None
        margin = reward(plain, example, beta) - reward(plain, example.partner, beta)
        expected = expected + torch.log1p(torch.exp(gamma - margin))
    expected.backward()
    found = [objective.loss(network, b) for b in objective.annotate(network, examples, 40)]
    total = sum(loss.total for loss in found)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, other in zip(network.model.parameters(), plain.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7
    chosen = sum(reward(plain, example, beta).item() for example in examples)
    assert sum(loss.metrics["reward_chosen"] for loss in found) == pytest.approx(chosen, rel=1e-5)
