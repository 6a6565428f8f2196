"""Steps of few rows by the forward pass of fewer operations, beside the modules' own, in turns.

    python benchmarks/decoding_steps.py [--base smollm2-135m-instruct] [--rows 1 8 32] [--rounds 8]

The base, and the base with LoRA of rank 16 in place, as rollouts run it. Milliseconds are the median of
a step; operations are those of torch in one. Nothing is guessed ahead. The last column has the products
of all linear layers of the base with as many rows and nothing else, one after the other: no step by
these kernels is faster. Ends with an error if the logits of both differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from typing import Any

from children import sum_operations, table

PROMPT_TOKENS, STEPS = 70, 8
"""Steps that each side takes at its turn; the first two bring the weights into its order."""


def measure(backend: Any, rows: int, rounds: int) -> list[str]:
    """Milliseconds and operations of both sides, and the ratio."""
    import numpy as np
    import torch

    llama, sides = backend._llama, ("modules", "llama")
    if llama is None:
        sys.exit("this network keeps its own forward pass")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    calls: dict[str, int] = {}
    last: dict[str, torch.Tensor] = {}
    states = {
        side: backend.prefill_batch([np.arange(5, 5 + PROMPT_TOKENS)], rows)[0] for side in sides
    }

    def step(side: str, number: int) -> torch.Tensor:
        for state in states[side]:
            state.guess = []
        logits_RV: torch.Tensor = backend.step(
            states[side], [(31 * row + number) % 4000 for row in range(rows)]
        )
        return logits_RV

    for turn in range(rounds):
        for side in sides:
            backend._llama = llama if side == "llama" else None
            for number in range(turn * STEPS, (turn + 1) * STEPS):
                began = time.perf_counter()
                last[side] = step(side, number)
                if number % STEPS > 1:
                    seconds[side].append(time.perf_counter() - began)
            if turn == rounds - 1:
                calls[side] = int(
                    # Not those that only look at a tensor otherwise.
                    sum_operations(partial(step, side, 0), lambda function, _: not function.is_view)
                )
        if not torch.equal(last["modules"], last["llama"]):
            sys.exit(f"the logits of {rows} rows differ")
    backend._llama = llama
    for own in states.values():
        for state in own:
            backend.free(state)
    one, other = (1000 * statistics.median(seconds[side]) for side in sides)
    return [
        f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}",
        f"{calls['modules']:,}", f"{calls['llama']:,}",
    ]  # fmt: skip


def products(network: Any, rows: int, rounds: int) -> str:
    """Milliseconds that the products of one step take, the median."""
    import torch
    from torch import nn

    from luthier.models.packing import packed_weight

    packed = [
        (weight, torch.randn(rows, layer.in_features, dtype=layer.weight.dtype))
        for layer in network.model.modules()
        if isinstance(layer, nn.Linear) and (weight := packed_weight(layer)) is not None
    ]
    seconds = []
    with torch.no_grad():
        for _ in range(rounds * STEPS):
            began = time.perf_counter()
            for weight, x_NI in packed:
                weight.product(x_NI)
            seconds.append(time.perf_counter() - began)
    return f"{1000 * statistics.median(seconds):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    from luthier.adaptations import LoRA
    from luthier.engine.machine import open_network
    from luthier.models.torch_backend import FlatBackend
    from luthier.store.models import find

    lines = []
    for name in ("base", "LoRA in place"):
        network = open_network(find(options.base, print))
        if name.startswith("LoRA"):
            LoRA(rank=16).attach(network.model)
        backend = FlatBackend(network, 1024)
        for rows in options.rows:
            alone = products(network, rows, options.rounds)
            lines.append([name, str(rows), *measure(backend, rows, options.rounds), alone])
        backend.close()
    heads = [
        "network",
        "rows",
        "modules, ms",
        "now, ms",
        "ratio",
        "operations",
        "now",
        "products alone, ms",
    ]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
