"""The reference model, and token indices of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

from luthier.adaptations import ADAPTATIONS
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import CAUSAL_LM, Head
from luthier.models.networks.network import Network
from luthier.objectives.logprobs import mean_nll, token_logps
from luthier.types import Example

CPU = torch.device("cpu")


def rows() -> list[Example]:
    ids = [[5, 6, 7, 8, 9], [5, 6, 7, 3], [5, 6, 7, 8, 4, 2], [9, 8]]
    return [
        Example(np.array(i), np.array([0, *[1] * (len(i) - 1)], dtype=np.float32), n)
        for n, i in enumerate(ids)
    ]


def ready(folder: Path, adaptation: str) -> Network:
    torch.manual_seed(0)
    model: Any = load_model(folder, torch.float32, CPU)
    ADAPTATIONS[adaptation]().attach(model)
    return as_network(model, CPU, torch.float32)


def test_network_context_matches_folder_context(
    family_folder: Callable[[str], Path],
) -> None:
    for family, head in (("gpt2", CAUSAL_LM), ("t5", CAUSAL_LM), ("roberta", Head("masked_lm"))):
        folder = family_folder(family)
        network = as_network(load_model(folder, torch.float32, CPU, head), CPU, torch.float32)
        assert network.context == ModelFolder(folder).context
    network = as_network(load_model(family_folder("llama"), torch.float32, CPU), CPU, torch.float32)
    network.model.config = PretrainedConfig()  # as of networks without positions
    del network.context
    assert network.context > 1_000_000


@pytest.mark.parametrize("adaptation", ["lora", "full", "prompt", "sparse"])
def test_reference_is_network_at_start(
    adaptation: str, family_folder: Callable[[str], Path]
) -> None:
    network = ready(family_folder("llama"), adaptation)
    network.remember_start()
    before = mean_nll(network, rows(), 100)
    for weight in network.model.parameters():
        if weight.requires_grad:
            weight.data.add_(0.05 * torch.randn_like(weight))
    moved = mean_nll(network, rows(), 100)
    network.model.train()
    with network.at_start():
        assert not torch.is_grad_enabled() and not network.model.training
        assert mean_nll(network, rows(), 100) == before
    assert network.model.training and torch.is_grad_enabled()
    assert mean_nll(network, rows(), 100) == moved != before


@pytest.mark.parametrize("budget", [6, 1000])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_batched_log_probabilities_match_single_rows(
    family: str, budget: int, family_folder: Callable[[str], Path]
) -> None:
    network = ready(family_folder(family), "full")
    examples = rows()
    if family == "t5":
        examples = [
            Example(e.ids_T, e.weight_T, e.row, source_T=np.array([4, 5, 1])) for e in examples
        ]
    alone = {
        e.row: token_logps(network, next(network.batches([e], 100))).detach() for e in examples
    }
    seen = set()
    for batch in network.batches(examples, budget):
        logp_M = token_logps(network, batch).detach()
        row_M = batch.learned_edges[0]
        for place, example in enumerate(batch.tree.examples):
            mine = logp_M[row_M == place]
            torch.testing.assert_close(mine, alone[example.row], rtol=1e-5, atol=1e-5)
            seen.add(example.row)
    assert seen == {0, 1, 2, 3}
