"""The LoRA layer: computation, rounding, and merging."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.adaptations.lora_layer import DoRALinear, LoRALinear, _LowRankLinears
from luthier.models.networks.layers import read_together
from luthier.models.rounding import Rounding


def test_merged_weight_is_base_plus_scaled_product() -> None:
    base = nn.Linear(6, 5)
    start = base.weight.detach().clone()
    layer = LoRALinear(base, rank=2, scale=0.5, dropout=0.0)
    nn.init.normal_(layer.lora_B.weight)
    merged = layer.merge(Rounding())
    expected = start + 0.5 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(merged.weight, expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_merge_is_unbiased_and_deterministic() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(256, 256).bfloat16(), rank=1, scale=1.0, dropout=0.0)
    nn.init.constant_(layer.lora_A.weight, 0.01)
    nn.init.constant_(layer.lora_B.weight, 0.01)
    start = layer.base_layer.weight.detach().float().clone()
    update = layer.lora_B.weight[0, 0].item() * layer.lora_A.weight[0, 0].item()
    first = copy.deepcopy(layer).merge(Rounding()).weight
    again = copy.deepcopy(layer).merge(Rounding()).weight
    assert first.dtype == torch.bfloat16 and torch.equal(first, again)
    assert (first.float() - start).mean().item() == pytest.approx(update, rel=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_gradients_match_formula(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, a, b = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((3, 6), (5, 6), (2, 6), (5, 2))
    )
    added = torch.randn(5, dtype=torch.float64) if bias else None
    for tensor in (x, a, b):
        tensor.requires_grad_()

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Any:
        frozen = SimpleNamespace(weight_OI=weight, scale=0.7)
        return _LowRankLinears.apply(x, [frozen], [added], a, b)[0]

    expected = x @ (weight + 0.7 * b @ a).t() + (0 if added is None else added)
    torch.testing.assert_close(layer(x, a, b), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x, a, b))


def test_joint_lora_layers_match_separate_layers() -> None:
    torch.manual_seed(0)
    layers = [
        LoRALinear(nn.Linear(6, out, bias=bias).double(), rank, scale, dropout=0.0)
        for out, bias, rank, scale in ((5, True, 2, 0.7), (3, False, 4, 2.0), (8, True, 1, 1.5))
    ]
    weights = [weight for each in layers for weight in (each.lora_A.weight, each.lora_B.weight)]
    for weight in weights:
        nn.init.normal_(weight)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    apart, together = [each(x) for each in layers], read_together(layers, x)
    assert LoRALinear.read_together(layers, x) is not None
    for mine, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    factors = [torch.randn_like(each) for each in apart]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((y * f).sum() for y, f in zip(outputs, factors, strict=True))
        return torch.autograd.grad(total, [x, *weights])

    for mine, expected in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", ["dropout", "dora", "plain", "hook", "pre-hook"])
def test_layers_with_hooks_run_separately(other: str) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [LoRALinear(nn.Linear(6, 5), 2, 1.0, dropout=0.0) for _ in range(2)]
    called: list[Any] = []
    if other == "hook":
        layers[1].register_forward_hook(lambda *_: called.append(1))
    elif other == "pre-hook":
        layers[1].register_forward_pre_hook(lambda *_: called.append(1))
    else:
        layers[1] = {
            "dropout": LoRALinear(nn.Linear(6, 5), 2, 1.0, dropout=0.5),
            "dora": DoRALinear(nn.Linear(6, 5), 2, 1.0, dropout=0.0),
            "plain": nn.Linear(6, 5),
        }[other]
    x = torch.randn(3, 6)
    assert LoRALinear.read_together(layers, x) is None
    torch.manual_seed(1)
    expected = [layer(x) for layer in layers]
    torch.manual_seed(1)
    assert all(map(torch.equal, read_together(layers, x), expected))
    assert len(called) == (2 if "hook" in other else 0)


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
@pytest.mark.parametrize("bias", [True, False])
def test_small_update_survives_large_output(bias: bool, dropout: float) -> None:
    """In bfloat16 the update is below half the spacing of most outputs; on average all of it
    counts."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(576, 576, bias=bias).bfloat16(), 16, scale=2.0, dropout=dropout)
    nn.init.normal_(layer.base_layer.weight, std=576**-0.5)
    nn.init.normal_(layer.lora_B.weight, std=2e-4)
    layer.requires_grad_(False)
    x = torch.randn(512, 576).bfloat16()
    found = layer(x)
    a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    update = 2.0 * (x.double() @ a.t()).bfloat16().double() @ b.t()
    base = F.linear(x.double(), *(p.double() for p in layer.base_layer.parameters()))

    def kept(y: Tensor) -> float:
        """Return the share of the update in ``y``, by projection."""
        return float(((y.double() - base) * update).sum() / update.square().sum())

    assert kept(found) == pytest.approx(1.0, abs=0.02)
    if not bias:  # the error to catch: the update added to a rounded output
        twice = F.linear(x, layer.base_layer.weight) + update.bfloat16()
        assert kept(twice) - kept(F.linear(x, layer.base_layer.weight)) < 0.9


def test_dropout_falls_on_the_input_of_the_branch() -> None:
    layer = LoRALinear(nn.Linear(64, 5), rank=3, scale=2.0, dropout=0.5)
    nn.init.normal_(layer.lora_B.weight)
    layer.requires_grad_(False)
    x = torch.randn(7, 64)
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    dropped = layer.dropout(x)
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    branch = dropped @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()
    expected = layer.base_layer(x) + 2.0 * branch
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    full = layer.base_layer(x) + 2.0 * x @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()
    assert float((found - full).norm()) > 0.1 * float(full.norm())
    torch.testing.assert_close(layer.eval()(x), full, rtol=1e-5, atol=1e-5)
