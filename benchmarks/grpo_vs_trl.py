"""GRPO against TRL 1.16's on the same prompts of GSM8K, in turns.

    python benchmarks/grpo_vs_trl.py GSM8K/train.jsonl [--steps 6] [--pairs 2] [--prompts 1]

SmolLM2-135M, LoRA of rank 16 on all linear layers, 8 completions of at most 64 tokens per prompt,
no reference model, one optimizer step per batch. TRL runs in a separate environment with its
defaults and with the best settings we found (weights in bfloat16, no gradient checkpointing).
Rewards differ in every group, so that no side skips a group; the reward function takes no time.
Completions/s exclude the first step and include sampling, grading and training. Memory is the peak
resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from children import (
    Curve,
    Outcome,
    memory_cells,
    print_pair,
    rate_cells,
    run,
    table,
    trl_python,
    tune,
)

GENERATIONS, TOKENS, RATE = 8, 64, 1e-5
SETTINGS = ("defaults", "best")


def write_rows(source: Path, target: Path, count: int) -> None:
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line]
    rows = [json.loads(line) for line in lines[:count]]
    chosen = [{"prompt": row["prompt"], "expected": row["completion"]} for row in rows]
    target.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def luthier(rows: Path, prompts: int, steps: int) -> tuple[Outcome, Curve]:
    flags = {"objective": "grpo", "batch-size": str(prompts), "learning-rate": str(RATE)}
    settings = {
        "training.max_steps": str(steps),
        "objective.num_generations": str(GENERATIONS),
        "objective.max_completion_tokens": str(TOKENS),
        "objective.grader.method": "similarity",
        "objective.force": "true",
    }
    return tune(rows, flags, settings, {"tokens": "completion_tokens", "rewards": "reward"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a step")
    parser.add_argument("--against", choices=SETTINGS, action="append")
    options = parser.parse_args()
    from luthier.library.models import find

    model = str(find("smollm2-135m-instruct", print).folder)
    each, out = GENERATIONS * options.prompts, []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(options.data, rows, options.prompts * options.steps)
        given = [str(rows), str(options.steps), str(options.prompts), str(GENERATIONS)]
        for setting in options.against or SETTINGS:
            for pair in range(options.pairs):
                side = ["benchmarks/trl_grpo_side.py", model, *given, str(TOKENS), setting]
                peer = run([trl_python(), *side, str(RATE)])
                ours, curve = luthier(rows, options.prompts, options.steps)
                print_pair(ours, curve, peer, against=setting, pair=pair)
                out.append(
                    [
                        setting,
                        *rate_cells(curve, peer, each),
                        *memory_cells(ours, peer),
                        f"{statistics.fmean(curve['tokens']):.0f}",
                        f"{statistics.fmean(peer.report['tokens']):.0f}",
                    ]
                )
    header = ["TRL setting", "completions/s", "TRL", "ratio", "GB", "TRL", "ratio"]
    print(table([*header, "tokens each", "TRL"], out))


if __name__ == "__main__":
    main()
