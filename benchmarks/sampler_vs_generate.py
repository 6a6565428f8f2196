"""Completions a second: luthier's sampler and transformers' `generate`, on the same weights in one run.

    python benchmarks/sampler_vs_generate.py [--rows 1 8 32] [--tokens 64] [--rounds 3]

SmolLM2-135M in the machine's type with LoRA of rank 16 attached, one prompt of 150 tokens, no stop
token, temperature 1. `generate` runs a copy without luthier's layout (its own attention, the same LoRA
layers), both in turns; the best round of each counts.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch

from children import table
from luthier.adaptations.lora import LoRA
from luthier.engine.machine import choose_machine
from luthier.models.decoding import sample
from luthier.models.load import as_network, load_model
from luthier.models.sampling import Sampling
from luthier.store.models import find


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    machine = choose_machine()
    model = load_model(find("smollm2-135m-instruct", print).folder, machine.dtype, machine.device)
    LoRA(rank=16).attach(model)
    theirs = copy.deepcopy(model).eval()
    network = as_network(model, machine.device, machine.dtype)
    prompt_T = np.random.default_rng(0).integers(1000, 40_000, 150)
    ids_1T = torch.from_numpy(prompt_T)[None].to(machine.device)
    rows = []
    for count in options.rows:

        def ours(tokens: int, count: int = count) -> None:
            sample(network, [prompt_T], count, Sampling(temperature=1.0, max_tokens=tokens))

        def peer(tokens: int, count: int = count) -> None:
            theirs.generate(  # type: ignore[operator]
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                num_return_sequences=count,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )

        ours(2), peer(2)
        timed = [
            (seconds(lambda: ours(options.tokens)), seconds(lambda: peer(options.tokens)))
            for _ in range(options.rounds)
        ]
        a, b = (min(side) for side in zip(*timed, strict=True))
        total = count * options.tokens
        rows.append(
            [str(count), f"{a:.2f}", f"{total / a:.0f}", f"{total / b:.0f}", f"**{b / a:.1f}x**"]
        )
        print(rows[-1], flush=True)
    print(table(["rows", "luthier, s", "tokens/s", "generate, tokens/s", "ratio"], rows))


if __name__ == "__main__":
    main()
