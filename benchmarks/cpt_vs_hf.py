"""Continued pre-training at 512 tokens, against the Hugging Face Trainer and the machine's limit.

    python benchmarks/cpt_vs_hf.py TEXT.jsonl [--steps 8] [--pairs 2]

SmolLM2-135M, all weights, four sequences of 512 tokens per step, equal order, rate and schedule.
The limit of a step is the time of its matrix products at the best rate measured for the layers'
shapes: three products for each linear layer and the output head, and causal attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from children import Curve, Outcome, run, table, trl_python, tune

TOKENS, BATCH, RATE = 512, 4, 5e-5


def matmul_rate(shapes: list[tuple[int, int]], rows: int) -> float:
    """Best bfloat16 rate over the layers' shapes with ``rows`` tokens, in FLOP/s."""
    import torch

    best = 0.0
    for inputs, outputs in shapes:
        x = torch.randn(rows, inputs).bfloat16()
        w = torch.randn(outputs, inputs).bfloat16()
        for _ in range(12):
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            seconds = time.perf_counter() - started
            best = max(best, 2 * rows * inputs * outputs / seconds)
    return best


def step_flops(config: Mapping[str, int]) -> float:
    hidden, inner, layers = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
    )
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    linear = hidden * width * (2 * heads + 2 * groups) + 3 * hidden * inner
    head = hidden * config["vocab_size"]
    # scores and values forward, twice that and the scores' own backward: half of the square is seen
    attention = layers * heads * width * TOKENS * 6
    return BATCH * TOKENS * (6.0 * (layers * linear + head) + attention)


def luthier(source: Path, steps: int, budget: int) -> tuple[Outcome, Curve]:
    flags = {
        "objective": "causal_lm",
        "adaptation": "full",
        "batch-size": str(BATCH),
        "learning-rate": str(RATE),
    }
    settings = {"training.max_steps": str(steps), "training.micro_batch_tokens": str(budget)}
    return tune(source, flags, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2048)
    options = parser.parse_args()
    from luthier.library.models import find

    folder = find("smollm2-135m-instruct", print).folder
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows = []
    for _ in range(options.pairs):
        peer = run(
            [
                trl_python(),
                "benchmarks/hf_side.py",
                str(folder),
                str(options.data),
                str(options.steps),
                str(RATE),
            ]
        )
        rate = matmul_rate([(hidden, hidden), (hidden, inner), (inner, hidden)], BATCH * TOKENS)
        ours_run, curve = luthier(options.data, options.steps, options.budget)
        print(json.dumps({"luthier": curve, "hf": peer.report, "rate": rate}), file=sys.stderr)
        # the first two steps grow the heap; both sides are judged after them
        ours = min(curve["seconds"][2:]), sum(curve["seconds"][2:]) / len(curve["seconds"][2:])
        theirs = sum(peer.report["seconds"][2:]) / len(peer.report["seconds"][2:])
        limit = step_flops(config) / rate
        rows.append(
            [
                f"{BATCH * TOKENS / ours[1]:.0f}",
                f"{BATCH * TOKENS / theirs:.0f}",
                f"**{theirs / ours[1]:.1f}x**",
                f"{limit:.2f} s at {rate / 1e9:.0f} GFLOP/s",
                f"{limit / ours[1]:.0%} (best step {limit / ours[0]:.0%})",
                f"{ours_run.peak_bytes / 1e9:.2f} / {peer.peak_bytes / 1e9:.2f}",
                f"{curve['losses'][-1]:.3f} / {peer.report['losses'][-1]:.3f}",
            ]
        )
    header = [
        "tokens/s",
        "HF Trainer",
        "ratio",
        "matmul limit of a step",
        "reached",
        "GB",
        "last loss",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
