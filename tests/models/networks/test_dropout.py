"""Dropout layers of each family, and the share of dropped numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.dropout import check_dropout, set_dropout
from luthier.models.networks.heads import Head
from luthier.models.networks.network import Network
from luthier.types import Example

CPU = torch.device("cpu")
PLACES = {
    "bert": {"bert.embeddings.dropout", "bert.encoder.layer.*.output.dropout", "dropout"},
    "roberta": {"roberta.embeddings.dropout", "classifier.dropout"},
    "albert": {"dropout"},
    "gpt2": {"transformer.drop", "transformer.h.*.mlp.dropout"},
}
CLASSIFIER = Head("sequence_classification", ("a", "b"))


def network_of(folder: Path) -> Network:
    torch.manual_seed(0)
    return as_network(load_model(folder, torch.float32, CPU, CLASSIFIER), CPU, torch.float32)


def scores(network: Network) -> torch.Tensor:
    rows = [Example(np.arange(40, 50), np.ones(10, np.float32), 0, target=np.zeros(1))]
    with torch.no_grad():
        return network.row_scores(next(network.batches(rows, 100)))


@pytest.mark.parametrize("family", PLACES)
def test_dropout_applies_only_in_training(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    network = network_of(family_folder(family))
    plain = scores(network)
    config = network.model.config.to_dict()
    places = set_dropout(network, 0.5)
    assert set(places) >= PLACES[family]
    assert not any("attention.self" in place or "attn_dropout" in place for place in places)
    assert network.model.config.to_dict() == config
    assert torch.equal(scores(network), plain)
    network.model.train()
    assert not torch.equal(scores(network), scores(network))
    set_dropout(network, 0.0)
    network.model.train()
    assert torch.equal(scores(network), plain)


def test_dropout_share_matches_setting(family_folder: Callable[[str], Path]) -> None:
    network = network_of(family_folder("bert"))
    set_dropout(network, 0.3)
    network.model.train()
    given: list[Any] = []
    dropout = network.model.bert.embeddings.dropout
    dropout.register_forward_hook(lambda _module, _inputs, out: given.append(out))
    for _ in range(40):
        scores(network)
    zeros = torch.cat([out.flatten() for out in given]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_network_without_dropout_is_refused(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("llama")
    with pytest.raises(RecipeError) as refused:
        check_dropout(ModelFolder(folder).sketch(CLASSIFIER))
    assert refused.value.rule == "dropout.none"
    with pytest.raises(RecipeError) as refused:
        set_dropout(network_of(folder), 0.1)
    assert refused.value.rule == "dropout.none"
    check_dropout(ModelFolder(family_folder("bert")).sketch(CLASSIFIER))
