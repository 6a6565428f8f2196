"""The small residual network compared with a plain computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from luthier.media.networks import small_cnn as net
from luthier.media.networks.image_stages import GroupNorm
from luthier.models.networks import classic as nets


def make(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": (16, 32), "num_labels": 3, "image_size": 12} | fields
    model: Any = net.SmallCNNForImageClassification(net.Config(**sizes))
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups of 16 channels of one image ``[C, H, W]`` to mean 0 and deviation 1."""
    groups = x.reshape(-1, 16, *x.shape[1:])
    mean = groups.mean((1, 2, 3), keepdim=True)
    variance = ((groups - mean) ** 2).mean((1, 2, 3), keepdim=True)
    normal = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def plain(model: Any, image: Tensor) -> Tensor:
    w = {name: value.double() for name, value in model.state_dict().items()}

    def step(name: str, x: Tensor, number: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x[None], w[f"{name}.conv{number}.weight"], None, stride, 1)[0]
        return normalize(x, w[f"{name}.norm{number}.weight"], w[f"{name}.norm{number}.bias"])

    body = "small_cnn"
    stride = model.config.stem_stride
    x = F.conv2d(image.double()[None], w[f"{body}.stem.weight"], None, stride, 1)[0]
    x = normalize(x, w[f"{body}.norm.weight"], w[f"{body}.norm.bias"]).clamp(min=0)
    for number in range(len(model.small_cnn.blocks)):
        name = f"{body}.blocks.{number}"
        step_of = 1 if number < model.config.depth else 1 + (number % model.config.depth == 0)
        beside = x
        if f"{name}.shortcut.weight" in w:
            beside = F.conv2d(x[None], w[f"{name}.shortcut.weight"], None, step_of)[0]
        inside = step(name, step(name, x, "1", step_of).clamp(min=0), "2")
        x = (inside + beside).clamp(min=0)
    return w["classifier.weight"] @ x.flatten(1).max(1).values + w["classifier.bias"]


@pytest.mark.parametrize(
    "fields", [{}, {"depth": 2}, {"num_channels": 1, "stem_stride": 2}], ids=str
)
def test_scores_match_formulas(fields: dict[str, int]) -> None:
    model = make(**fields)
    image = torch.randn(model.config.num_channels, 13, 18)
    with torch.no_grad():
        given = model(pixel_values=image[None]).logits[0].double()
    assert torch.allclose(given, plain(model, image), atol=1e-4)


def test_batched_rows_match_single_rows() -> None:
    model = make()
    model.dropout.p = 0.0
    images = torch.randn(5, 3, 12, 12) * torch.tensor([1, 10, 0.1, 3, 1])[:, None, None, None]
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            together = model(pixel_values=images).logits
            alone = torch.cat([model(pixel_values=image[None]).logits for image in images])
        assert torch.allclose(together, alone, atol=1e-5)


def test_group_norm_gradient_without_input_gradient() -> None:
    """Torch's own group norm ends the process there, where channels come last."""
    norm = GroupNorm(32).to(memory_format=torch.channels_last)
    image = torch.randn(4, 32, 5, 4).to(memory_format=torch.channels_last)
    inner = image.clone().requires_grad_()
    wanted = torch.autograd.grad(norm(inner).square().sum(), [norm.weight, norm.bias, inner])[:2]
    found = torch.autograd.grad(norm(image).square().sum(), [norm.weight, norm.bias])
    torch.testing.assert_close(found, wanted)
    norm.weight.requires_grad_(False)
    (alone,) = torch.autograd.grad(norm(image).square().sum(), [norm.bias])
    torch.testing.assert_close(alone, wanted[1])


def test_random_weights_separate_rows() -> None:
    """With means instead of maxima, training made no progress for a hundred steps."""
    torch.manual_seed(0)
    model = net.SmallCNNModel(net.Config())
    with torch.no_grad():
        state_RH = model(torch.randn(16, 3, 32, 32)).pooler_output
    assert (state_RH.std(0).mean() / state_RH.mean()) > 0.1


def test_transformers_loads_saved_model(tmp_path: Path) -> None:
    model = make()
    nets.register("small_cnn")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert (again(image).logits == model(image).logits).all()
