"""Fused modules compared with transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from luthier.models.networks.fused import Dropout, RMSNorm, SwiGLU, fuse


def outcome(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return output and all gradients of one forward and backward pass."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad)
    found = {"output": y.detach(), "input": x.grad}
    return found | {name: weight.grad.clone() for name, weight in module.named_parameters()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert value.dtype == expected[name].dtype and float(error) < tolerance, name


def llama_norm(size: int) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(size, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    return norm


def llama_mlp() -> LlamaMLP:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    return LlamaMLP(LlamaConfig(**sizes, mlp_bias=True))


def swiglu_of(mlp: LlamaMLP) -> SwiGLU:
    return SwiGLU(mlp.gate_proj, mlp.up_proj, mlp.down_proj)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_rms_norm_matches_transformers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = llama_norm(24).to(dtype)
    x, grad = (torch.randn(2, 5, 24) * 0.1).to(dtype), torch.randn(2, 5, 24).to(dtype)
    fused = RMSNorm(norm.weight, norm.variance_epsilon)
    assert_near(outcome(fused, x, grad), outcome(norm, x, grad), tolerance)


def test_rms_norm_gradients_match_formula() -> None:
    torch.manual_seed(1)
    x, weight, grad = torch.randn(7, 12), torch.randn(12), torch.randn(7, 12)
    fused = outcome(RMSNorm(nn.Parameter(weight.clone()), 0.1), x, grad)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = weight64 * x64 / (x64.square().mean(-1, keepdim=True) + 0.1).sqrt()
    y64.backward(grad.double())
    for name, expected in (
        ("output", y64.detach()),
        ("input", x64.grad),
        ("weight", weight64.grad),
    ):
        torch.testing.assert_close(fused[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_with_frozen_weight_passes_input_gradient() -> None:
    norm = llama_norm(8)
    fused = RMSNorm(norm.weight.requires_grad_(False), norm.variance_epsilon)
    x = torch.randn(3, 8, requires_grad=True)
    fused(x).sum().backward()
    plain = x.detach().clone().requires_grad_()
    norm(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-5, atol=1e-6)
    assert norm.weight.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.015)])
def test_swiglu_matches_transformers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(2)
    mlp = llama_mlp().to(dtype)
    x, grad = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24).to(dtype)
    assert_near(outcome(swiglu_of(mlp), x, grad), outcome(mlp, x, grad), tolerance)


def test_swiglu_gradients_pass_gradcheck() -> None:
    torch.manual_seed(3)
    mlp = llama_mlp().double()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_of(mlp), (x,))


def test_fuse_replaces_norms_and_mlps_of_llama(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    names = list(model.state_dict())
    weights = dict(model.named_parameters())
    assert fuse(model) == 4 * (2 + 1) + 1
    assert isinstance(model.model.norm, RMSNorm)
    assert isinstance(model.model.layers[3].mlp, SwiGLU)
    assert list(model.state_dict()) == names
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert fuse(model) == 0


def test_fuse_leaves_gemma_alone() -> None:
    torch.manual_seed(0)
    model = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    ids = torch.arange(10)[None]
    before = [type(module) for module in model.modules()]
    with torch.no_grad():
        logits = model(ids).logits
        assert fuse(model) == 0
        assert torch.equal(model(ids).logits, logits)
    assert [type(module) for module in model.modules()] == before


class OnePlusRMSNorm(nn.Module):
    """Named and shaped as Llama's, with Gemma's mathematics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_fuse_replaces_only_equal_modules() -> None:
    model = nn.Sequential(OnePlusRMSNorm(), LlamaRMSNorm(8))
    assert fuse(model) == 1
    assert isinstance(model[0], OnePlusRMSNorm) and isinstance(model[1], RMSNorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_keeps_share_and_mean(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(333, 301, dtype=dtype, requires_grad=True)
    parent = fuse_one(nn.Dropout(share))
    y = parent(x)
    assert isinstance(parent, Dropout) and y.dtype == dtype
    kept = y.detach() != 0
    assert float(kept.float().mean()) == pytest.approx(1 - share, abs=0.004)
    assert float(y.detach()[kept].float().mean()) == pytest.approx(1 / (1 - share), rel=0.004)
    # Neighbours are dropped apart from each other.
    both = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert float(both) == pytest.approx((1 - share) ** 2, abs=0.01)
    y.backward(torch.ones_like(y) * 3)
    assert x.grad is not None and torch.equal(x.grad, (y * 3).detach())
    torch.manual_seed(0)
    assert torch.equal(parent(x), y) and not torch.equal(parent(x), y)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_dropout_is_identity_outside_training(share: float) -> None:
    x = torch.randn(5, 7)
    dropout = fuse_one(nn.Dropout(share))
    assert torch.equal(dropout.eval()(x), x)
    dropout.p = 0.0  # as in a run
    assert torch.equal(dropout.train()(x), x)
    dropout.p = 1.0
    assert not dropout(x).any()


def fuse_one(module: nn.Module) -> Any:
    """Return the replacement that :func:`fuse` chooses for ``module``."""
    parent = nn.Sequential(module)
    fuse(parent)
    return parent[0]
