"""What the parts of a training step take, each alone: where the time of a step of short rows lies.

    python benchmarks/step_parts.py [--rows 16] [--shared 12] [--own 44] [--rank 16]

A layer of SmolLM2-135M with LoRA on all linear layers, forward and backward, in the processor's type:
``rows`` of ``own`` tokens behind ``shared`` ones, as one micro-batch of the token tree. Milliseconds
are the median of a part, times the 30 layers. *Plain* are the frozen products of the linear layers,
which no arrangement of the rest can save; the next line has what LoRA adds to them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from children import table
from luthier.adaptations.lora_layer import LoRALinear
from luthier.data.tree import build_tree
from luthier.engine.machine import choose_machine, keep_freed_memory
from luthier.models.attention import plan_attention
from luthier.models.fused import RMSNorm, _SwiGLU
from luthier.types import Example

LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, SIZE = 30, 576, 1536, 9, 3, 64
LINEAR = {
    (HIDDEN, HIDDEN): 2,
    (HIDDEN, KEY_HEADS * SIZE): 2,
    (HIDDEN, INNER): 2,
    (INNER, HIDDEN): 1,
}
"""Inputs and outputs of the linear layers, and how many of each a block has."""


def milliseconds(act: Callable[[], Any], rounds: int = 30) -> float:
    seconds = []
    for _ in range(rounds + 5):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[5:])


def both_ways(act: Callable[..., Any], *inputs: Tensor) -> float:
    """Of ``act`` and its gradients."""
    inputs = tuple(each.detach().requires_grad_() for each in inputs)

    def outputs() -> tuple[Tensor, ...]:
        made = act(*inputs)
        return made if isinstance(made, tuple) else (made,)

    grads = [torch.randn_like(each) for each in outputs()]
    parameters = [p for p in getattr(act, "parameters", list)() if p.requires_grad]
    return milliseconds(
        lambda: torch.autograd.grad(outputs(), [*inputs, *parameters], grads, allow_unused=True)
    )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers turns positions."""

    def half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), -1)

    return tuple(each * cos + half(each) * sin for each in (query, key))


def measure(rows: int, shared: int, own: int, rank: int) -> dict[str, float]:
    """Milliseconds of a step by its parts."""
    machine = choose_machine("auto", None)
    dtype, generator = machine.dtype, np.random.default_rng(0)
    prefix = generator.integers(0, 1000, shared)
    weight = np.zeros(shared + own, dtype=np.float32)
    weight[-4:] = 1
    examples = [
        Example(np.concatenate([prefix, generator.integers(0, 1000, own)]), weight, row)
        for row in range(rows)
    ]
    tree = build_tree(examples, True)
    plan, count = plan_attention(tree, torch.device("cpu"), dtype), len(tree)
    print(f"{count} distinct tokens, {dtype}")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    found = dict.fromkeys(("plain", "what LoRA adds"), 0.0)
    for (inputs, outputs), times in LINEAR.items():
        base = nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False)
        x, grad = drawn(count, inputs), drawn(count, outputs)
        plain = milliseconds(
            lambda x=x, w=base.weight, g=grad: (torch.mm(x, w.t()), torch.mm(g, w))  # type: ignore[misc]
        )
        found["plain"] += times * plain
        found["what LoRA adds"] += times * (both_ways(LoRALinear(base, rank, 2.0, 0.0), x) - plain)
    query, key, value = (
        drawn(1, count, heads, SIZE).transpose(1, 2) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    angles = drawn(1, 1, count, SIZE)
    found["attention"] = both_ways(
        lambda q, k, v: plan.attend(None, q, k, v, SIZE**-0.5), query, key, value
    )
    found["positions"] = both_ways(lambda q, k: rotate(q, k, angles, angles), query, key)
    norm = RMSNorm(nn.Parameter(torch.ones(HIDDEN, dtype=dtype), requires_grad=False), 1e-5)
    found["norms"] = 2 * both_ways(norm, drawn(1, count, HIDDEN))
    gate, up = drawn(1, count, INNER), drawn(1, count, INNER)
    found["gate"] = both_ways(_SwiGLU.apply, gate, up)
    return {name: LAYERS * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--shared", type=int, default=12)
    parser.add_argument("--own", type=int, default=44)
    parser.add_argument("--rank", type=int, default=16)
    keep_freed_memory()
    parts = measure(**vars(parser.parse_args()))
    whole = sum(parts.values())
    lines = [[name, f"{each:.0f}", f"{each / whole:.0%}"] for name, each in parts.items()]
    print(table(["part", "ms a step", "share"], [*lines, ["all", f"{whole:.0f}", "100%"]]))


if __name__ == "__main__":
    main()
