"""EfficientNet-Lite0 compared with a plain computation of the paper's table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.media.networks import efficientnet_lite as net
from luthier.models.load import as_network
from luthier.models.networks import classic as nets

BLOCKS = [  # expansion, input, output, stride, kernel of each of the 16 blocks, written out
    (1, 32, 16, 1, 3), (6, 16, 24, 2, 3), (6, 24, 24, 1, 3), (6, 24, 40, 2, 5), (6, 40, 40, 1, 5),
    (6, 40, 80, 2, 3), (6, 80, 80, 1, 3), (6, 80, 80, 1, 3), (6, 80, 112, 1, 5),
    (6, 112, 112, 1, 5), (6, 112, 112, 1, 5), (6, 112, 192, 2, 5), (6, 192, 192, 1, 5),
    (6, 192, 192, 1, 5), (6, 192, 192, 1, 5), (6, 192, 320, 1, 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a network with random weights and trained batch norm statistics."""
    torch.manual_seed(0)
    made: Any = net.EfficientNetLiteForImageClassification(net.Config(num_labels=7))
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return made.eval()


def plain(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """Scores of an image ``[3, H, W]``, in float64, each filter by unfolding."""

    def convolve(name: str, x: Tensor, stride: int, single: bool = False) -> Tensor:
        kernel = weights[f"{name}.0.weight"].double()
        size, (height, width) = kernel.shape[-1], x.shape[-2:]
        out = [-(-side // stride) for side in (height, width)]
        missing = [
            max(0, (o - 1) * stride + size - side)
            for o, side in zip(out, (height, width), strict=True)
        ]
        grown = torch.zeros(x.shape[0], height + missing[0], width + missing[1], dtype=x.dtype)
        top, left = missing[0] // 2, missing[1] // 2
        grown[:, top : top + height, left : left + width] = x
        parts = grown.unfold(1, size, stride).unfold(2, size, stride)  # [C, H', W', k, k]
        if single:
            found = torch.einsum("chwij,cij->chw", parts, kernel[:, 0])
        else:
            found = torch.einsum("chwij,ocij->ohw", parts, kernel)
        norm = [weights[f"{name}.1.{part}"].double()[:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")]  # fmt: skip
        return (found - norm[0]) / (norm[1] + 1e-3).sqrt() * norm[2] + norm[3]

    body = "efficientnet_lite"
    x = convolve(f"{body}.stem", image.double(), 2).clamp(0, 6)
    for number, (expansion, inner, outer, stride, _) in enumerate(BLOCKS):
        name, before = f"{body}.blocks.{number}", x
        if expansion > 1:
            x = convolve(f"{name}.expand", x, 1).clamp(0, 6)
        x = convolve(f"{name}.depthwise", x, stride, single=True).clamp(0, 6)
        x = convolve(f"{name}.project", x, 1)
        if stride == 1 and inner == outer:
            x = x + before
    x = convolve(f"{body}.top", x, 1).clamp(0, 6).mean((1, 2))
    return weights["classifier.weight"].double() @ x + weights["classifier.bias"].double()


@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_scores_match_formulas(model: Any, size: tuple[int, int]) -> None:
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = model(pixel_values=image[None]).logits[0].double()
    expected = plain(model.state_dict(), image)
    assert (given - expected).norm() / expected.norm() < 1e-4


def test_kernels_match_published_table(model: Any) -> None:
    for block, (expansion, inner, outer, stride, kernel) in zip(
        model.efficientnet_lite.blocks, BLOCKS, strict=True
    ):
        depthwise = block.depthwise[0]
        assert depthwise.weight.shape == (inner * expansion, 1, kernel, kernel)
        assert depthwise.stride == (stride, stride) and block.project[0].out_channels == outer
    full = net.EfficientNetLiteForImageClassification(net.Config(num_labels=1000))
    assert sum(weight.numel() for weight in full.parameters()) == 4_652_008


def test_all_published_weights_are_converted(model: Any) -> None:
    names = {"expand.0": "_expand_conv", "expand.1": "_bn0", "depthwise.0": "_depthwise_conv",
             "depthwise.1": "_bn1", "project.0": "_project_conv", "project.1": "_bn2"}  # fmt: skip
    outer = {"stem.0": "_conv_stem", "stem.1": "_bn0", "top.0": "_conv_head", "top.1": "_bn1"}
    published = {}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "classifier":
            published[f"_fc.{parts[1]}"] = weight
        elif parts[1] == "blocks":
            published[f"_blocks.{parts[2]}.{names['.'.join(parts[3:5])]}.{parts[5]}"] = weight
        else:
            published[f"{outer['.'.join(parts[1:3])]}.{parts[3]}"] = weight
    converted = net.convert_state(published)
    assert {*converted} == {*model.state_dict()}
    assert all(converted[name] is published_weight for name, published_weight
               in zip(model.state_dict(), published.values(), strict=True))  # fmt: skip


def test_batch_norms_keep_statistics_in_training(model: Any) -> None:
    """The output of a row must not depend on the batch."""
    import copy

    nets.register("efficientnet_lite")
    own = copy.deepcopy(model)
    network = as_network(own, torch.device("cpu"), torch.float32)
    network.model.train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 5
    before = {name: value.clone() for name, value in own.state_dict().items()}
    own.dropout.p = 0.0
    together = own(pixel_values=images).logits
    alone = torch.cat([own(pixel_values=image[None]).logits for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, model(pixel_values=images).logits, atol=1e-4)
    F.cross_entropy(together, torch.tensor([0, 1, 2, 3])).backward()
    assert all((value == before[name]).all() for name, value in own.state_dict().items())
    gains = [m.weight for m in own.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(gain.grad is not None and gain.grad.abs().sum() > 0 for gain in gains)
