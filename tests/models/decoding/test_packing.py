"""Packed weights give the same products, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.adaptations.lora_layer import DoRALinear, LoRALinear
from luthier.models.decoding.packing import PackedLinears, packed_weight

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, LoRALinear, DoRALinear])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_products_match_plain_weight(
    kind: type[LoRALinear] | None, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(320, 256, bias=bias, dtype=dtype)
    layer = base if kind is None else kind(base, 8, 2.0, 0.0)
    for name, weight in layer.named_parameters():
        if "lora_B" in name:
            weight += 0.1 * torch.randn_like(weight)
    layer.eval()
    for rows in (1, 3, 64, 65):
        x = torch.randn(1, rows, 320).to(dtype)
        plain = layer(x)
        with PackedLinears(layer):
            assert packed_weight(base) is not None
            got = layer(x)
        assert packed_weight(base) is None and "forward" not in base.__dict__
        torch.testing.assert_close(got, plain, rtol=0.01, atol=0.01)
        base.weight.neg_()  # type: ignore[operator]
        with PackedLinears(layer):
            assert (layer(x) - plain).abs().max() > 1, "packed anew each time"
        base.weight.neg_()  # type: ignore[operator]


def test_float64_and_small_weights_are_not_packed() -> None:
    for layer in (nn.Linear(320, 256, dtype=torch.float64), nn.Linear(16, 16)):
        with PackedLinears(layer):
            assert packed_weight(layer) is None
