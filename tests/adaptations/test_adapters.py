"""Bottleneck adapters and BitFit: where they are, what they compute, how many weights they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.adaptations import Adapters, BitFit
from luthier.adaptations.adapter_layer import Bottleneck
from luthier.errors import RecipeError
from luthier.models.load import load_model
from luthier.objectives import MaskedLM

CPU = torch.device("cpu")


def network(folder: Path, family: str) -> Any:
    if family in ("llama", "gpt2"):
        return load_model(folder, torch.float32, CPU)
    return load_model(folder, torch.float32, CPU, MaskedLM().head())


@pytest.mark.parametrize(
    ("placement", "family", "count"),
    [
        ("pfeiffer", "llama", 4),
        ("houlsby", "llama", 8),
        ("pfeiffer", "gpt2", 3),
        ("houlsby", "gpt2", 6),
        ("pfeiffer", "bert", 3),
        ("houlsby", "bert", 6),
        ("houlsby", "roberta", 6),
        ("pfeiffer", "albert", 1),
        ("houlsby", "albert", 2),
    ],
)
def test_a_bottleneck_ends_each_sublayer(
    placement: Any, family: str, count: int, family_folder: Callable[[str], Path]
) -> None:
    model = network(family_folder(family), family)
    ids = torch.arange(6, 14)[None]
    model.eval()
    before = model(input_ids=ids).logits
    Adapters(placement=placement, reduction_factor=8).attach(model)
    found = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert len(found) == count
    assert all(m.adapter_down.weight.shape == (4, 32) for m in found)
    # Zero at the start: the network is the base network.
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_bottleneck_by_its_formula() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = Bottleneck(base, 5, 3, "relu")
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randn(7, 6)
    y = x @ base.weight.t() + base.bias
    narrow = (y @ layer.adapter_down.weight.t() + layer.adapter_down.bias).clamp(min=0)
    expected = y + narrow @ layer.adapter_up.weight.t() + layer.adapter_up.bias
    torch.testing.assert_close(layer(x), expected)


def test_bitfit_trains_biases_and_nothing_else(family_folder: Callable[[str], Path]) -> None:
    model = network(family_folder("gpt2"), "gpt2")
    BitFit().attach(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == name.endswith(".bias")
        assert not weight.requires_grad or weight.dim() == 1


def test_bitfit_says_what_to_use_where_there_are_no_biases(
    tiny_llama: Callable[..., Any],
) -> None:
    with pytest.raises(RecipeError, match=r"type llama have none\. Use lora"):
        BitFit().attach(tiny_llama())
