"""Sparse tuning: trained weights, gradients, and stored weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from luthier.adaptations import Sparse
from luthier.adaptations.sparse_layer import SparseLinear
from luthier.engine.loop import row_gradients
from luthier.engine.memory import estimate_memory
from luthier.engine.metrics import Reporter
from luthier.errors import CorruptFile
from luthier.models.formats.save import load_adapter, save_adapter
from luthier.models.load import as_network
from luthier.recipe import Training
from luthier.types import Example

SPARSE = Sparse(share=0.02)
FISHER = Sparse(share=0.02, mask="fisher", fisher_rows=3)


def moved(model: Any) -> Any:
    """Attach, and change each trained value as a step would."""
    SPARSE.attach(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_largest_weights_of_each_layer_change(
    family: str, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    base = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]()
    model = moved(copy.deepcopy(base))
    wrapped = [n for n, module in model.named_modules() if isinstance(module, SparseLinear)]
    assert len(wrapped) == {"llama": 28, "gpt2": 12}[family]
    SPARSE.merge(model)
    after = model.state_dict()
    for name, weight in base.state_dict().items():
        changed = weight != after[name]
        if name.removesuffix(".weight") not in wrapped or name.endswith("bias"):
            assert not changed.any(), name
            continue
        assert int(changed.sum()) == round(0.02 * weight.numel()), name
        assert weight.abs()[changed].min() >= weight.abs()[~changed].max(), name


@pytest.mark.parametrize("transposed", [False, True])
def test_layer_and_gradients_match_dense_autograd(
    transposed: bool,
) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base: Any = Conv1D(5, 6) if transposed else nn.Linear(6, 5)
    layer = SparseLinear(base.double().requires_grad_(False), share=0.3)
    nn.init.normal_(layer.values)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 5, dtype=torch.float64)
    found = layer(x)
    found.backward(grad)
    again, weight = x.detach().clone().requires_grad_(), base.weight.clone()
    weight.view(-1)[layer.places.long()] = layer.values.detach()
    weight.requires_grad_()
    expected = F.linear(again, weight.t() if transposed else weight, base.bias)
    expected.backward(grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, again.grad)
    assert weight.grad is not None and layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, weight.grad.view(-1)[layer.places.long()])
    assert len(layer.places) == 9 and not base.weight.requires_grad


def network_and_rows(model: Any) -> tuple[Any, Any, list[Example]]:
    """Return a network with ``FISHER`` attached, the gradient source, and the rows."""
    from luthier.objectives import SFT

    draw = np.random.default_rng(0)
    examples = []
    for row in range(5):
        ids = np.concatenate([[7, 8, 9], draw.integers(10, 60, 3 + row)])
        weight = (np.arange(len(ids)) > 2).astype(np.float32)
        examples.append(Example(ids, weight, row))
    network = as_network(model, torch.device("cpu"), torch.float32)
    FISHER.attach(model)
    training = Training(batch_size=2, micro_batch_tokens=8, shuffle=False)
    return network, row_gradients(network, SFT(), examples, training, Reporter()), examples


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_information_sums_squared_row_gradients(
    family: str, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]()
    plain = copy.deepcopy(model).eval()
    network, gradients, examples = network_and_rows(model)
    FISHER.calibrate(network, gradients)
    scores = {name: torch.zeros_like(weight) for name, weight in plain.named_parameters()}
    for example in examples[:3]:
        ids = torch.from_numpy(example.ids_T)
        logp_TV = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        plain.zero_grad()
        logp_TV[torch.arange(2, len(ids) - 1), ids[3:]].sum().backward()
        for name, weight in plain.named_parameters():
            scores[name] += weight.grad.square()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(layers) == {"llama": 28, "gpt2": 12}[family]
    for name, layer in layers.items():
        score = scores[f"{name}.weight"].view(-1)
        expected = torch.topk(score, round(0.02 * len(score))).indices.sort().values
        assert torch.equal(layer.places.long(), expected), name
        assert torch.equal(layer.values, layer.base_layer.weight.view(-1)[expected])
        largest = SparseLinear(layer.base_layer, 0.02).places
        assert not torch.equal(layer.places, largest), name
    trained = {n for n, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"{name}.values" for name in layers}
    assert all(weight.grad is None for weight in model.parameters())


def test_the_memory_of_scoring_is_part_of_the_estimate(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    FISHER.attach(model)
    SPARSE.attach(other := tiny_llama())
    linear = sum(w.numel() for n, w in tiny_llama().named_parameters() if "_proj" in n)
    assert FISHER.calibration_bytes(model) == 8 * linear
    assert SPARSE.calibration_bytes(other) == 0
    estimate, bare = estimate_memory(model, 4, 0, 10**9), estimate_memory(model, 4)
    assert estimate.fixed == bare.fixed and estimate.least > 10**9 > bare.least


def test_only_places_and_values_are_stored(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    model = moved(copy.deepcopy(base))
    save_adapter(model, SPARSE, SPARSE.adapter_config(model, "some/base"), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"places", "values"}
    weights = sum(w.numel() for n, w in base.named_parameters() if "_proj" in n)
    assert sum(t.nbytes for t in stored.values()) < 8.1 * 0.02 * weights

    # In bfloat16 many weights are as large as each other: the places come from the file.
    for dtype in (torch.float32, torch.bfloat16):
        again, wanted = copy.deepcopy(base).to(dtype), copy.deepcopy(model).to(dtype)
        load_adapter(again, SPARSE, tmp_path)
        SPARSE.merge(again)
        SPARSE.merge(wanted)
        theirs = wanted.state_dict()
        assert all(torch.equal(w, theirs[n]) for n, w in again.state_dict().items())


def test_file_with_different_share_is_refused(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = moved(tiny_llama())
    save_adapter(model, SPARSE, SPARSE.adapter_config(model, "some/base"), tmp_path)
    with pytest.raises(CorruptFile) as refused:
        load_adapter(tiny_llama(), Sparse(share=0.1), tmp_path)
    assert refused.value.rule == "weights.layers"


def test_layer_weight_is_the_frozen_weight() -> None:
    base = torch.nn.Linear(4, 3)
    assert SparseLinear(base, 0.5).weight is base.weight
