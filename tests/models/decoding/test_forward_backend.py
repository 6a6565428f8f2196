"""Batched sequences of networks with their own cache, compared with single sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.models.decoding.forward_backend import ForwardBackend
from luthier.models.load import as_network, load_model
from model_families import DECODERS

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 5 + size) % 200 + 3 for size in (3, 17, 9)]
TOKENS = [[20 + 7 * row + 3 * step for step in range(6)] for row in range(3)]
"""Fixed tokens per row: greedy decoding would often repeat one token."""


@pytest.fixture(params=["t5", "transfo_xl", "bamba", "recurrentgemma"])
def backend(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Any:
    torch.manual_seed(0)
    # Attention layers next to recurrent layers, whose state is in a cache or in the modules.
    for family in (each for each in DECODERS if each.id == request.param):
        model: Any = AutoModelForCausalLM.from_config(family.config()).eval()
        break
    else:
        model = load_model(family_folder(request.param), torch.float32, CPU).eval()
    return ForwardBackend(as_network(model, CPU, torch.float32), 256)


def alone(backend: ForwardBackend, row: int) -> list[torch.Tensor]:
    """Return logits after a prompt and after each token."""
    state = backend.open(PROMPTS[row])
    (first,) = backend.prefill([state])
    assert first is not None
    return [first, *(backend.step([state], [token])[0] for token in TOKENS[row])]


def test_batched_rows_match_single_rows(backend: ForwardBackend) -> None:
    expected = [alone(backend, row) for row in range(3)]
    states, logits = backend.prefill_batch(PROMPTS, 1)
    rows = [0, 1, 2]
    torch.testing.assert_close(logits, torch.stack([steps[0] for steps in expected]))
    for at in range(6):
        if at == 2:  # the row of the longest prompt ends first
            backend.free(states[rows.index(1)])
            states, rows = [states[0], states[2]], [0, 2]
        if at == 4:  # and now in another order
            states, rows = states[::-1], rows[::-1]
        logits = backend.step(states, [TOKENS[row][at] for row in rows])
        torch.testing.assert_close(logits, torch.stack([expected[row][at + 1] for row in rows]))


def test_copies_of_a_prompt_continue_independently(backend: ForwardBackend) -> None:
    states, logits = backend.prefill_batch(PROMPTS[:2], 2)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    other = [token + 1 for token in TOKENS[0]]
    for at in range(6):
        tokens = [TOKENS[0][at], other[at], TOKENS[1][at], TOKENS[1][at]]
        logits = backend.step(states, tokens)
    torch.testing.assert_close(logits[0], alone(backend, 0)[-1])
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[3])
