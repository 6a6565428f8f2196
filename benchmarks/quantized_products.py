"""PyTorch's products with weights of 8 and 4 bits on this processor, beside the packed ones that serve.

    python benchmarks/quantized_products.py [--base smollm2-135m-instruct] [--rows 1 4 8 32 64]

Microseconds of one product of each shape of the base, the best of several turns; the weights are
many copies in turn, so that none stays in the cache. ``int8`` and ``int4`` keep activations in
bfloat16; ``int8 x int8`` rounds each row to 8 bits of its own scale, so that rows stay independent.
Behind it: how far the base's next tokens are from its own, in nats, where all linear layers read rows
of 8 bits. docs/log/service.md says what follows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from children import table
from luthier.engine.machine import open_network
from luthier.evaluation.parity import REFERENCE_PROMPTS
from luthier.models.network import Network
from luthier.models.tokenizer import load_tokenizer
from luthier.models.torch_backend import FlatBackend
from luthier.store.models import find

COPIES_BYTES = 120_000_000
GROUP = 32
Product = Callable[[Tensor], Tensor]


def packed(weight_OI: Tensor) -> Product:
    weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 8)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def int8(weight_OI: Tensor) -> Product:
    scale_O = weight_OI.abs().amax(1) / 127
    weight = (weight_OI / scale_O[:, None]).round().to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x, weight, scale_O)


def int4(weight_OI: Tensor) -> Product:
    """Scales for groups of 32, and the offset that the kernel adds to them, 0."""
    outputs, inputs = weight_OI.shape
    groups_OGg = weight_OI.float().view(outputs, inputs // GROUP, GROUP)
    scale_OG1 = groups_OGg.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    level_OI = ((groups_OGg / scale_OG1).round().clamp(-8, 7) + 8).int().view(outputs, inputs)
    weight = torch._convert_weight_to_int4pack_for_cpu(level_OI, 1)
    scale_GO = scale_OG1[..., 0].t()
    scales = torch.stack([scale_GO, torch.zeros_like(scale_GO)], -1).bfloat16().contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)


def int8_rows(weight_OI: Tensor) -> Product:
    scale_O = weight_OI.float().abs().amax(1).clamp_min(1e-12) / 127
    level_OI = (weight_OI.float() / scale_O[:, None]).round().to(torch.int8)
    weight = torch.ops.onednn.qlinear_prepack(level_OI, None)
    zero_O = torch.zeros(len(scale_O), dtype=torch.int32)

    def product(x: Tensor) -> Tensor:
        scale_N1 = x.abs().amax(-1, keepdim=True).float().mul_(1 / 127).clamp_min_(1e-12)
        level_NI = (x / scale_N1).round_().add_(128).to(torch.uint8)
        y_NO = torch.ops.onednn.qlinear_pointwise(
            level_NI, 1.0, 128, weight, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y_NO.mul_(scale_N1).to(x.dtype)

    return product


KINDS = {"packed": packed, "int8": int8, "int4": int4, "int8 x int8": int8_rows}


def microseconds(products: list[Product], x: Tensor, turns: int = 5, calls: int = 30) -> float:
    best, at = float("inf"), 0
    for _ in range(turns):
        began = time.perf_counter()
        for _ in range(calls):
            products[at % len(products)](x)
            at += 1
        best = min(best, (time.perf_counter() - began) / calls)
    return 1e6 * best


def nats_of_rows_in_8_bits(network: Network, tokenizer: Any) -> tuple[float, float]:
    """Mean and largest divergence of the next tokens behind beginnings of a few texts."""
    backend = FlatBackend(network, 1024, packs=False)
    texts = [tokenizer.encode(text) for text in REFERENCE_PROMPTS]
    prompts = [np.array(ids[:end]) for ids in texts for end in range(4, len(ids) + 1)]
    _, before_NV = backend.prefill_batch(prompts, 1)
    for layer in [each for each in network.model.modules() if type(each) is nn.Linear]:
        product = int8_rows(layer.weight)

        def forward(x: Tensor, layer: nn.Linear = layer, product: Product = product) -> Tensor:
            y = product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            return y if layer.bias is None else y + layer.bias

        layer.forward = forward  # type: ignore[method-assign]
    _, after_NV = backend.prefill_batch(prompts, 1)
    before_NV, after_NV = (each.float().log_softmax(-1) for each in (before_NV, after_NV))
    nats_N = (before_NV.exp() * (before_NV - after_NV)).sum(-1)
    return float(nats_N.mean()), float(nats_N.max())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32, 64])
    options = parser.parse_args()
    stored = find(options.base, print)
    network = open_network(stored)
    linears = [each.weight for each in network.model.modules() if type(each) is nn.Linear]
    lines = []
    for shape in dict.fromkeys(tuple(weight.shape) for weight in linears):
        weight_OI = next(weight for weight in linears if tuple(weight.shape) == shape)
        copies = max(2, COPIES_BYTES // (2 * weight_OI.numel()))
        products = {name: [make(weight_OI) for _ in range(copies)] for name, make in KINDS.items()}
        for rows in options.rows:
            x = torch.randn(rows, shape[1]).bfloat16()
            times = {name: microseconds(own, x) for name, own in products.items()}
            lines.append(
                [f"{shape[0]} x {shape[1]}", str(rows), *(f"{each:.0f}" for each in times.values())]
            )
    print(table(["weight", "rows", *KINDS], lines))
    mean, largest = nats_of_rows_in_8_bits(network, load_tokenizer(stored.folder))
    print(f"rows in 8 bits: {mean:.1e} nats in the mean, {largest:.1e} at most")


if __name__ == "__main__":
    main()
