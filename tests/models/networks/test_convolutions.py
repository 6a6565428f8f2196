"""Convolutions in bfloat16 compared with float32, for shapes that oneDNN computes incorrectly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from luthier.models.networks.convolutions import Convolution, fix_convolutions

WRONG = [
    (nn.Conv1d(8, 64, 8), (1, 8, 1137)),
    (nn.Conv1d(24, 64, 4, stride=4), (2, 24, 324)),
    (nn.Conv1d(16, 24, 5, stride=5, padding=2), (1, 16, 2)),
    (nn.Conv2d(64, 32, 5, stride=3, bias=False), (2, 64, 26, 7)),
    (nn.Conv2d(24, 24, 4, stride=4), (3, 24, 22, 24)),
    (nn.Conv2d(32, 32, 3, stride=4, padding=1), (1, 32, 48, 3)),
    (nn.Conv2d(8, 32, 5, stride=3, padding=2, groups=8), (2, 8, 38, 1)),
    (nn.Conv2d(8, 64, 3, padding="same", padding_mode="circular"), (2, 8, 9, 7)),
]
RIGHT = [(nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 7)), (nn.Conv1d(8, 8, 1), (2, 8, 5))]


def gradients(layer: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    y = layer(x)
    torch.manual_seed(seed)
    dy = torch.randn(y.shape, dtype=torch.bfloat16).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy)


@pytest.mark.parametrize(("layer", "shape"), WRONG + RIGHT)
def test_bfloat16_gradients_match_float32(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.bfloat16)
    layer = copy.deepcopy(layer).bfloat16()
    expected = gradients(copy.deepcopy(layer).float(), x.float().requires_grad_())
    fix_convolutions(layer)
    given = gradients(layer, x.requires_grad_())
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other).norm() / other.norm()) < 0.01


def test_uninitialized_memory_does_not_reach_gradients() -> None:
    """The gradient of Wav2Vec2's second convolution, with memory full of nan."""
    torch.manual_seed(0)
    layer = nn.Conv1d(16, 16, 8, stride=4, bias=False).bfloat16()
    fix_convolutions(layer)
    x = torch.randn(2, 16, 1599, dtype=torch.bfloat16, requires_grad=True)
    first = gradients(layer, x)
    for n in range(60):
        written = [
            torch.full((997 * (n + k) + 1,), torch.nan, dtype=torch.bfloat16) for k in range(6)
        ]
        del written
        assert all(one.equal(other) for one, other in zip(gradients(layer, x), first, strict=True))


def test_fixed_convolutions_keep_type_and_weights() -> None:
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), weight_norm(nn.Conv1d(4, 4, 8)))
    names = [type(layer).__name__ for layer in model]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fix_convolutions(model)
    kinds = [type(layer) for layer in model]
    fix_convolutions(model)
    assert kinds == [type(layer) for layer in model]
    assert names == [kind.__name__ for kind in kinds]
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[0], Convolution)
    assert before.keys() == model.state_dict().keys()
    assert model[1].bfloat16()(torch.ones(1, 4, 30, dtype=torch.bfloat16)).isfinite().all()
    new = kinds[0](3, 2, 5, padding=2)  # as the low-rank branch of a convolution is made
    x = torch.randn(1, 3, 6, 6)
    assert new(x).equal(nn.functional.conv2d(x, new.weight, new.bias, padding=2))
